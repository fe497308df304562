"""Files of torch.save: the content of runs and published files is read exactly, anything else becomes a placeholder."""

import argparse
import collections
import io
import os
import pickle
import struct
import zipfile
from pathlib import Path, PurePosixPath

import numpy as np
import pytest
import torch
from weight_files import rezipped, run_state, same, saved

from models.checkpoints.torch_file import LEGACY_MAGIC, Placeholder, read
from models.errors import WeightsError

FIXTURES = Path(__file__).parents[2] / "fixtures" / "torch_formats"


def refused(path: Path, message: str) -> None:
    for mapped in (False, True):
        with pytest.raises(WeightsError, match=message) as error:
            read(path, mapped=mapped)
        assert str(error.value).isprintable() and str(path) in str(error.value) and len(str(error.value)) < 500


def with_pickle(tmp_path: Path, description: bytes) -> Path:
    """Write a complete file of torch.save with another pickle; it has one storage of eight numbers, "0"."""
    source = saved(tmp_path / "source.pt", torch.zeros(8))
    return rezipped(source, tmp_path / "x.pt", lambda name, data: description if name.endswith("data.pkl") else data)


# ------------------------------------------------------------------------------------------------ what is read


@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "lamb"])
def test_run_state_is_read_exactly(tmp_path, optimizer, legacy, mapped):
    content = dict(vars(run_state(optimizer)))
    path = saved(tmp_path / "x.pt", content, legacy)
    made = read(path, mapped=mapped)
    assert same(made, content) and same(made, torch.load(path, weights_only=True))
    assert made["model"]._metadata == content["model"]._metadata


@pytest.mark.parametrize("name", [path.name for path in sorted(FIXTURES.glob("*.pth"))])
def test_published_files_are_read_as_by_pytorch(name):
    with torch.serialization.safe_globals([argparse.Namespace]):
        expected = torch.load(FIXTURES / name, weights_only=True)
    made = read(FIXTURES / name)
    assert made.keys() == expected.keys()
    assert all(same(made[key], expected[key]) or isinstance(made[key], Placeholder) for key in made)
    assert same(made["model"], expected["model"])


@pytest.mark.parametrize("mapped", [False, True])
def test_views_share_their_storage(tmp_path, mapped):
    whole = torch.randn(4, 6)
    made = read(saved(tmp_path / "x.pt", {"a": whole, "row": whole[1], "t": whole.t()[::2]}), mapped=mapped)
    assert torch.equal(made["t"], whole.t()[::2]) and made["t"].stride() == (2, 6)
    made["a"].zero_()
    assert made["row"].count_nonzero() == made["t"].count_nonzero() == 0


def test_unmapped_tensors_outlive_the_file(tmp_path):
    path = saved(tmp_path / "x.pt", {"a": torch.full((100_000,), 7.0)})
    made = read(path)["a"]
    path.write_bytes(bytes(path.stat().st_size))
    assert made.min() == made.max() == 7


@pytest.mark.parametrize("legacy", [False, True])
def test_numpy_values_are_read_as_arrays_and_numbers(tmp_path, legacy):
    arrays = {"f": np.arange(6.0).reshape(2, 3), "order": np.asfortranarray(np.ones((2, 3), np.float16)),
              "big": np.arange(3, dtype=">i4"), "flags": np.array([True, False]), "empty": np.zeros((0, 2), np.float32)}
    numbers = {"accuracy": np.float64(91.25), "epoch": np.int64(3), "half": np.float16(0.5)}
    made = read(saved(tmp_path / "x.pt", arrays | numbers, legacy))
    for name, array in arrays.items():
        assert made[name].dtype == array.dtype.newbyteorder("=") and made[name].shape == array.shape
        assert (made[name] == array).all()
    assert {name: made[name] for name in numbers} == {"accuracy": 91.25, "epoch": 3, "half": 0.5}
    assert type(made["epoch"]) is int


def test_numpy_arrays_of_objects_are_not_built(tmp_path):
    odd = {"objects": np.array([{}, None], dtype=object), "dates": np.array(["2020-01-01"], "M8[D]"),
           "rows": np.zeros(2, "i4,f4")}
    made = read(saved(tmp_path / "x.pt", odd | {"a": torch.ones(2)}))
    assert made["a"].sum() == 2 and all(made[name].dtype.kind == "V" and not made[name].size for name in odd)


