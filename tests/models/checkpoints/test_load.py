"""Loading checkpoints of every kind with a report on every array, and models of our own runs."""

import numpy as np
import pytest
import reference
import torch
from filling import load, load_case, random_model, refused, same_state, save_arrays
from torch.nn import functional as F

from configs import META, MODELS, architecture
from models import create, create_model, load_model, load_pretrained, save_timm
from models.checkpoints.opened import checkpoint_head
from models.checkpoints.run_fields import LATER_KEYS
from models.layers import resize_positions
from utils.run import checkpoint

ROWS, CASE = reference.ROWS, "g_p16_pre"
HEAD = {"head.weight", "head.bias"}
HEAD_ARRAYS = {"head/kernel", "head/bias", "pre_logits/kernel", "pre_logits/bias"}


def edited(folder, case: str = CASE, remove: tuple = (), save=np.savez, **changes):
    """Write a copy of the case's checkpoint with some arrays changed, added or removed."""
    arrays = {name: array for name, array in reference.arrays(reference.weights(case)).items() if name not in remove}
    return save_arrays(folder / "x.npz", arrays | changes, save)


# -------------------------------------------------------------------------------------------------- the report


@pytest.mark.parametrize("head", ["zero", "keep"])
@pytest.mark.parametrize("case", ROWS)
def test_every_array_and_every_parameter_is_accounted_for(case, head):
    model = load(reference.weights(case), case, head)
    report, parameters = model.load_report, set(model.state_dict())
    in_file = set(reference.arrays(reference.weights(case)))
    assert len(report.used) == len(set(report.used)) and set(report.used) | set(report.fresh) == parameters
    assert report.fresh == (sorted(HEAD) if head == "zero" else [])
    assert not set(report.used) & set(report.fresh) and report.resized == {} and report.notes == []
    assert report.left_out == (sorted(HEAD_ARRAYS & in_file) if head == "zero" else [])
    assert report.path == str(reference.weights(case))


@pytest.mark.parametrize("case, img_size, resized", [
    (CASE, 64, None), (CASE, 96, "4x4 -> 6x6"), (CASE, (32, 128), "4x4 -> 2x8"), ("g_p16_gap", (48, 80), "4x4 -> 3x5"),
    ("g_r50b", (32, 64), "4x4 -> 2x4"), ("g_p16_224", 384, "14x14 -> 24x24")])
def test_resized_positions_are_reported(case, img_size, resized):
    """4x4 and 2x8 have the same number of tokens, but are different grids."""
    model = load(reference.weights(case), case, "zero", img_size=img_size)
    assert model.load_report.resized == ({"pos_embed": resized} if resized else {})
    table = torch.from_numpy(reference.arrays(reference.weights(case))["Transformer/posembed_input/pos_embedding"])
    assert (model.pos_embed.shape == table.shape and torch.equal(model.pos_embed, table)) == (resized is None)


def test_report_is_one_line():
    text = str(load(reference.weights(CASE), CASE, "zero", img_size=96).load_report)
    assert text == (f"42 arrays from {reference.weights(CASE)}; pos_embed resized 4x4 -> 6x6; new: head; "
                    "the file's head is not used")


def test_report_names_unused_weights_and_not_what_else_a_file_holds(tmp_path):
    """Such as the optimizer's state."""
    state = create_model("ViT-Nano_2", 5).state_dict()
    torch.save({"model": state, "optimizer": {"lr": torch.ones(1)}, "epoch": 3}, tmp_path / "w.pth")
    report = create_model("ViT-Nano_2", 10, pretrained=tmp_path / "w.pth", head="zero").load_report
    assert "; new: head; the file's head is not used; " in str(report)
    assert {"epoch", "optimizer"} <= set(report.left_out)


# ---------------------------------------------------------------------------------------------------- the head


def test_a_new_task_starts_with_a_zero_head_and_without_pre_logits():
    model = load(reference.weights(CASE), CASE, "zero", num_classes=5).eval()
    assert not model.config.representation_size and not hasattr(model, "pre_logits")
    assert not model.head.weight.any() and not model.head.bias.any()
    assert torch.equal(model(reference.images(64)), torch.zeros(2, 5))


