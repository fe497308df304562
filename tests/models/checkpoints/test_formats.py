"""Files of weights of every kind: the content determines it, nothing is executed, damage is one line."""

import argparse
import struct
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from filling import save_arrays
from safetensors.torch import save_file
from weight_files import saved

from configs import MODELS
from models.checkpoints.formats import open_weights
from models.checkpoints.torch_file import LEGACY_MAGIC
from models.errors import WeightsError

WEIGHTS = {"patch_embed.proj.weight": torch.arange(48.0).reshape(4, 3, 2, 2), "head.bias": torch.randn(5),
           "cls_token": torch.zeros(1, 1, 4)}


legacy = partial(saved, legacy=True)
KINDS = {"npz": lambda path, weights: save_arrays(path, {name: value.numpy() for name, value in weights.items()}),
         "zipped": saved, "legacy": legacy, "safetensors": lambda path, weights: save_file(weights, path) or path}


def read_all(path: Path) -> dict[str, torch.Tensor]:
    with open_weights(path) as file:
        for name in file.names:
            assert file.shape(name) == tuple(file.read(name).shape)
        return {name: file.read(name) for name in file.names}


def refused(path: Path, message: str) -> None:
    with pytest.raises(WeightsError, match=message) as error:
        read_all(path)
    text = str(error.value)
    assert "\n" not in text and str(path) in text and len(text) < 500


@pytest.mark.parametrize("suffix", ["npz", "pth", "pt", "bin", "safetensors", "weights"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_content_and_not_the_name_determines_the_kind(tmp_path, kind, suffix):
    read = read_all(KINDS[kind](tmp_path / f"x.{suffix}", WEIGHTS))
    assert read.keys() == WEIGHTS.keys()
    assert all(torch.equal(read[name], WEIGHTS[name]) for name in WEIGHTS)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.int64])
@pytest.mark.parametrize("kind", ["zipped", "legacy", "safetensors"])
def test_other_number_formats_are_read_as_float32(tmp_path, kind, dtype):
    value = torch.tensor([1.5, -2.25, 3e-3, 700.0]).to(dtype)
    read = read_all(KINDS[kind](tmp_path / "x", {"a": value}))["a"]
    assert read.dtype == torch.float32 and torch.equal(read, value.float())


@pytest.mark.parametrize("place", ["model", "state_dict", "model_state_dict", "model_ema", "state_dict_ema", "ema"])
@pytest.mark.parametrize("save", [saved, legacy])
def test_weights_in_an_entry_are_found(tmp_path, place, save):
    """With other entries, as in DeiT's and MAE's files: the optimizer, the epoch, the flags."""
    others = {"optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}}, "epoch": 3, "args": argparse.Namespace(lr=1e-3, name="x")}
    with open_weights(save(tmp_path / "x", {**others, place: WEIGHTS})) as file:
        assert file.names == list(WEIGHTS) and file.left_out == ["args", "epoch", "optimizer"] and file.run is None


def test_entries_that_are_no_weights_are_ignored(tmp_path):
    """Averaged weights in addition to the model's, plain values, names that are not text."""
    other = {name: value + 1 for name, value in WEIGHTS.items()}
    with open_weights(saved(tmp_path / "x", {"model_ema": other, "ema": other, "model": WEIGHTS})) as file:
        assert torch.equal(file.read("head.bias"), WEIGHTS["head.bias"]) and file.left_out == ["ema", "model_ema"]
    for content in ({3: torch.ones(2), "4": 1}, {"model": {3: torch.ones(2)}, 5: 6}, {**own(), 7: 8}):
        read_all(saved(tmp_path / "x", content))
    with open_weights(saved(tmp_path / "x", [WEIGHTS])) as file:
        assert file.names == list(WEIGHTS) and file.left_out == []
    with open_weights(saved(tmp_path / "x", {**WEIGHTS, "epoch": 3, "model": "ViT"})) as file:
        assert file.names == list(WEIGHTS) and file.left_out == ["epoch", "model"]
    with open_weights(saved(tmp_path / "x", {"model": {**WEIGHTS, "none": None}, "epoch": 3})) as file:
        assert file.names == list(WEIGHTS) and file.left_out == ["epoch", "none"]


@pytest.mark.parametrize("content, message", [
    (torch.ones(3), "holds a Tensor, not weights by name; save model.state_dict"),
    ([WEIGHTS, WEIGHTS], "holds a list, not weights by name"),
    (torch.nn.Linear(2, 2), "holds a torch.nn.modules.linear.Linear, not weights by name"),
    ({}, "holds no arrays"),
    ({"epoch": 3, "model": {}}, "holds no arrays .its entries: epoch, model"),
    ({"a": torch.ones(3).to_sparse(), "b": torch.ones(3, dtype=torch.complex64)}, "holds no arrays .its entries: a, b"),
])
def test_contents_that_are_no_weights_are_refused(tmp_path, content, message):
    refused(saved(tmp_path / "x.pth", content), message)


@pytest.mark.parametrize("save", [saved, legacy])
def test_numpy_arrays_are_weights(tmp_path, save):
    arrays = {name: value.double().numpy() for name, value in WEIGHTS.items()}
    with open_weights(save(tmp_path / "x", {"model": arrays, "accuracy": np.float64(3), "best": np.array([{}])})) as file:
        assert file.left_out == ["accuracy", "best"]
        assert all(torch.equal(file.read(name), value) and file.shape(name) == value.shape for name, value in WEIGHTS.items())


def own(**more) -> dict:
    """Return a checkpoint without what only a resumed run needs."""
    return {"format": "vit-run-1", "model": WEIGHTS, "architecture": MODELS["ViT-Nano_2"].to_dict(), "classes": ["a", "b"],
            "config": {"img_size": 8}, "optimizer": {}, "step": 3, **more}


def test_a_checkpoint_of_our_own_is_read(tmp_path):
    with open_weights(saved(tmp_path / "x.pt", own(train_images=9))) as file:
        assert file.run == {"architecture": MODELS["ViT-Nano_2"].to_dict(), "classes": ["a", "b"], "config": {"img_size": 8},
                            "step": 3, "train_images": 9, "data": None, "license": None}
        assert file.left_out == sorted(own(train_images=9).keys() - {"model"}) and file.notes == []


@pytest.mark.parametrize("ema", [{}, {name: value + 1 for name, value in WEIGHTS.items()}])
def test_its_averaged_weights_are_preferred(tmp_path, ema):
    config = {"img_size": 8, "ema_decay": 0.9 if ema else 0.0}
    with open_weights(saved(tmp_path / "x.pt", own(ema=ema, config=config))) as file:
        assert torch.equal(file.read("head.bias"), WEIGHTS["head.bias"] + (1 if ema else 0))
        assert file.notes == (["averaged weights (ema)"] if ema else [])
        assert ("model" in file.left_out, "ema" in file.left_out) == (bool(ema), not ema)


@pytest.mark.parametrize(("more", "message"), [
    ({"model": None}, "model None: must be a dictionary"), ({"architecture": 3}, "architecture 3: must be a dictionary"),
    ({"config": None}, "config None: must be"), ({"classes": "ab"}, "classes 'ab': must be a list"),
    ({"classes": [["a"]]}, "classes.0 a list of 1: must be text"), ({"ema": torch.ones(3)}, "ema an array of shape"),
    ({"step": "3"}, "step '3': must be 0 or more"), ({"format": "vit-run-0"}, "not a checkpoint of this version")])
def test_a_checkpoint_of_our_own_with_wrong_fields_is_refused(tmp_path, more, message):
    refused(saved(tmp_path / "x.pt", own(**more)), message)


def header(text: bytes, length: int | None = None, data: bytes = bytes(16)) -> bytes:
    return struct.pack("<Q", len(text) if length is None else length) + text + data


ENTRY = b'{"a":{"dtype":"F32","shape":[%s],"data_offsets":[%s]}}'


@pytest.mark.parametrize("content", [
    header(ENTRY % (b"4", b"0,16"), length=1 << 30),
    header(ENTRY % (b"1099511627776", b"0,4398046511104")),
    header(ENTRY % (b"400", b"0,16")),
    header(ENTRY % (b"4", b"16,0")),
    header(ENTRY % (b"18446744073709551615,2", b"0,16")),
    header(b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]},"b":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}'),
    header(b'{"a":{"dtype":"PICKLE","shape":[4],"data_offsets":[0,16]}}'),
    header(b"{" * 5000),
    header(b"{\xff\xfe}"),
])
def test_false_headers_of_safetensors_are_refused(tmp_path, content):
    (tmp_path / "x.safetensors").write_bytes(content)
    refused(tmp_path / "x.safetensors", "damaged or cut off .*write or copy it again")


