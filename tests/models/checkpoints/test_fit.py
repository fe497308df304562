"""Comparing a file with a model: what is not used, what is new, and the advice if they do not fit."""

import json
from pathlib import Path

import pytest
import torch
from filling import load, random_model, refused
from headers import save_plain
from originals import KINDS, arrays_of, dinov3, in_memory, tiny

from configs import MODELS
from models import create_model


def test_biases_that_are_zeros_may_be_left_out(tmp_path):
    """Those of Meta's own DINOv3, for the row without biases of queries and values, as in timm."""
    model, without = random_model(KINDS["dinov3"].row), tiny("DINOv3-S_16")
    state = {name: value for name, value in model.state_dict().items() if not name.startswith("head.")}
    zeros = {name: torch.zeros_like(value) if name.endswith(("q_bias", "v_bias")) else value for name, value in state.items()}
    torch.save(dinov3(zeros), tmp_path / "x.pth")
    report = load(tmp_path / "x.pth", without, "zero").load_report
    assert "biases of queries and values, all zero, are not used" in report.notes
    assert "blocks.0.attn.qkv.bias" in report.left_out
    torch.save(dinov3(state), tmp_path / "x.pth")
    refused("arrays that the model lacks: blocks.0.attn.qkv.bias", load, tmp_path / "x.pth", without, "zero")


def test_another_pooling_than_the_file_s_is_new_or_left_out():
    siglip = KINDS["timm_siglip"].row
    with_pool = in_memory(arrays_of("timm_siglip", random_model(siglip)))
    report = create_model(siglip, 3, pretrained=with_pool, classifier="mean").load_report
    assert "its pooling by attention is not used (--classifier attention uses it)" in report.notes
    assert "attn_pool.kv.weight" in report.left_out
    gap = in_memory(arrays_of("timm_siglip_gap", random_model(KINDS["timm_siglip_gap"].row)))
    torch.manual_seed(0)
    model = create_model(siglip, 3, pretrained=gap)
    assert "new: attn_pool, head" in str(model.load_report) and len(model.load_report.fresh) == 15
    assert model.attn_pool.latent.std() > 0.01 and model.attn_pool.kv.weight.std() > 0.01
    assert model.attn_pool.norm.weight.unique().tolist() == [1] and not model.attn_pool.mlp.fc1.bias.any()
    refused("lacks: attn_pool", create_model, siglip, 3, pretrained=gap, head="keep")
    for lost in ("attn_pool.latent", "attn_pool.kv.weight"):                    # a part of it is not another pooling
        rest = arrays_of("timm_siglip", random_model(siglip))
        del rest[lost]
        refused(f"needs arrays that the file lacks: {lost}; ", create_model, siglip, 3, pretrained=in_memory(rest))


CLASSIFIERS = ("token", "gap", "patch_mean", "mean", "token_mean", "attention")
NORMS = {"norm": "norm.weight", "fc_norm": "fc_norm.weight", "attn_pool": "attn_pool.latent"}


def parts_of(classifier: str, row) -> set[str]:
    """Return the parts between the blocks and the head."""
    last = {"fc_norm"} if classifier == "patch_mean" else {"norm"} if row.final_norm else set()
    return last | ({"attn_pool"} if classifier == "attention" else set())


@pytest.mark.parametrize("name", ["ViT-Ti_16", "EVA02-Ti_14", "SigLIP-B_16", "PE-core-Ti_16", "DINOv3-S_16", "PE-spatial-Ti_16"])
def test_a_new_head_may_read_what_it_chooses(name, tmp_path):
    """Whatever the file's head reads: new and unused parts are reported, or the choice is refused with the reason."""
    row, sizes = MODELS[name], {"patch_size": 16, "hidden_size": 24, "mlp_dim": 32, "num_heads": 2, "num_layers": 1}
    sizes |= {"pool_heads": 2} if row.pool_heads else {}
    for had in CLASSIFIERS if row.class_token else ("gap", "patch_mean", "mean", "attention"):
        if had == "gap" and not name.startswith("ViT-"):
            continue
        save_plain(create_model(name, 3, 32, classifier=had, **sizes), tmp_path / "x.pth")
        for wanted in CLASSIFIERS:
            needs_cls = row.class_token and wanted != "gap"
            words = ("the model has no cls token" if wanted in ("token", "token_mean") and not row.class_token else
                     "it has no cls token" if had == "gap" and needs_cls else
                     "it has a cls token, but --classifier gap is for models without one" if (
                         row.class_token and had != "gap" and wanted == "gap") else
                     "timm's pooling by attention skips the cls token" if (
                         had == wanted == "attention" and name in ("ViT-Ti_16",)) else "")
            if words:
                refused(words, create_model, name, 5, 32, tmp_path / "x.pth", classifier=wanted, **sizes)
                continue
            report = create_model(name, 5, 32, tmp_path / "x.pth", classifier=wanted, **sizes).load_report
            fresh, left = parts_of(wanted, row) - parts_of(had, row), parts_of(had, row) - parts_of(wanted, row)
            assert {part for part, array in NORMS.items() if array in report.fresh} == fresh, (had, wanted)
            assert {part for part, array in NORMS.items() if array in report.left_out} == left, (had, wanted)
            notes = {"attn_pool": "its pooling by attention is not used", "fc_norm": "the norm after its mean is not used"}
            assert all((words in str(report)) == (part in left) for part, words in notes.items())


