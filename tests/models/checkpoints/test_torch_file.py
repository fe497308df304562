"""Files of torch.save: all that our runs and published ones hold comes back as it was, all else is one line."""

import argparse
import dataclasses
import io
import pickle
import pickletools
import struct
import time
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from test_pickle_scan import HOSTILE, STORAGE, step_by_step

from models import ModelError
from models.checkpoints.torch_file import LEGACY_MAGIC, read
from utils.run.checkpoint import RunState

FIXTURES = Path(__file__).parents[2] / "fixtures" / "torch_formats"


def same(one, other) -> bool:
    """To the type and the bit."""
    if type(one) is not type(other):
        return False
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and one.shape == other.shape and torch.equal(one, other)
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def saved(path: Path, content, legacy: bool = False) -> Path:
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    return path


def refused(path: Path, message: str, *classes: type) -> None:
    for mapped in (False, True):
        started = time.perf_counter()
        with pytest.raises(ModelError, match=message) as error:
            read(path, classes, mapped)
        text = str(error.value)
        assert text.isprintable() and str(path) in text and len(text) < 500 and time.perf_counter() - started < 5


def rezipped(source: Path, path: Path, edit=lambda name, data: data) -> Path:
    """A copy with other members, whose check sums agree."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(path, "w") as new:
        for info in old.infolist():
            new.writestr(info.filename, edit(info.filename, old.read(info)))
    return path


def with_pickle(tmp_path: Path, description: bytes) -> Path:
    """A whole file of torch.save with another description of its content; it has one storage of eight numbers, "0"."""
    source = saved(tmp_path / "source.pt", torch.zeros(8))
    return rezipped(source, tmp_path / "x.pt", lambda name, data: description if name.endswith("data.pkl") else data)


# ------------------------------------------------------------------------------------------------ what is read


def run_state(optimizer: str) -> RunState:
    model = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.LayerNorm(5), torch.nn.Linear(5, 3, bias=False))
    stepped = {"sgd": lambda of: torch.optim.SGD(of, 0.1, momentum=0.9), "adamw": torch.optim.AdamW,
               "lamb": lambda of: pytest.importorskip("timm.optim").Lamb(of)}[optimizer](model.parameters())
    for _ in range(2):
        model(torch.randn(4, 6)).square().sum().backward()
        stepped.step()
    scaler = torch.amp.GradScaler("cpu").state_dict()
    more = {"half": torch.randn(4).half(), "brain": torch.randn(4).bfloat16(), "double": torch.randn(2).double(),
            "whole": torch.arange(3), "bytes": torch.get_rng_state()[:9], "flag": torch.tensor([True]), "none": torch.zeros(0, 4)}
    return RunState(step=7, updates=6, skips=1, model=model.state_dict(), optimizer=stepped.state_dict(), scaler=scaler,
                    best={"step": 3, "accuracy": 0.5}, first={}, config={"lr": 1e-3, "betas": (0.9, 0.999), "edits": None},
                    architecture={"patch_size": 4, "name": "ü"}, classes=["a", "b"], train_images=9, seconds=1.5, ema=more)


@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "lamb"])
def test_what_a_run_saves_comes_back_as_it_was(tmp_path, optimizer, legacy, mapped):
    content = dict(vars(run_state(optimizer)))
    assert content.keys() >= {field.name for field in dataclasses.fields(RunState)}
    path = saved(tmp_path / "x.pt", content, legacy)
    made = read(path, mapped=mapped)
    assert same(made, content) and same(made, torch.load(path, weights_only=True))
    assert made["model"]._metadata == content["model"]._metadata


def test_what_is_not_mapped_stays_when_the_file_goes(tmp_path):
    path = saved(tmp_path / "x.pt", {"a": torch.full((100_000,), 7.0)})
    made = read(path)["a"]
    with open(path, "r+b") as stream:
        stream.write(bytes(path.stat().st_size))
    assert made.min() == made.max() == 7


@pytest.mark.parametrize("name", [path.name for path in sorted(FIXTURES.glob("*.pth"))])
def test_published_files_come_back_as_pytorch_reads_them(name):
    with torch.serialization.safe_globals([argparse.Namespace]):
        expected = torch.load(FIXTURES / name, weights_only=True)
    assert same(read(FIXTURES / name, [argparse.Namespace]), expected)


def test_what_two_names_share_is_shared(tmp_path):
    whole = torch.randn(4, 6)
    made = read(saved(tmp_path / "x.pt", {"a": whole, "b": whole, "row": whole[1]}))
    made["a"].zero_()
    assert made["b"].count_nonzero() == made["row"].count_nonzero() == 0


def test_classes_must_be_named(tmp_path):
    path = saved(tmp_path / "x.pt", {"args": argparse.Namespace(lr=0.1)})
    assert read(path, [argparse.Namespace])["args"].lr == 0.1
    refused(path, "asks for argparse.Namespace, which no file of weights needs: nothing was run")


# ---------------------------------------------------------------------------------------------------- hostile


def test_a_storage_larger_than_its_member_is_not_read(tmp_path):
    """PyTorch would read what stands behind it in memory, or take a TB first."""
    for claimed in (b"K\x09", b"K\x07", b"J\xff\xff\xff\x7f"):
        refused(with_pickle(tmp_path, step_by_step(STORAGE.replace(b"K\x08", claimed))), "speaks of [0-9]+ bytes .* has 32")
    refused(with_pickle(tmp_path, step_by_step(STORAGE.replace(b"X\x01\x00\x00\x000", b"X\x01\x00\x00\x001"))), "is not there")


@pytest.mark.parametrize("case", ["bytearray", "tuples_to_hash", "deep_tuple", "one_number_a_million_times",
                                  "beyond_the_storage", "overflow", "sparse", "protocol_4"])
def test_hostile_descriptions_end_before_memory_is_taken(tmp_path, memory_below, case):
    with memory_below(400 << 20):
        refused(with_pickle(tmp_path, HOSTILE[case]), "asks for|no file of weights|damaged|numbers of which")


def inside_itself() -> list:
    made: list = []
    made.append(made)
    return made


def doubled_lists() -> list:
    made: list = ["x"]
    for _ in range(60):
        made = [made, made]
    return made


def nested(depth: int, inner=1) -> list:
    made = inner
    for _ in range(depth):
        made = [made]
    return made


def dictionary_with_its_own_items() -> OrderedDict:
    made = OrderedDict(a=torch.ones(2))
    made.items = torch.Size
    return made


@pytest.mark.parametrize("content, message", [
    (inside_itself(), "lists within lists without end"),
    ({"format": doubled_lists()}, "lists within lists without end"),
    (nested(300), "lists within lists without end"),
    ([nested(60), [nested(60, inner := nested(60)), inner]], "lists within lists without end"),
    (dictionary_with_its_own_items(), "a dictionary with attributes"),
    ({"a": torch.ones(2, dtype=torch.complex64)}, "a is no plain array of numbers"),
    ({"a": torch.ones(1).expand(10 ** 12)}, "numbers of which 1 are there"),
    ({"a": b"bytes"}, "asks for _codecs.encode"),
    ({"a": torch.nn.Linear(2, 2)}, "asks for torch.nn.modules.linear.Linear"),
])
@pytest.mark.parametrize("legacy", [False, True])
def test_contents_that_are_no_weights(tmp_path, content, message, legacy):
    refused(saved(tmp_path / "x.pt", content, legacy), message)


def test_names_that_would_not_fit_on_one_line(tmp_path):
    path = saved(tmp_path / "x.pt", {"a\nb\x1b[2J" * 1000: torch.ones(1, dtype=torch.complex64)})
    refused(path, "is no plain array of numbers")


def patched(path: Path, offset: int, layout: str, value: int, signature: bytes = b"PK\x01\x02") -> Path:
    data = bytearray(path.read_bytes())
    struct.pack_into(layout, data, data.index(signature) + offset, value)
    path.write_bytes(data)
    return path


def test_a_member_that_calls_itself_a_folder(tmp_path):
    """PyTorch would hand out the memory that it meant to read into, as it finds it."""
    refused(patched(saved(tmp_path / "x.pt", torch.ones(8)), 38, "<I", 0x10), "calls itself a folder")


def test_members_of_two_folders(tmp_path):
    path = saved(tmp_path / "x.pt", torch.ones(8))
    with zipfile.ZipFile(path, "a") as file:
        file.writestr("y/data/0", bytes(32))
    refused(path, "is not in the folder of the others")


def test_no_description_or_a_huge_one(tmp_path, monkeypatch):
    path = saved(tmp_path / "x.pt", torch.ones(8))
    monkeypatch.setattr("models.checkpoints.torch_file.MAX_PICKLE", 10)
    refused(path, "a description of [0-9]+ bytes")
    with zipfile.ZipFile(tmp_path / "y.pt", "w") as file:
        file.writestr("y/version", b"3")
    refused(tmp_path / "y.pt", "holds no data.pkl")


def test_check_sums_are_compared_unless_there_are_none(tmp_path):
    path = saved(tmp_path / "x.pt", torch.full((100,), 7.0))
    old, new = (struct.pack("<f", value) * 100 for value in (7, 8))
    path.write_bytes(path.read_bytes().replace(old, new))
    refused(path, "CRC")
    torch.serialization.set_crc32_options(False)
    try:
        assert read(saved(path, torch.full((100,), 7.0))).min() == 7
    finally:
        torch.serialization.set_crc32_options(True)


def test_not_enough_memory_is_said(tmp_path, monkeypatch):
    path = saved(tmp_path / "x.pt", torch.ones(2))
    monkeypatch.setattr(torch, "load", lambda *_, **__: bytearray(1 << 62))
    refused(path, "not enough memory to read it")


# ---------------------------------------------------------------------------------------------- the older format


def legacy_parts(content) -> list[bytes]:
    """The five pickles, and what follows them."""
    stream = io.BytesIO()
    torch.save(content, stream, _use_new_zipfile_serialization=False)
    stream.seek(0)
    parts = []
    for _ in range(5):
        start = stream.tell()
        for _ in pickletools.genops(stream):
            pass
        parts.append(stream.getvalue()[start:stream.tell()])
    return [*parts, stream.read()]


@pytest.mark.parametrize("case, message", [
    ("more_behind", "its arrays end at"), ("less", "cut off"), ("other_number", "that are not there"),
    ("no_keys", "not those that it"), ("twice", "not those that it"), ("not_a_list", "not those that it"),
    ("no_content", "damaged or cut off"), ("other_magic", "did not write")])
def test_older_files_whose_parts_do_not_agree(tmp_path, case, message):
    parts = legacy_parts(torch.arange(8.0))
    path, keys = tmp_path / "x.pt", pickle.loads(parts[4])
    path.write_bytes(b"".join(parts))
    assert torch.equal(read(path), torch.arange(8.0))
    changed = {"more_behind": parts + [b"\0"], "less": parts[:-1] + [parts[-1][:-1]],
               "other_number": parts[:-1] + [b"\x09" + parts[-1][1:]], "no_keys": parts[:4] + [pickle.dumps([], 2), parts[5]],
               "twice": parts[:4] + [pickle.dumps(keys * 2, 2), parts[5] * 2],
               "not_a_list": parts[:4] + [pickle.dumps(keys[0], 2), parts[5]], "no_content": parts[:3] + parts[4:],
               "other_magic": [LEGACY_MAGIC.replace(b"\x6c", b"\x6d"), *parts[1:]]}[case]
    path.write_bytes(b"".join(changed))
    refused(path, message)


# ---------------------------------------------------------------------------------------------------- no files


def test_no_file_of_torch_save(tmp_path):
    path = tmp_path / "x.pt"
    for content, message in ((b"", "not of torch.save"), (b"text", "not of torch.save"), (b"PK\x03\x04", "damaged"),
                             (pickle.dumps({"a": 1}, 2), "did not write")):
        path.write_bytes(content)
        refused(path, message)
    refused(tmp_path / "absent.pt", "no such file")
    refused(tmp_path, "no such file")
