"""Inferring the architecture of a file from names and shapes."""

import pytest
import reference
import torch
from filling import random_model, refused
from headers import header_of

from configs import MODELS, architecture
from models import create_model, save_npz, save_timm
from models.checkpoints.description import IMAGENET, Description
from models.checkpoints.infer import ARRAYS, SIZES, candidates
from models.checkpoints.opened import OpenedCheckpoint
from models.match import match_row

DETERMINED = ("patch_size", "hidden_size", "mlp_dim", "num_layers", "in_channels", "distilled", "class_layers", "resnet_layers",
        "resnet_width")


def row_of(path) -> dict:
    with OpenedCheckpoint(path) as file:
        return file.row


@pytest.mark.parametrize("case", reference.ROWS)
def test_google_s_files_show_the_whole_architecture(case):
    row, found = reference.ROWS[case], row_of(reference.weights(case))
    keys = (*DETERMINED, "num_heads", "img_size")
    assert {key: found[key] for key in keys} == {key: row[key] for key in keys}
    assert found.get("classifier", "token") == row.classifier


@pytest.mark.parametrize("case", reference.TORCH_ROWS)
def test_published_files_of_pytorch_give_their_row(case):
    row, found = reference.TORCH_ROWS[case], row_of(reference.TORCH / reference.TORCH_FILES[case])
    assert {key: found[key] for key in (*DETERMINED, "img_size")} == {key: row[key] for key in (*DETERMINED, "img_size")}
    assert found.get("num_heads") == (4 if case == "cait" else None)
    assert found.get("classifier", "token") == row.classifier


@pytest.mark.parametrize("save, name", [(save_npz, "x.npz"), (save_timm, "x.pth")])
@pytest.mark.parametrize("layers", [(), (1, 2, 1)])
def test_hybrids_are_inferred_in_both_layouts(tmp_path, save, name, layers):
    row = architecture(1, 32, 64, 2, 1, img_size=64, resnet_layers=layers, resnet_width=32, in_channels=1)
    save(random_model(row, 3), tmp_path / name)
    found = row_of(tmp_path / name)
    assert {key: found[key] for key in (*DETERMINED, "img_size")} == {key: row[key] for key in (*DETERMINED, "img_size")}


@pytest.mark.parametrize("name", ["ViT-S_16", "DeiT-Ti_16-distilled", "CaiT-XXS24", "MAE-B_16", "R26-ViT-S_32"])
def test_a_published_size_is_recognized(name):
    """By the shapes in its header, without memory for the arrays."""
    with torch.device("meta"):
        state = create_model(name, 3).state_dict()
    assert match_row(header_of(state), name) == (name, {})
    if name == "ViT-S_16":                       # a DeiT's file has the same shapes
        assert match_row(header_of(state), "DeiT-") == ("DeiT-S_16", {})
        assert match_row(header_of(state, Description(row=IMAGENET))) == ("DeiT-S_16", {})
        refused("MODEL_TYPE=ViT-S_16 or DeiT-S_16", match_row, header_of(state))
    else:
        assert match_row(header_of(state), "ViT-B_16") == match_row(header_of(state)) == (name, {})


def test_an_unpublished_size_needs_the_number_of_heads(tmp_path):
    torch.save(random_model(architecture(4, 24, 40, 2, 1, img_size=8, in_channels=1), 3).state_dict(), tmp_path / "x.pth")
    sizes = {"patch_size": 4, "hidden_size": 24, "mlp_dim": 40, "num_layers": 1, "in_channels": 1}
    with OpenedCheckpoint(tmp_path / "x.pth") as file:
        assert match_row(file, "MAE-B_16") == ("MAE-B_16", sizes)
        assert match_row(file, "ViT-", 2) == ("ViT-Nano_2", sizes | {"num_heads": 2})
        assert match_row(file, "CaiT-S24", 2) == ("ViT-Nano_2", sizes | {"num_heads": 2})       # it has the nearest width


# Rows whose files have the same names and shapes. All other rows are unique.
ALIKE = (
    ("ViT-Ti_16", "DeiT-Ti_16"), ("ViT-S_16", "DeiT-S_16"), ("ViT-B_16", "DeiT-B_16", "MAE-B_16"), ("ViT-L_16", "MAE-L_16"),
    ("ViT-H_14", "MAE-H_14"),                                               # GELU and images
    ("DINOv3-S_16-qkvb", "EUPE-S_16", "LingBot-S_16"), ("DINOv3-B_16-qkvb", "EUPE-B_16", "LingBot-B_16"),
    ("DINOv3-L_16-qkvb", "LingBot-L_16"),                                   # only the size of the images
    ("CLIP-B_16", "OpenCLIP-B_16", "PE-core-B_16"), ("CLIP-L_14", "OpenCLIP-L_14", "PE-core-L_14"),
    ("CLIP-B_32", "OpenCLIP-B_32"), ("CLIP-H_14", "OpenCLIP-H_14"),
    ("CLIP-bigG_14", "OpenCLIP-bigG_14"),                                   # GELU; PE's rotary positions
    ("EVA-g_14", "EVA-g_14-clip"),                                          # what the head reads, which fc_norm shows
    ("ViT-H_14", "MAE-H_14", "IJEPA-H_14"),                                 # without a cls token, like the next
)
WITHOUT_POOLING = {
    "SigLIP-B_16": ["ViT-B_16", "MAE-B_16", "SigLIP-B_16"], "SigLIP-L_16": ["ViT-L_16", "MAE-L_16", "SigLIP-L_16"],
    "SigLIP-B_32": ["ViT-B_32", "SigLIP-B_32"], "SigLIP-SO400M_14": ["SigLIP-SO400M_14"], "SigLIP-gopt_16": ["SigLIP-gopt_16"],
    "PE-core-B_16": ["CLIP-B_16", "OpenCLIP-B_16", "PE-core-B_16"], "PE-core-G_14": ["PE-core-G_14"]}


def rows_like(name: str, **more) -> list[str]:
    """Return the candidates for a file in timm's names."""
    with torch.device("meta"):
        state = dict(create_model(name, 3, num_layers=1, **more).state_dict())
    return candidates(header_of(state).row | {"num_layers": MODELS[name].num_layers}, MODELS)


def test_candidates_for_a_bare_file():
    for name in MODELS:
        others = {row for group in ALIKE if name in group for row in group} if MODELS[name].class_token else ALIKE[-1]
        found = rows_like(name)
        assert name in found and (found == [name] or set(found) <= set(others)), (name, found)
    for name, expected in WITHOUT_POOLING.items():
        assert [row for row in rows_like(name, classifier="mean") if "DeiT" not in row] == expected


def test_candidates_of_any_size():
    found = {key: MODELS["DINOv2-S_14-reg"][key] for key in (*ARRAYS, *SIZES, "resnet_layers", "resnet_width")}
    assert candidates(found, MODELS) == ["DINOv2-S_14-reg"]
    custom = candidates(found | {"hidden_size": 100}, MODELS, sizes=False)
    assert custom == ["DINOv2-S_14-reg", "DINOv2-B_14-reg", "DINOv2-L_14-reg"]
    assert candidates(found | {"num_heads": 7}, MODELS) == []