@pytest.mark.parametrize("case, classes, width", [(CASE, 21, 48), ("g_p16_gap", 9, 0), ("g_r50b", 11, 48), ("g_rti16", 8, 0)])
def test_a_kept_head_has_the_file_s_classes_and_pre_logits(case, classes, width):
    assert checkpoint_head(reference.weights(case)) == (classes, width)
    model = load(reference.weights(case), case)
    assert (model.num_classes, model.config.representation_size, hasattr(model, "pre_logits")) == (classes, width, width > 0)


def test_heads_that_do_not_fit_are_refused():
    path = reference.weights(CASE)
    refused("its head has 21 classes, the model 20; .*head='zero' starts a new head", load, path, CASE, num_classes=20)
    refused("a new task starts without a pre_logits layer, .*. Use head='keep'", load, path, CASE, "zero", representation_size=48)
    refused("head='fresh': must be", load_pretrained, create_model(ROWS[CASE], 21), path, "fresh")


def test_a_file_without_a_head_starts_only_a_new_task(tmp_path):
    path = edited(tmp_path, "g_p32", remove=("head/kernel", "head/bias"))
    refused("has no head to keep", load, path, "g_p32")
    assert load(path, "g_p32", "zero").load_report.left_out == []


def test_an_all_zero_head_is_noted_when_it_is_kept(tmp_path):
    zero = np.zeros((48, 21), np.float32)
    path = edited(tmp_path, **{"head/kernel": zero})
    note, = load(path, CASE).load_report.notes
    assert "head is all zero" in note and note in str(load(path, CASE).load_report)
    assert load(path, CASE, "zero").load_report.notes == []


def test_a_head_that_is_not_kept_is_not_read(tmp_path):
    """In 21k files it is the largest array. Here it is damaged, which only reading would show."""
    path = edited(tmp_path, **{"head/kernel": np.full((48, 21), 7, np.float32)})
    path.write_bytes(path.read_bytes().replace(np.full(1008, 7, np.float32).tobytes(), np.full(1008, 8, np.float32).tobytes()))
    load(path, CASE, "zero")
    refused("'head/kernel' is damaged", load, path, CASE)


# ------------------------------------------------------------------------------------------------- the layouts


LINEN = {"LayerNorm_2": "LayerNorm_1", "ProductAttention_1": "ProductAttention_0", "MlpBlock_3": "MlpBlock_0"}
STATE = {"opt/state/step": np.int32(7), "opt/state/param_states/cls/momentum": np.ones((1, 1, 48), np.float32)}


@pytest.mark.parametrize("head", ["zero", "keep"])
@pytest.mark.parametrize("names, prefix, more", [(LINEN, "", {}), ({}, "opt/target/", {}), (LINEN, "opt/target/", STATE)],
                         ids=["linen", "target", "train_state_linen"])
def test_other_layouts_give_the_same_model(tmp_path, names, prefix, more, head):
    """Flax's automatic names of modules, and a whole train state, whose optimizer is not used."""
    arrays = {}
    for name, array in reference.arrays(reference.weights(CASE)).items():
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        arrays[prefix + name] = array
    model, plain = load(save_arrays(tmp_path / "x.npz", arrays, **more), CASE, head), load(reference.weights(CASE), CASE, head)
    assert same_state(model, plain)
    assert model.load_report.left_out == plain.load_report.left_out + sorted(more)


def test_unknown_arrays_in_a_train_state_are_refused(tmp_path):
    arrays = {f"opt/target/{name}": array for name, array in reference.arrays(reference.weights(CASE)).items()}
    refused("unknown members in addition to the weights under opt/target/: surprise", load,
            save_arrays(tmp_path / "x.npz", arrays, surprise=np.ones(1)), CASE)


# ------------------------------------------------------------------------------- the wrong model, the wrong file


