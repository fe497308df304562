"""Finding the row of a file: from its arrays only, with a typed name, and with parts that no row combines."""

import pytest
import torch
from filling import refused
from headers import header_of

from configs import MODELS
from models import create_model
from models.checkpoints.description import HALF, IMAGENET, Description
from models.match import AmbiguousError, describe_row, match_row

# Files without a config.json that are refused: the other models in the line have the same arrays and another GELU (CLIP), or
# were trained on images that were normalized differently.
ALIKE = [
    ("ViT-Ti_16", "DeiT-Ti_16"), ("ViT-S_16", "DeiT-S_16"), ("ViT-B_16", "DeiT-B_16", "MAE-B_16"), ("ViT-L_16", "MAE-L_16"),
    ("ViT-H_14", "MAE-H_14"), *[(f"CLIP-{size}", f"OpenCLIP-{size}", *[f"PE-core-{size}"] * (size in ("B_16", "L_14")))
                                for size in ("B_32", "B_16", "L_14", "H_14", "bigG_14")]]
# Without a cls token.
ALIKE_MEANS = [("IJEPA-H_14", "MAE-H_14", "ViT-H_14"), ("SigLIP-B_16", "ViT-B_16", "DeiT-B_16", "MAE-B_16")]
# Files without a config.json that are read as another model, which computes the same.
SAME = {"EUPE-S_16": "DINOv3-S_16-qkvb", "EUPE-B_16": "DINOv3-B_16-qkvb", "LingBot-S_16": "DINOv3-S_16-qkvb",
        "LingBot-B_16": "DINOv3-B_16-qkvb", "LingBot-L_16": "DINOv3-L_16-qkvb"}
PLAIN = [name for name, row in MODELS.items() if not row.class_layers and row.resnet_layers is None]


def arrays(name: str, **changes) -> dict[str, torch.Tensor]:
    """Return the arrays of a row at its full size, with a head of three classes, in timm's names."""
    with torch.device("meta"):
        state = create_model(name, 3, num_layers=1, **changes).state_dict()
    return {key.replace("blocks.0.", f"blocks.{i}."): value for key, value in state.items()
            for i in range(MODELS[name].num_layers if key.startswith("blocks.0.") else 1)}


@pytest.mark.parametrize("name", PLAIN)
def test_a_bare_file_gives_its_row_or_the_equal_ones(name):
    file = header_of(arrays(name))
    of_means = name == "IJEPA-H_14"
    others = ALIKE_MEANS[0] if of_means else next((
        names for names in ALIKE if name in names and name[:3] not in ("MAE", "PE-")), ())
    if others:
        with pytest.raises(AmbiguousError) as caught:
            match_row(file)
        assert tuple(caught.value.names) == others and f"MODEL_TYPE={' or '.join(others)}" in str(caught.value)
        assert match_row(file, name)[0] == name
    else:
        assert match_row(file) == (SAME.get(name, name), {})


@pytest.mark.parametrize("names", ALIKE_MEANS, ids=lambda names: names[0])
def test_bare_files_without_a_cls_token(names):
    file = header_of(arrays(names[0], classifier="mean"))
    with pytest.raises(AmbiguousError) as caught:
        match_row(file)
    assert tuple(caught.value.names) == names
    assert match_row(file, names[0]) == (names[0], {} if names[0].startswith("IJEPA") else {"classifier": "mean"})


@pytest.mark.parametrize("classifier", ["patch_mean", "token"])
def test_a_perception_encoder_without_its_pooling_has_the_arrays_of_clip(classifier):
    """As in timm after fine-tuning with another global_pool."""
    with pytest.raises(AmbiguousError, match="CLIP-B_16, OpenCLIP-B_16 and PE-core-B_16"):
        match_row(header_of(arrays("PE-core-B_16", classifier=classifier)))
    assert match_row(header_of(arrays("PE-core-B_16", classifier=classifier)), "PE-core-B_16")[0] == "PE-core-B_16"


def test_a_config_or_a_name_decides_between_equal_arrays():
    state = arrays("ViT-B_16")
    assert match_row(header_of(state, Description(row=dict(HALF)))) == ("ViT-B_16", {})
    assert match_row(header_of(state, Description(row=dict(IMAGENET))))[0] == "DeiT-B_16"
    assert match_row(header_of(state, Description(family="MAE-")))[0] == "MAE-B_16"
    clip = arrays("CLIP-L_14")
    assert match_row(header_of(clip, Description(row={"gelu": "quick"})))[0] == "CLIP-L_14"
    assert match_row(header_of(clip, Description(row={"gelu": "erf"})))[0] == "OpenCLIP-L_14"
    assert match_row(header_of(clip, Description(base="OpenCLIP-L_14")), "CLIP-")[0] == "OpenCLIP-L_14"