class Settings(dict):
    """Like configurations that other programs pickle."""


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("value", [
    PurePosixPath("/data"), argparse.Namespace(lr=0.1), collections.Counter("aab"), {1, 2}, Settings(a=1), torch.nn.Linear(2, 2),
    collections.defaultdict(list, {"a": [1]}), torch.ones(3).to_sparse(), torch.ones(2, device="meta"), 1j, OSError("x"),
])
def test_other_objects_become_placeholders(tmp_path, value, legacy):
    made = read(saved(tmp_path / "x.pt", {"odd": value, "a": torch.ones(2), "again": [value]}, legacy))
    assert isinstance(made["odd"], Placeholder) and made["a"].sum() == 2
    assert not isinstance(value, argparse.Namespace) or repr(made["odd"]) == "<argparse.Namespace>"


# ---------------------------------------------------------------------------------------------------- hostile


class Call:
    """Is pickled as a call."""

    def __init__(self, function, *arguments):
        self.made = function, arguments

    def __reduce__(self):
        return self.made


@pytest.mark.parametrize("protocol, legacy", [(2, False), (2, True), (4, False), (5, False)])
@pytest.mark.parametrize("function, arguments", [
    (os.system, ["touch executed"]), (eval, ["open('executed', 'w')"]), (exec, ["open('executed', 'w')"]),
    (Path.touch, [Path("executed")]), (__import__, ["antigravity"]), (io.open, ["executed", "w"]), (bytearray, [1 << 40])])
def test_nothing_is_called(tmp_path, monkeypatch, memory_below, function, arguments, legacy, protocol):
    monkeypatch.chdir(tmp_path)
    content = {"alone": Call(function, *arguments), Call(function, *arguments): [Call(function, *arguments)], "a": torch.ones(2)}
    torch.save(content, "x.pt", pickle_protocol=protocol, _use_new_zipfile_serialization=not legacy)
    with memory_below(64 << 20):
        assert read("x.pt")["a"].sum() == 2
    assert os.listdir(tmp_path) == ["x.pt"]


def pickled(*steps: bytes) -> bytes:
    return b"\x80\x02" + b"".join(steps) + b"."


