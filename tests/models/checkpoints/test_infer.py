"""The architecture of a file, from names and shapes."""

import pytest
import reference
import torch
from filling import random_model, refused
from headers import header_of

from configs import MODELS, architecture
from models import create_model, save_npz, save_timm
from models.checkpoints.description import IMAGENET, Description
from models.checkpoints.opened import OpenedCheckpoint
from models.match import match_row

TOLD = ("patch_size", "hidden_size", "mlp_dim", "num_layers", "in_channels", "distilled", "class_layers", "resnet_layers",
        "resnet_width")


def row_of(path) -> dict:
    with OpenedCheckpoint(path) as file:
        return file.row


@pytest.mark.parametrize("case", reference.ROWS)
def test_google_s_files_tell_all_of_it(case):
    row, found = reference.ROWS[case], row_of(reference.weights(case))
    keys = (*TOLD, "num_heads", "img_size")
    assert {key: found[key] for key in keys} == {key: row[key] for key in keys}
    assert found.get("classifier", "token") == row.classifier


@pytest.mark.parametrize("case", reference.TORCH_ROWS)
def test_published_files_of_pytorch(case):
    row, found = reference.TORCH_ROWS[case], row_of(reference.TORCH / reference.TORCH_FILES[case])
    assert {key: found[key] for key in (*TOLD, "img_size")} == {key: row[key] for key in (*TOLD, "img_size")}
    assert found.get("num_heads") == (4 if case == "cait" else None)
    assert found.get("classifier", "token") == row.classifier


@pytest.mark.parametrize("save, name", [(save_npz, "x.npz"), (save_timm, "x.pth")])
@pytest.mark.parametrize("layers", [(), (1, 2, 1)])
def test_hybrids_in_both_layouts(tmp_path, save, name, layers):
    row = architecture(1, 32, 64, 2, 1, img_size=64, resnet_layers=layers, resnet_width=32, in_channels=1)
    save(random_model(row, 3), tmp_path / name)
    found = row_of(tmp_path / name)
    assert {key: found[key] for key in (*TOLD, "img_size")} == {key: row[key] for key in (*TOLD, "img_size")}


@pytest.mark.parametrize("name", ["ViT-S_16", "DeiT-Ti_16-distilled", "CaiT-XXS24", "MAE-B_16", "R26-ViT-S_32"])
def test_a_published_size_is_recognised(name):
    """By the shapes in its header: it takes no memory."""
    with torch.device("meta"):
        state = create_model(name, 3).state_dict()
    assert match_row(header_of(state), name) == (name, {})
    if name == "ViT-S_16":                       # a DeiT's file differs in no shape
        assert match_row(header_of(state), "DeiT-") == ("DeiT-S_16", {})
        assert match_row(header_of(state, Description(row=IMAGENET))) == ("DeiT-S_16", {})
        refused("MODEL_TYPE=ViT-S_16 or MODEL_TYPE=DeiT-S_16", match_row, header_of(state))
    else:
        assert match_row(header_of(state), "ViT-B_16") == match_row(header_of(state)) == (name, {})


def test_a_size_of_its_own_needs_its_heads(tmp_path):
    torch.save(random_model(architecture(4, 24, 40, 2, 1, img_size=8, in_channels=1), 3).state_dict(), tmp_path / "x.pth")
    sizes = {"patch_size": 4, "hidden_size": 24, "mlp_dim": 40, "num_layers": 1, "in_channels": 1}
    with OpenedCheckpoint(tmp_path / "x.pth") as file:
        assert match_row(file, "MAE-B_16") == ("MAE-B_16", sizes)
        assert match_row(file, "ViT-", 2) == (next(iter(MODELS)), sizes | {"num_heads": 2})
        assert match_row(file, "CaiT-S24", 2) == (next(iter(MODELS)), sizes | {"num_heads": 2})