@pytest.mark.parametrize("file, row, message", [
    (CASE, ROWS["g_rti16"], "lacks: conv_root/kernel, gn_root/bias, gn_root/scale; is --model_type right. The file has: "
                            "width 48, 3 blocks, patch 16$"),
    ("g_rti16", ROWS[CASE], "lacks: Transformer/encoderblock_2/LayerNorm_0/bias"),
    ("g_r50b", ROWS["g_p16_gap"], "that the model lacks: block1/unit1/conv1/kernel, .* and [0-9]+ more"),
    ("g_p32", ROWS["g_p16_lneps"], "that the model lacks: Transformer/encoderblock_2/"),
    ("g_p16_gap", ROWS["g_p16_lneps"], "lacks: cls; it has no cls token: use --classifier gap$"),
    ("g_p16_lneps", ROWS["g_p16_gap"], "that the model lacks: cls; it has a cls token, .* use --classifier mean or token$"),
    ("g_p16_lneps", MODELS["ViT-B_16"], "lacks: Transformer/encoderblock_10/"),
])
def test_a_file_of_another_model_is_refused(file, row, message):
    """The message names the arrays that show it."""
    refused(message, create_model, row, pretrained=reference.weights(file))


@pytest.mark.parametrize("more, name", [
    ({"patch_size": 32}, "embedding/kernel has shape (16, 16, 3, 48)"),
    ({"hidden_size": 60}, "embedding/kernel has shape (16, 16, 3, 48)"),
    ({"mlp_dim": 96}, "Transformer/encoderblock_0/MlpBlock_3/Dense_0/kernel has shape (48, 80)"),
    ({"num_heads": 4}, "Transformer/encoderblock_0/MultiHeadDotProductAttention_1/query/kernel has shape (48, 3, 16)"),
    ({"in_channels": 4}, "embedding/kernel has shape (16, 16, 3, 48)"),
])
def test_another_size_is_refused(more, name):
    assert name in refused("is --model_type right", load, reference.weights(CASE), CASE, "zero", **more)


BLOCK = "Transformer/encoderblock_1/"
ATTENTION = f"{BLOCK}MultiHeadDotProductAttention_1/"


@pytest.mark.parametrize("name, shape", [
    ("embedding/kernel", (48, 3, 16, 16)),                    # in torch's order instead of HWIO
    (f"{BLOCK}MlpBlock_3/Dense_0/kernel", (80, 48)),          # transposed
    (f"{ATTENTION}key/kernel", (48, 4, 12)),        # another number of heads
    (f"{ATTENTION}value/bias", (3, 15)),
    (f"{ATTENTION}out/kernel", (48, 3, 16)),
    ("Transformer/posembed_input/pos_embedding", (1, 18, 48)),     # 17 patches are no square
    ("Transformer/posembed_input/pos_embedding", (17, 48)),
    ("pre_logits/bias", ()),
    ("head/kernel", (21, 48)),
])
def test_an_array_of_another_shape_is_refused(tmp_path, name, shape):
    """The message has its name and its shape."""
    text = refused("does not fit", load, edited(tmp_path, **{name: np.zeros(shape, np.float32)}), CASE)
    assert name in text and str(shape) in text


@pytest.mark.parametrize("head", ["zero", "keep"])
def test_a_missing_array_and_one_too_many_are_refused(tmp_path, head):
    refused(f"lacks: {ATTENTION}out/bias;", load, edited(tmp_path, remove=(f"{ATTENTION}out/bias",)), CASE, head)
    refused("that the model lacks: dist;", load, edited(tmp_path, dist=np.ones(3, np.float32)), CASE, head)


def test_a_failed_load_leaves_the_model_as_it_was(tmp_path):
    """The last array of the file is damaged, and none of the others has been loaded."""
    model = create_model(ROWS["g_p32"], 5)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    path = edited(tmp_path, "g_p32", **{"Transformer/encoderblock_3/MlpBlock_3/Dense_1/bias": np.zeros(7, np.float32)})
    refused("Dense_1/bias", load_pretrained, model, path)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("names, message", [
    (["layer1/kernel", "head/bias"], "not a Vision Transformer in a known layout .its arrays: head/bias, "),
    (["Transformer/encoderblock_0/Attention/kernel"],
     "not a Vision Transformer in Google's layout .its arrays: Transformer/encoderblock_0/"),
], ids=["another_model", "google_without_blocks"])
def test_a_file_that_is_no_vision_transformer_is_refused(tmp_path, names, message):
    path = save_arrays(tmp_path / "x.npz", dict.fromkeys(names, np.ones(3)))
    assert str(path) in refused(message, load, path, CASE)