@pytest.mark.parametrize("kind, count", [("C64", b"2"), ("F8_E4M3", b"16")])
def test_types_that_are_no_weights_are_refused(tmp_path, kind, count):
    (tmp_path / "x").write_bytes(header((ENTRY % (count, b"0,16")).replace(b"F32", kind.encode())))
    refused(tmp_path / "x", f"a holds {kind}, not plain numbers")


@pytest.mark.parametrize("name", ["a\nb", "\x1b[2J", "x" * 2000])
@pytest.mark.parametrize("kind", KINDS)
def test_names_that_do_not_fit_on_one_line_are_refused(tmp_path, kind, name):
    refused(KINDS[kind](tmp_path / "y", {name: torch.ones(2)}), "is not a name of an array|not a readable")


@pytest.mark.parametrize("content, message", [
    (b"", "the file is empty; write or copy it again"),
    (b"<!DOCTYPE html><html><body>Sign in</body></html>", "a web page instead of weights"),
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n", "a pointer of Git LFS.*git lfs pull"),
    (b'{"error": "not found"}', r"not a file of weights \(.npz, PyTorch or .safetensors\)"),
    (bytes(1000), "not a file of weights"),
    (b"PK\x03\x04" + bytes(100), "damaged or cut off|not a readable"),
    (b"\x80", "a pickle that PyTorch did not write"),
    (LEGACY_MAGIC, "damaged or cut off"),
])
@pytest.mark.parametrize("suffix", [".npz", ".pth", ".safetensors"])
def test_other_files_are_refused(tmp_path, content, message, suffix):
    (tmp_path / f"x{suffix}").write_bytes(content)
    refused(tmp_path / f"x{suffix}", message)


def test_a_folder_and_a_missing_file_are_refused(tmp_path):
    for path in (tmp_path, tmp_path / "absent.pth"):
        refused(path, "no checkpoint at .*: expected a file of weights")


def test_the_package_safetensors_is_needed_only_for_its_files(tmp_path, monkeypatch):
    paths = {kind: save(tmp_path / kind, WEIGHTS) for kind, save in KINDS.items()}
    monkeypatch.setitem(sys.modules, "safetensors", None)
    for kind in ("npz", "zipped", "legacy"):
        assert read_all(paths[kind]).keys() == WEIGHTS.keys()
    refused(paths["safetensors"], "pip install safetensors")
