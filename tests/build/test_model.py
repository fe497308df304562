"""The model of a configuration: with random weights, from a file, from a checkpoint."""

import dataclasses

import pytest
import torch
from building import ALONE, build_objects, write_checkpoint
from other_programs import renamed

from models import create_model, load_model
from models.checkpoints.opened import OpenedCheckpoint
from utils import build
from utils.build.model import describe_license, describe_model, describe_outputs
from utils.config import ConfigError, Facts, resolve


def test_the_seed_fixes_initial_weights():
    first, second, other = (build_objects("--seed", seed).model.pos_embed for seed in (7, 7, 8))
    assert torch.equal(first, second) and not torch.equal(first, other)


def test_precision_sets_the_rounding_of_float32_products():
    for precision, matmul in (("tf32", "high"), ("fp32", "highest")):
        build_objects("--precision", precision)
        assert torch.get_float32_matmul_precision() == matmul


def test_a_start_file_is_closed_after_it_has_been_read(tmp_path, monkeypatch):
    closed = []
    write_checkpoint(tmp_path / "best.pt")
    monkeypatch.setattr(OpenedCheckpoint, "close", lambda start: closed.append(start))
    objects = build_objects("--pretrained_dir", tmp_path, "--head", "keep")
    assert closed == [objects.found.start] and objects.model.load_report.classes == list("0123456789")


def test_images_prepared_too_small_cause_a_warning(capsys):
    """The model's image size is 8 px."""
    objects = build_objects()
    for prepared in (7, 8):
        splits = dataclasses.replace(objects.found.splits, prepared=prepared)
        build.build_model(objects.config, dataclasses.replace(objects.found, splits=splits), None, ALONE)
    printed = capsys.readouterr().out
    assert printed.count("they are enlarged; prepare them with python dataset.py prepare --size 9\n") == 1
    assert "less than the model's 8x8 px" in printed and "prepared, the shorter side 8 px at most" in printed


def test_a_model_without_a_row_is_named_by_its_sizes():
    flags = {"pretrained_dir": "w.pth", "num_heads": 2, "dataset": "folder"}
    sizes = {"patch_size": 4, "hidden_size": 40, "mlp_dim": 80, "num_layers": 1}
    for row, words in (({"model_type": "ViT-B_16", **sizes}, "ViT (width 40, 1 block, patch 4)"),
                       ({"model_type": "R26-ViT-S_32", **sizes}, "R26-ViT (width 40, "),
                       ({"model_type": "DeiT-S_16-distilled", **sizes}, "DeiT-distilled (width 40, "),
                       ({"model_type": "ViT-S_16", "classifier": "gap"}, "ViT-S_16, as the file says (ViT-S/16, mean of")):
        facts = Facts(100, 10, start_row=row | {"names_img_size": False}, start_path="w.pth")
        described = describe_model(resolve(flags, facts), facts)
        assert described.startswith(words) and ("B_16" in described) is False


def test_the_assumed_classes_of_a_head_without_names_are_printed():
    assert describe_outputs(list(map(str, range(5, 17)))) == (
        "classes: the head does not name them; its outputs 0, 1, 2, ... are taken to be 5, 6, 7, ...")


@pytest.mark.parametrize(("eval_only", "value"), [(True, 3), (False, 2)])
def test_a_resumed_model_has_the_checkpoints_weights(tmp_path, eval_only, value):
    """With --eval_only the averaged weights, if there are any."""
    objects = write_checkpoint(tmp_path / "best.pt")
    saved = build.saved_run({"resume_path": str(tmp_path), "eval_only": True}, ALONE)
    weights, average = ({name: torch.full_like(each, number) for name, each in saved.state.model.items()} for number in (2, 3))
    saved = dataclasses.replace(saved, state=dataclasses.replace(saved.state, model=weights, ema=average))
    built = build.build_model(objects.config.replace(eval_only=eval_only), objects.found, saved, ALONE)
    assert {each.unique().item() for each in built.model.state_dict().values()} == {value}


@pytest.mark.parametrize("eval_only", [True, False])
def test_a_resumed_model_whose_weights_are_not_finite_is_refused(tmp_path, eval_only):
    objects = write_checkpoint(tmp_path / "best.pt")
    saved = build.saved_run({"resume_path": str(tmp_path), "eval_only": True}, ALONE)
    saved.state.model["blocks.0.norm1.weight"][3] = float("inf")
    with pytest.raises(ConfigError, match=r"^--resume_path: .*best\.pt: 1 of the .* numbers of blocks\.0\.norm1.weight are not"):
        build.build_model(objects.config.replace(eval_only=eval_only), objects.found, saved, ALONE)


def test_settings_of_a_start_of_another_program_are_kept(tmp_path):
    """In the run, in its checkpoint, and in a run that starts from that checkpoint."""
    state = create_model("ViT-Nano_2", 3, hidden_size=16, mlp_dim=32, num_heads=2, num_layers=1).state_dict()
    torch.save(renamed(state, "torchvision"), tmp_path / "x.pth")
    first = write_checkpoint(tmp_path / "best.pt", "--pretrained_dir", tmp_path / "x.pth").model
    second = build_objects("--pretrained_dir", tmp_path).model
    for model in (first, load_model(tmp_path / "best.pt"), second):
        assert (model.config.gelu, model.config.mean[0], model.config.std[0]) == ("erf", 0.485, 0.229)
    assert torch.equal(first.blocks[0].attn.qkv.weight, second.blocks[0].attn.qkv.weight)


def test_a_restrictive_license_is_printed():
    for license in ("", "apache-2.0", "Apache-2.0", "mit", "bsd-3-clause"):
        assert describe_license(license, "checkpoint/deit/x.pth") == ""
    assert describe_license("dinov3-license", "x/timm/vit_small_patch16_dinov3.lvd1689m/model.safetensors") == (
        "licence: the start weights are under dinov3-license (https://huggingface.co/timm/vit_small_patch16_dinov3.lvd1689m): "
        "read what it allows of models that are made of them")
    assert "CC-BY-NC-4.0 (https://creativecommons.org/licenses/by-nc/4.0/)" in describe_license("CC-BY-NC-4.0", None)
    assert "under apple-ascl: read" in describe_license("apple-ascl", "output/r/best.pt")
    assert describe_license("", "x/facebook/new/model.safetensors") == (
        "licence: that of the start weights is not known; see https://huggingface.co/facebook/new")