@pytest.mark.parametrize("name", ["head/bias", "pre_logits/bias"])
def test_sizes_are_believed_only_if_the_kernel_agrees(tmp_path, name):
    """create_model builds what checkpoint_head returns: a few kB that claim millions of classes must not allocate gigabytes."""
    path = edited(tmp_path, save=np.savez_compressed, **{name: np.zeros(4_000_000, np.float32)})
    assert path.stat().st_size < 1 << 18
    refused(name.split("/")[0], checkpoint_head, path)


# ------------------------------------------------------------------------------------- DeiT, CaiT, MAE, timm's files

TORCH_ROWS = reference.TORCH_ROWS
FC_NORM = ["fc_norm.bias", "fc_norm.weight"]


@pytest.mark.parametrize("case, logits", [
    ("deit", "deit/logits"), ("deit_dist", "deit_dist/logits"), ("cait", "cait/logits"), ("mae_gp1", "mae/ft_logits_gp1"),
    ("mae_gp0", "mae/ft_logits_gp0"), ("timm_vit", None)])
@torch.inference_mode()
def test_files_of_pytorch_give_the_published_logits(case, logits):
    expected = torch.from_numpy(reference.arrays(reference.TORCH / ("expected.npz" if logits else "timm_vit_expected.npz"))[
        logits or "logits"])
    model = load_case(case).eval()
    assert (model(reference.torch_images(case)) - expected).abs().max() < 1e-5
    report = model.load_report
    assert set(report.used) == set(model.state_dict()) and (report.fresh, report.left_out, report.notes) == ([], [], [])
    assert checkpoint_head(reference.TORCH / reference.TORCH_FILES[case]) == (expected.shape[1], 0)


@pytest.mark.parametrize("case, left", [
    ("deit", ["head.bias", "head.weight"]), ("timm_vit", ["head.bias", "head.weight"]), ("cait", ["head.bias", "head.weight"]),
    ("deit_dist", ["head.bias", "head.weight", "head_dist.bias", "head_dist.weight"])])
def test_a_new_task_from_files_of_pytorch(case, left):
    """A distilled DeiT has two heads, and both start at zero."""
    model = load_case(case, "zero", num_classes=4)
    assert model.load_report.left_out == model.load_report.fresh == left == sorted(model.head_names())
    assert not any(model.get_parameter(name).any() for name in left)
    assert set(model.load_report.used) | set(left) == set(model.state_dict())


@pytest.mark.parametrize("file, decoder", [("mae_pretrain_enc.pth", 0), ("mae_pretrain_full.pth", 32)])
@pytest.mark.parametrize("case, tag", [("mae_gp1", "gp1"), ("mae_gp0", "gp0")])
def test_an_encoder_of_mae_lacks_what_the_published_code_reports(case, tag, file, decoder):
    expected = reference.arrays(reference.TORCH / "expected.npz")
    model = load_case(case, "zero", file, num_classes=6)
    report = model.load_report
    assert report.fresh == sorted(expected[f"mae/ft_missing_{tag}"])
    left = [name for name in report.left_out if not name.startswith(("decoder_", "mask_token"))]
    assert left == sorted(map(str, expected[f"mae/ft_unexpected_{tag}"]))
    whole = set(torch.load(reference.TORCH / file, weights_only=True)["model"])
    assert set(report.used) | set(report.left_out) == whole and (len(report.left_out) - len(left) > 20) == bool(decoder)
    if case == "mae_gp1":
        assert (model.fc_norm.weight == 1).all() and not model.fc_norm.bias.any()