def named(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


STORAGE = b"(X\x07\x00\x00\x00storage" + named("torch", "FloatStorage") + b"X\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x08tQ"


def tensor(size: bytes, stride: bytes, offset: bytes = b"K\x00", storage: bytes = STORAGE) -> bytes:
    """Return the pickle of an array over a storage of eight numbers."""
    return pickled(named("torch._utils", "_rebuild_tensor_v2"), b"(", storage, offset, size, stride, b"\x89NtR")


def test_array_inside_its_storage_is_read(tmp_path):
    assert read(with_pickle(tmp_path, tensor(b"K\x03K\x02\x86", b"K\x02K\x01\x86", offset=b"K\x02"))).shape == (3, 2)
    assert read(with_pickle(tmp_path, tensor(b"K\x00K\x05\x86", b"K\x05K\x01\x86", offset=b"K\x08"))).shape == (0, 5)


BIG = b"\x8a\x08" + (1 << 62).to_bytes(8, "little")


@pytest.mark.parametrize("description", [
    tensor(b"K\x03K\x03\x86", b"K\x03K\x01\x86"), tensor(b"K\x02\x85", b"K\x09\x85"),
    tensor(b"K\x02\x85", b"K\x01\x85", b"K\x07"), tensor(b"K\x02\x85", b"K\x01\x85", b"J\xff\xff\xff\xff"),
    tensor(b"K\x02\x85", b"J\xff\xff\xff\xff\x85", b"K\x07"),
    tensor(BIG + b"K\x04\x86", b"K\x00K\x00\x86"), tensor(b"J\x40\x42\x0f\x00\x85", b"K\x00\x85"),
    tensor(b"K\x02\x85", b"K\x01K\x01\x86"),
], ids=["beyond", "by_stride", "by_offset", "before", "backwards", "overflow", "repeated", "strides"])
def test_array_beyond_its_storage_is_refused(tmp_path, description):
    refused(with_pickle(tmp_path, description), "an array of [0-9 x]+ numbers, of which 8 are stored")


def test_storage_of_another_size_than_its_member_is_refused(tmp_path):
    for claimed in (b"K\x09", b"K\x07", b"J\xff\xff\xff\x7f"):
        description = tensor(b")", b")", storage=STORAGE.replace(b"K\x08", claimed))
        refused(with_pickle(tmp_path, description), "an array of [0-9]+ bytes has 32")
    refused(with_pickle(tmp_path, pickled(STORAGE.replace(b"X\x01\x00\x00\x000", b"X\x01\x00\x00\x001"))), "is missing")


@pytest.mark.parametrize("description", [
    b"", b"\x80\x02}", pickled(b"s"), pickled(b"h\x07"), pickled(b"K\x01Q"), pickled(b"X\x01\x00\x00\x00a)R"),
    pickled(b"K\x01K\x02b"),
    pickled(named("torch", "Size") + b"K\x01\x85R"), b"\x80\x02X\xff\xff\xff\x7fabc.", b"\x80\x09N.",
    pickled(named("numpy._core.multiarray", "scalar"), named("numpy", "dtype"), b"X\x02\x00\x00\x00f8\x85RK\x01\x86R")])
def test_damaged_pickle_is_reported_in_one_line(tmp_path, description):
    refused(with_pickle(tmp_path, description), "cannot be read as a checkpoint .*: write or copy it again")


def test_a_pickle_cannot_change_the_reader(tmp_path):
    """BUILD sets attributes of an object on the stack."""
    change = pickled(named("torch._utils", "_rebuild_tensor_v2"), b"N}X\x0c\x00\x00\x00__defaults__)s\x86b")
    refused(with_pickle(tmp_path, change), "cannot be read")
    assert read(saved(tmp_path / "y.pt", torch.ones(2))).sum() == 2


def test_checksums_are_compared_if_there_are_any(tmp_path):
    path = saved(tmp_path / "x.pt", torch.full((100,), 7.0))
    old, new = (struct.pack("<f", value) * 100 for value in (7, 8))
    path.write_bytes(path.read_bytes().replace(old, new))
    refused(path, "CRC")
    torch.serialization.set_crc32_options(False)
    try:
        assert read(saved(path, torch.full((100,), 7.0))).min() == 7
    finally:
        torch.serialization.set_crc32_options(True)


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_missing_memory_is_reported(tmp_path, monkeypatch, error):
    path = saved(tmp_path / "x.pt", torch.ones(2))

    def fail(*_, **__):
        raise error

    monkeypatch.setattr("models.checkpoints.torch_file.torch.empty", fail)
    with pytest.raises(WeightsError, match="not enough memory to read it"):
        read(path)


# ---------------------------------------------------------------------------------------------- the older format


def test_older_files_must_end_with_their_arrays(tmp_path):
    whole = saved(tmp_path / "x.pt", torch.arange(8.0), legacy=True).read_bytes()
    for content, message in ((whole + b"\0", "do not end at the end of the file"), (whole[:-1], "do not end at the end"),
                             (whole[:-33], "do not end|cannot be read"), (LEGACY_MAGIC + b"garbage", "cannot be read")):
        (tmp_path / "x.pt").write_bytes(content)
        refused(tmp_path / "x.pt", message)


def test_an_older_file_allocates_no_memory_for_missing_arrays(tmp_path, memory_below):
    path = saved(tmp_path / "x.pt", torch.zeros(200), legacy=True)
    path.write_bytes(path.read_bytes().replace(b"K\xc8N", b"J\xff\xff\xff\x7fN"))
    with memory_below(32 << 20):
        refused(path, "its arrays need more than the [0-9]+ bytes of the file")


# ---------------------------------------------------------------------------------------------------- no files


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "x.pt"
    for content, message in ((b"", "not a file of torch"), (b"text", "not a file of"), (b"PK\x03\x04", "cannot be read"),
                             (pickle.dumps({"a": 1}, 2), "did not write")):
        path.write_bytes(content)
        refused(path, message)
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("x/version", b"3")
    refused(path, "holds no data.pkl")
    refused(tmp_path / "absent.pt", "no such file")
    refused(tmp_path, "no such file")