def timm_folder(folder: Path, model, architecture: str, pool: str, **arguments) -> Path:
    """Save a folder like timm."""
    folder.mkdir(exist_ok=True)
    save_plain(model, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({
        "architecture": architecture, "num_classes": 3, "global_pool": pool, "pretrained_cfg": {"tag": "x"},
        "model_args": {"depth": 1, "img_size": model.img_size[0], "global_pool": pool, **arguments}}))
    return folder


@pytest.mark.parametrize("name, architecture", [("CLIP-B_16", "vit_base_patch16_clip_quickgelu_224"),
                                                ("DINOv2-S_14-reg", "vit_small_patch14_reg4_dinov2"),
                                                ("ViT-Ti_16", "vit_tiny_patch16_224")])
def test_timm_s_pooling_by_attention_may_skip_the_tokens_before_the_patches(name, architecture, tmp_path):
    model = random_model(name, 3, 2 * MODELS[name].patch_size, num_layers=1, classifier="attention").eval()
    for words in ("timm's pooling by attention skips the cls token", "with --classifier token or mean"):
        refused(words, create_model, pretrained=timm_folder(tmp_path, model, architecture, "map"), head="keep")
    assert create_model(None, 5, pretrained=tmp_path, classifier="token").load_report
    folder = timm_folder(tmp_path, model, architecture, "map", pool_include_prefix=True)
    images = torch.randn(1, 3, *model.img_size)
    keys = {"gelu": model.config.gelu}                     # timm's ViT uses another than Google's
    assert torch.allclose(create_model(pretrained=folder, head="keep", **keys).eval()(images), model(images), atol=1e-5)


def test_unsupported_means_are_refused(tmp_path):
    model = random_model("DINOv3-S_16", 3, 32, num_layers=1)
    for pool, arguments, words in (("avgmax", {}, "uses timm's global_pool avgmax"), ("max", {}, "timm's global_pool max"),
                                   ("avg", {"pool_include_prefix": True}, "reads a mean that includes the cls token")):
        folder = timm_folder(tmp_path, model, "vit_small_patch16_dinov3", pool, **arguments)
        refused(words, create_model, pretrained=folder, head="keep")
        assert create_model(None, 5, pretrained=folder).load_report


def test_a_config_says_what_a_kept_head_reads_for_a_named_row_too(tmp_path):
    model = random_model("DINOv3-S_16", 3, 32, num_layers=1)
    for pool, classifier in (("avg", "mean"), ("token", "token")):
        folder = timm_folder(tmp_path, model, "vit_small_patch16_dinov3", pool)
        kept = create_model("DINOv3-S_16", None, 32, folder, "keep", num_layers=1)
        assert kept.config.classifier == create_model(pretrained=folder, head="keep").config.classifier == classifier


def test_a_file_of_another_kind_is_named():
    dinov2, plain = in_memory(arrays_of("timm_dinov2_reg", random_model(KINDS["timm_dinov2_reg"].row))), tiny("ViT-B_16")
    message = refused("it has register tokens: use the --model_type of its family", create_model, plain, 3, pretrained=dinov2)
    assert "reg_token" in message
    vit = in_memory(dict(random_model(plain).state_dict()))
    refused("it has no register tokens: use another --model_type", create_model, KINDS["timm_dinov2_reg"].row, 3, pretrained=vit)
    clip = in_memory(arrays_of("timm_clip", random_model(KINDS["timm_clip"].row)))
    refused("it has a norm before the blocks, like CLIP and PE", create_model, plain, 3, pretrained=clip)
    dinov3_file = in_memory(arrays_of("timm_dinov3", random_model(KINDS["timm_dinov3"].row)))
    refused("it has register tokens", create_model, plain, 3, pretrained=dinov3_file)


def test_grey_images_need_a_bias_of_the_patch_embedding():
    """It absorbs the means of the colors if these differ, as in CLIP."""
    row = KINDS["timm_clip"].row
    file = in_memory(arrays_of("timm_clip", random_model(row)))
    refused("it has no bias to absorb the means of its colors. Use 3 channels", create_model, row, 3,
            pretrained=file, in_channels=1)
    alike = create_model(row, 3, pretrained=file, in_channels=1, mean=(0.5,) * 3, std=(0.5,) * 3)
    assert alike.patch_embed.proj.weight.shape == (48, 1, 8, 8)