@torch.inference_mode()
def test_mae_at_another_size_is_as_published():
    """64 -> 112 px, as its fine-tuning code loads it: bicubic positions."""
    expected = {name.removeprefix("mae/ft_big_"): torch.from_numpy(array) for name, array in
                reference.arrays(reference.TORCH / "expected.npz").items() if name.startswith(("mae/ft_big", "mae/img_big"))}
    model = load_case("mae_gp1", "zero", "mae_pretrain_enc.pth", num_classes=6, img_size=112).eval()
    assert model.load_report.resized == {"pos_embed": "4x4 -> 7x7"}
    assert (model.pos_embed - expected["pos_embed"]).abs().max() < 1e-5
    for name in ("head.weight", "head.bias", "fc_norm.weight", "fc_norm.bias"):
        model.get_parameter(name).copy_(expected[name.replace(".", "_")])
    mean, std = (torch.tensor(TORCH_ROWS["mae_gp1"][key]).view(3, 1, 1) for key in ("mean", "std"))
    images = (expected["mae/img_big"].permute(0, 3, 1, 2).float() / 255 - mean) / std
    assert (model(images) - expected["logits"]).abs().max() < 1e-5


@pytest.mark.parametrize("case, prefix", [("deit", 1), ("deit_dist", 2), ("cait", 0), ("mae_gp1", 1), ("timm_vit", 1)])
@pytest.mark.parametrize("img_size, rule", [((80, 32), "bicubic"), ((64, 96), "bicubic"), ((80, 32), "bilinear")])
def test_every_family_s_positions_are_resized_by_its_rule(case, prefix, img_size, rule):
    """Compared with PyTorch's interpolation; the rows before the patches do not change."""
    model = load_case(case, "zero", img_size=img_size, position_resize=rule)
    table = reference.torch_state(case)["pos_embed"]
    side, grid = TORCH_ROWS[case].img_size // 16, (img_size[0] // 16, img_size[1] // 16)
    assert model.load_report.resized == {"pos_embed": f"{side}x{side} -> {grid[0]}x{grid[1]}"}
    patches = table[:, prefix:].reshape(1, side, side, -1).permute(0, 3, 1, 2)
    wanted = F.interpolate(patches, grid, mode=rule, align_corners=rule == "bilinear").flatten(2).transpose(1, 2)
    assert torch.equal(model.pos_embed[:, :prefix], table[:, :prefix])
    assert model.pos_embed.shape[1] == prefix + grid[0] * grid[1] and (model.pos_embed[:, prefix:] - wanted).abs().max() < 1e-6


@pytest.mark.parametrize("file, row, head, message", [
    ("deit_tiny_distilled.pth", "deit", "zero", "the model lacks: dist_token; it is a distilled DeiT: use the --model_type of "
                                                "its size that ends in -distilled$"),
    ("deit_tiny_distilled.pth", "deit", "keep", "the model lacks: dist_token, head_dist.bias, .*ends in -distilled$"),
    ("deit_tiny.pth", "deit_dist", "zero", "lacks: dist_token; it is not distilled: .*does not end in -distilled$"),
    ("cait_xxs_tiny.pth", "deit", "zero", "it is a CaiT: use the --model_type CaiT-... of its size$"),
    ("deit_tiny.pth", "cait", "zero", "it is not a CaiT: use another --model_type$"),
    ("mae_finetuned_gp1.pth", "mae_gp0", "keep", "lacks: norm.bias, norm.weight; it pools the patches .fc_norm.: "
                                                 "use --classifier patch_mean$"),
    ("mae_finetuned_gp0.pth", "mae_gp1", "keep", "lacks: fc_norm.bias, fc_norm.weight; .*use --classifier token$"),
    ("mae_pretrain_enc.pth", "mae_gp1", "keep", "has no head to keep"),
])
def test_a_file_of_another_family_advises_what_to_use(file, row, head, message):
    refused(message, load_case, row, head, file)