def test_a_config_json_wins_over_the_typed_row():
    """The name of its architecture gives what no array shows: GELU, eps, rotary positions and others."""
    state = arrays("CLIP-B_32")
    for said in ({}, {"by_name": True}):
        file = header_of(state, Description(base="CLIP-B_32", **said))
        assert (file.computed["gelu"], file.computed["norm_eps"]) == ("quick", 1e-5)
        assert "mean" not in file.computed
    assert header_of(arrays("OpenCLIP-B_16"), Description(base="CLIP-B_32", by_name=True)).computed.get("gelu") is None
    assert header_of(state, Description(base="CLIP-B_32", row={"gelu": "tanh"})).computed["gelu"] == "tanh"


def test_the_typed_size_decides_which_tokens_have_positions():
    """24 patches and a cls token are as many as a square of 5 x 5."""
    with torch.device("meta"):
        file = header_of(create_model("DeiT-Ti_16", 3, (64, 96)).state_dict())
    assert file.row["positions"] == "patches"
    for size, only, kind in (((64, 96), "patches", "patches"), ((64, 64), "all", "patches"), ((64, 96), "all", "all")):
        file.expect(size, only)
        assert file.row["positions"] == kind
    assert match_row(file, "DeiT-Ti_16")[0] == "DeiT-Ti_16"
    said = header_of({"cls_token": torch.empty(1)}, Description(row={"img_size": 80}))
    said.expect((64, 96), "all")
    assert said._expected == ()


def test_missing_additional_and_misshapen_arrays_fit_no_row():
    """Even one register less is refused."""
    state = arrays("DINOv3-S_16")
    fewer = state | {"reg_token": torch.empty(1, 3, 384, device="meta")}
    refused("no model of configs.py has all of its parts.* nearest is DINOv3-S_16; the file has registers 3, not 4. If",
            match_row, header_of(fewer))
    none = {name: value for name, value in state.items() if name != "reg_token"}
    refused("nearest is DINOv3-S_16; the file has registers 0, not 4. If", match_row, header_of(none))
    lingbot = arrays("LingBot-S_16") | {"reg_token": torch.empty(1, 3, 384, device="meta")}
    refused("nearest is LingBot-S_16; the file has registers 3", match_row, header_of(lingbot), "LingBot-S_16")
    with torch.device("meta"):
        wide = create_model("ViT-Ti_16", 3, (64, 96), num_layers=12).state_dict()
    refused("positions patches, not all. .* or, if its images are not square, add --model_type and --img_size", match_row,
            header_of(wide))
    both = arrays("DINOv2-S_14") | {"norm_pre.weight": torch.empty(384), "norm_pre.bias": torch.empty(384)}
    refused("pre_norm True", match_row, header_of(both))
    name, keys = match_row(header_of(arrays("DINOv2-S_14", mlp_dim=1000)))
    assert (name, keys["mlp_dim"]) == ("DINOv2-S_14", 1000) and "num_heads" not in keys


def test_parts_that_no_row_has_need_a_description():
    """As in transformers' DeiTForImageClassification, where no head reads the second token."""
    state = arrays("DeiT-S_16", registers=1)
    said = {"hidden_size": 384, "gelu": "erf", "norm_eps": 1e-12, "num_heads": 6}
    name, keys = match_row(header_of(state, Description(row=said, family="DeiT-")))
    assert (name, keys) == ("DeiT-S_16", {"registers": 1})
    refused("registers 1", match_row, header_of(state))


@pytest.mark.parametrize("name, keys, size, words", [
    ("DINOv2-S_14-reg", {}, None, "DINOv2 ViT-S/14, 4 registers, 518 px"), ("ViT-B_16", {}, 384, "ViT-B/16, 384 px"),
    ("DINOv3-S+_16", {}, None, "DINOv3 ViT-S+/16, 4 registers, SwiGLU, 256 px"), ("CaiT-XXS24", {}, None, "CaiT-XXS24, 224 px"),
    ("TIPSv2-B_14", {}, (448, 224), "TIPSv2 ViT-B/14, 1 register, 448 x 224 px"),
    ("SigLIP-SO400M_14", {"classifier": "mean"}, 378, "SigLIP ViT-SO400M/14, mean of the patches, 378 px"),
    ("PE-core-G_14", {}, None, "PE-core ViT-G/14, pooling by attention, 448 px"),
    ("ViT-S_16", {"hidden_size": 40, "num_layers": 1, "patch_size": 4}, 8, "ViT (width 40, 1 block, patch 4), 8 px"),
    ("ViT-B_16", {"num_heads": 6}, None, "ViT-B/16 with 6 heads, 224 px")])
def test_a_model_is_described_in_words(name, keys, size, words):
    assert describe_row(name, keys, size) == words