def test_a_norm_after_the_mean_without_a_cls_token_is_read(tmp_path):
    """timm's models without a cls token normalize after the mean; Google's before."""
    state = {name.replace("norm.", "fc_norm.") if name.startswith("norm.") else name: value
             for name, value in reference.torch_state("deit").items() if name != "cls_token"}
    state["pos_embed"] = state["pos_embed"][:, 1:]
    torch.save(state, tmp_path / "x.pth")
    for classifier in ("token", "patch_mean"):
        refused("it has no cls token and a norm after the mean .fc_norm.: use the --model_type of its family", create_model,
                TORCH_ROWS["deit"], pretrained=tmp_path / "x.pth", classifier=classifier)
    model = load(tmp_path / "x.pth", TORCH_ROWS["deit"], classifier="patch_mean", class_token=False)
    assert torch.equal(model.fc_norm.weight, state["fc_norm.weight"]) and model.load_report.fresh == []


def test_google_s_encoder_may_start_a_model_that_pools_patches():
    model = load(reference.weights(CASE), CASE, "zero", classifier="patch_mean")
    assert set(FC_NORM) <= set(model.load_report.fresh)
    assert {"Transformer/encoder_norm/scale", "Transformer/encoder_norm/bias"} <= set(model.load_report.left_out)


# ------------------------------------------------------------------------------------------------- grey images


@pytest.mark.parametrize("case", [CASE, "g_p16_gap", *TORCH_ROWS])
@torch.inference_mode()
def test_a_grey_image_gives_the_same_as_three_equal_channels(case):
    """In every family, up to rounding: the patch kernel is summed, using the statistics of both."""
    row = TORCH_ROWS.get(case) or ROWS[case]
    path = reference.TORCH / reference.TORCH_FILES[case] if case in TORCH_ROWS else reference.weights(case)
    colour = load(path, row).eval()
    grey = load(path, row, in_channels=1, mean=(0.31,), std=(0.27,), channel_mean=row.mean, channel_std=row.std).eval()
    assert grey.load_report.notes == ["patch kernel summed over the channels"] and colour.load_report.notes == []
    image = torch.rand(2, 1, *grey.img_size)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (row.mean, row.std))
    wanted = colour((image.expand(-1, 3, -1, -1) - mean) / std)
    assert (grey((image - 0.31) / 0.27) - wanted).abs().max() < 1e-5


def test_kernels_that_cannot_be_summed_are_refused(tmp_path):
    save_timm(create_model(TORCH_ROWS["deit"], 5, in_channels=1), tmp_path / "x.pth")
    refused("it belongs to a model for grey images: use --in_channels 1", load, tmp_path / "x.pth", TORCH_ROWS["deit"], "zero")
    refused("conv_root/kernel has shape .*a hybrid's first kernel cannot be summed over the channels, because its weights are "
            "standardized", load, reference.weights("g_rti16"), "g_rti16", "zero", in_channels=1)


# ------------------------------------------------------------------------------------- checkpoints of our own runs


def own_checkpoint(path, model, **more):
    """Write a checkpoint like train.py."""
    config = {"img_size": model.img_size if model.img_size[0] != model.img_size[1] else model.img_size[0]}
    fields = {
        "step": 3, "updates": 3, "skips": 0, "model": model.state_dict(), "optimizer": {"state": {}}, "scaler": {}, "best": {},
        "first": {}, "config": config, "architecture": model.config.to_dict(), "train_images": 9, "seconds": 1.5,
        "classes": [f"c{i}" for i in range(model.num_classes)]}
    checkpoint.save(path, checkpoint.RunState(**fields | more))
    return path


FAMILIES = {
    "vit": architecture(2, 12, 16, 3, 2, img_size=8),
    "pre_logits": architecture(2, 12, 16, 3, 2, img_size=8, representation_size=6),
    "hybrid": architecture(1, 12, 16, 3, 1, img_size=32, resnet_layers=(1,), resnet_width=32),
    "stem": architecture(2, 12, 16, 3, 1, img_size=32, resnet_layers=(), resnet_width=32),
    "distilled": architecture(2, 12, 16, 3, 2, img_size=8, distilled=True, **META),
    "mae": architecture(2, 12, 16, 3, 2, img_size=8, classifier="patch_mean", **META),
    "cait": architecture(2, 12, 16, 3, 2, img_size=8, class_layers=1, layer_scale=1e-5, **META),
}


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_of_a_run_is_restored(tmp_path, family, wide):
    """Bit for bit, in evaluation mode, for any grid; no random number is drawn."""
    row = FAMILIES[family]
    model = random_model(row, 3, (row.img_size, 2 * row.img_size) if wide else row.img_size)
    path = own_checkpoint(tmp_path / "best.pt", model)
    before = torch.get_rng_state()
    again = load_model(path)
    assert torch.equal(before, torch.get_rng_state())
    assert same_state(model, again) and type(again) is type(model) and again.config == model.config
    assert (again.training, again.classes, again.img_size) == (False, ["c0", "c1", "c2"], model.img_size)
    assert again.load_report.resized == {} and again.load_report.fresh == []
    image = torch.randn(1, 3, *model.img_size)
    assert torch.equal(again(image), model.eval()(image))


def test_an_older_architecture_may_lack_newer_keys(tmp_path):
    model = random_model(FAMILIES["vit"], 3, 8)
    row = {key: value for key, value in model.config.to_dict().items() if key not in sum(LATER_KEYS, ())}
    assert same_state(model, load_model(own_checkpoint(tmp_path / "best.pt", model, architecture=row)))


@pytest.mark.parametrize("grid", [(2, 6), (2, 4)], ids=str)
def test_a_checkpoint_starts_another_task(tmp_path, grid):
    """With a new head; positions are resized from its own grid, which is not square, also to one of as many patches."""
    model = random_model(FAMILIES["vit"], 3, (8, 4))
    path = own_checkpoint(tmp_path / "x.pt", model)
    other = create_model(FAMILIES["vit"], 5, (2 * grid[0], 2 * grid[1]), pretrained=path)
    report = other.load_report
    assert report.resized == {"pos_embed": f"4x2 -> {grid[0]}x{grid[1]}"} and report.fresh == ["head.bias", "head.weight"]
    assert report.left_out[:2] == ["head.bias", "head.weight"] and {"optimizer", "step", "config"} <= set(report.left_out)
    assert not other.head.weight.any() and torch.equal(other.blocks[1].mlp.fc2.weight, model.blocks[1].mlp.fc2.weight)
    assert torch.equal(other.pos_embed, resize_positions(model.pos_embed, (4, 2), grid, "bilinear"))
    same = create_model(FAMILIES["vit"], pretrained=path, head="keep", img_size=(8, 4))
    assert same_state(same, model) and checkpoint_head(path) == (3, 0)


def test_only_checkpoints_of_a_run_are_loaded_as_runs():
    """The public models.load_model opens other files too."""
    refused("not a checkpoint of train.py. .*use create_model", create.load_run_model, reference.TORCH / "deit_tiny.pth")
    refused("not a checkpoint of train.py", create.load_run_model, reference.weights(CASE))
    assert load_model(reference.TORCH / "deit_tiny.pth", num_heads=3).num_classes > 1


@pytest.mark.parametrize("change, message", [
    ({"num_layers": "two"}, "architecture.num_layers 'two': must be 1 or more"),
    ({"num_layers": 1}, "its weights have blocks.1.attn.proj.bias: they do not fit its architecture"),
    ({"hidden_size": 1 << 20, "mlp_dim": 1 << 20, "num_heads": 1}, r"shape \(1, 1, 12\), but .* needs \(1, 1, 1048576\)"),
    ({"mlp_dim": 1 << 30}, "architecture.mlp_dim 1073741824: must be 1 or more, and at most 1048576"),
    ({"hidden_size": 0}, "hidden_size 0: must be 1 or more"),
    ({"colour": "blue"}, "architecture has colour, which this version does not know"),
    ({"classifier": "map"}, "classifier 'map': must be"),
    ({"resnet_layers": torch.tensor([])}, r"architecture.resnet_layers an array of shape \(0,\): must be None, or"),
])
def test_a_false_architecture_is_refused(tmp_path, memory_below, change, message):
    """No memory is allocated for the claimed size."""
    model = random_model(FAMILIES["vit"], 3, 8)
    path = own_checkpoint(tmp_path / "x.pt", model, architecture=model.config.to_dict() | change)
    with memory_below(1 << 25):
        refused(message, load_model, path)


@pytest.mark.parametrize("more, message", [
    ({"config": {"img_size": "x"}}, "."), ({"config": {"img_size": [8, 8, 8]}}, "img_size"),
    ({"config": {"img_size": 1 << 20}}, "pos_embed has shape"), ({"classes": []}, "has no classes"),
    ({"classes": ["a"]}, r"head.weight has shape \(3, 12\)"), ({"architecture": {}}, "architecture lacks patch_size")])
def test_other_false_entries_are_refused(tmp_path, more, message):
    path = own_checkpoint(tmp_path / "x.pt", random_model(FAMILIES["vit"], 3, (8, 4)), **more)
    refused(message, load_model, path)
    if "config" in more:                       # as the start of another task: the grid is unknown
        refused("pos_embed has shape", create_model, FAMILIES["vit"], 5, pretrained=path)


# --------------------------------------------------------------------------------------------------- full size

FULL = {                                    # case: (published model, seed of the weights, largest difference of a logit)
    "full_Ti_16": ("ViT-Ti_16", 3101, 1e-4),
    "full_S_16": ("ViT-S_16", 3102, 1e-4),
    "full_B_16_21kpre": ("ViT-B_16", 3103, 1e-4),
    "full_R_Ti_16": ("R+ViT-Ti_16", 3104, 5e-4),
    "full_R26_S_32": ("R26+ViT-S_32", 3105, 5e-4),
    "full_R50_B_16": ("R50+ViT-B_16", 3106, 5e-4),
}


def weights_of_seed(layout: dict[str, tuple[int, ...]], seed: int) -> dict[str, np.ndarray]:
    """Return the random weights of the expected logits (fixtures/README.md has the rule)."""
    random = np.random.default_rng(seed)
    arrays = {}
    for name in sorted(layout):
        shape = layout[name]
        *_, layer, kind = ["", *name.split("/")]
        x = random.standard_normal(shape, dtype=np.float32)
        if kind == "kernel":
            fan_in = np.prod(shape[:2] if layer == "out" else shape[:1] if layer in ("query", "key", "value") else shape[:-1])
            x *= np.float32((1.5 if layer in ("query", "key") else 1) / np.sqrt(fan_in))
            if layer in ("conv_root", "conv_proj", "conv1", "conv2", "conv3"):
                x *= 0.3 * np.exp(0.7 * random.standard_normal(shape[-1], dtype=np.float32))
        elif kind == "scale":
            x = 1 + np.float32(0.2) * x
        else:
            x *= np.float32({"bias": 0.1, "cls": 0.5, "pos_embedding": 0.2}[kind])
        arrays[name] = x
    return arrays


@pytest.mark.slow
@pytest.mark.parametrize("case", FULL)
@torch.inference_mode()
def test_full_size_models_give_google_s_logits(tmp_path, case):
    published, seed, largest = FULL[case]
    expected = reference.arrays(reference.FIXTURES / "full" / f"{case}_expected.npz")
    layout = {name: shape for name, shape in reference.published_layouts()[published].items()
              if case.endswith("21kpre") or not name.startswith("pre_logits")}
    arrays, path = weights_of_seed(layout, seed), tmp_path / "x.npz"
    checked = ("cls", "embedding/kernel", "Transformer/encoder_norm/bias", "head/kernel")
    sums = [np.abs(arrays[name]).sum(dtype=np.float64) for name in checked]
    np.testing.assert_allclose(sums, expected["param_checksums"], rtol=1e-5)

    np.savez(path, **arrays)
    del arrays
    model = create_model(published.replace("+", "-"), pretrained=path, head="keep").eval()
    path.unlink()                                                    # up to 400 MB
    image = reference.normalize(reference.arrays(reference.FIXTURES / "full" / "image_224.npz")["image"])
    assert np.abs(model(image).numpy() - expected["logits"]).max() < largest
