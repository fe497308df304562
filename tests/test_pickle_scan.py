"""The description inside a file of torch.save, followed step by step: hostile ones end before PyTorch sees them."""

import argparse
import io
import os
import pickle
import time
import zipfile
from collections import Counter, OrderedDict
from pathlib import Path

import pytest
import torch

from models.pickle_scan import ITEM_BYTES, PickleError, Scan, Storage


def described(tmp_path: Path, content) -> bytes:
    """The pickle of what torch.save writes."""
    torch.save(content, tmp_path / "x.pt")
    with zipfile.ZipFile(tmp_path / "x.pt") as file:
        return file.read("x/data.pkl")


def scanned(content: bytes, *classes: type) -> Scan:
    scan = Scan(classes)
    scan.run(content)
    return scan


def test_the_storages_are_told_with_their_sizes(tmp_path):
    whole = torch.zeros(4, 6)
    content = {"a": whole, "part": whole[1:3, ::2], "half": torch.zeros(3).bfloat16(), "0": torch.zeros(0), "p": torch.ones(())}
    assert list(scanned(described(tmp_path, content)).storages.values()) == [
        Storage(24, 96), Storage(3, 6), Storage(0, 0), Storage(1, 4)]


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
@pytest.mark.parametrize("name", ITEM_BYTES)
def test_the_size_of_a_number_is_the_one_of_pytorch(name):
    assert ITEM_BYTES[name] == getattr(torch, name).dtype.itemsize


def test_a_pickle_of_lists_and_names_is_understood(tmp_path):
    assert scanned(pickle.dumps(["a", "b", 3, None], protocol=2)).result == ["a", "b", 3, None]


def test_classes_that_were_named_pass_and_others_do_not(tmp_path):
    content = described(tmp_path, {"args": argparse.Namespace(lr=0.1, name="x")})
    scanned(content, argparse.Namespace)
    with pytest.raises(PickleError, match=r"asks for argparse\.Namespace, which no file of weights needs: nothing was run"):
        scanned(content)


def test_plain_things_pass(tmp_path):
    ordered = OrderedDict(a=torch.ones(2))
    ordered._metadata = OrderedDict(version=1)              # as Module.state_dict leaves it
    scanned(described(tmp_path, [ordered, {1, 2}, Counter("aab"), torch.Size((2, 3)), torch.float16, torch.device("cpu"), -5,
                                 1 << 90, 2.5, True, None, "text", torch.nn.Parameter(torch.ones(2)), (1, ("a", 2)),
                                 torch.rand(3, 4).t()]))


class Made:
    """Pickled as a call of something."""

    def __init__(self, call, *arguments):
        self.made = call, arguments

    def __reduce__(self):
        return self.made


def pickled(content) -> bytes:
    return pickle.dumps(content, protocol=2)


def step_by_step(*steps: bytes) -> bytes:
    return b"\x80\x02" + b"".join(steps) + b"."


def named(name: str) -> bytes:
    module, _, what = name.rpartition(".")
    return f"c{module}\n{what}\n".encode()


def doubled(make: bytes, times: int) -> bytes:
    """x = (x, x), again and again: n steps, 2^n values. make: the tuple or list of the two last values."""
    return b"K\x01" + b"".join(b"q\x00h\x00" + make for _ in range(times))


STORAGE = b"(X\x07\x00\x00\x00storage" + named("torch.FloatStorage") + b"X\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x08tQ"
HOOKS = named("collections.OrderedDict") + b")R"


def tensor(size: bytes, stride: bytes, storage: bytes = STORAGE, offset: bytes = b"K\x00", hooks: bytes = HOOKS) -> bytes:
    """An array over a storage of eight numbers."""
    return step_by_step(named("torch._utils._rebuild_tensor_v2"), b"(", storage, offset, size, stride, b"\x89", hooks, b"tR")


BIG = b"\x8a\x08" + (1 << 62).to_bytes(8, "little")
HOSTILE = {
    "bytearray": pickled(Made(bytearray, 1 << 40)),
    "encode": pickled(Made(__import__("_codecs").encode, "0" * 100, "hex")),
    "system": pickled(Made(os.system, "true")),
    "eval": pickled(Made(eval, "1")),
    "getattr": pickled(Path("x")),
    "sparse": step_by_step(named("torch._utils._rebuild_sparse_tensor"), b")R"),
    "wrapper": step_by_step(named("torch._utils._rebuild_wrapper_subclass"), b")R"),
    "new_object": step_by_step(named("collections.OrderedDict"), b")\x81"),
    "call_of_what_was_called": step_by_step(named("collections.OrderedDict"), b")R)R"),
    "call_of_text": step_by_step(b"X\x01\x00\x00\x00a)R"),
    "protocol_4": pickle.dumps({"a": 1}, protocol=4),
    "protocol_5": pickle.dumps({"a": [1]}, protocol=5),
    "tuples_to_hash": step_by_step(b"}", doubled(b"\x86", 40), b"K\x01s"),
    "deep_tuple": step_by_step(b"K\x01", b"\x85" * 100_000),
    "marks": step_by_step(b"(" * 100_000),
    "steps": step_by_step(b"](", b"K\x01" * 600_000, b"e"),
    "calls": step_by_step(b"](", named("collections.OrderedDict"), b"q\x00)R", b"h\x00)R" * 110_000, b"e"),
    "nothing": b"",
    "no_end": b"\x80\x02}",
    "text_longer_than_the_file": b"\x80\x02X\xff\xff\xff\x7fabc.",
    "empty_stack": step_by_step(b"s"),
    "left_on_the_stack": step_by_step(b"K\x01K\x01"),
    "unknown_memory": step_by_step(b"h\x07"),
    "text_as_a_list": step_by_step(b"X\x01\x00\x00\x00aK\x01a"),
    "no_mark": step_by_step(b"K\x01t"),
    "attributes_of_a_text": step_by_step(b"X\x01\x00\x00\x00a}b"),
    "storage_of_nothing": step_by_step(b"K\x01Q"),
    "storage_by_number": step_by_step(STORAGE.replace(b"X\x01\x00\x00\x000", b"K\x00")),
    "storage_of_negative_size": step_by_step(STORAGE.replace(b"K\x08", b"J\xff\xff\xff\xff")),
    "storage_of_a_dtype": step_by_step(STORAGE.replace(b"FloatStorage", b"float32")),
    "storage_of_two_sizes": step_by_step(STORAGE, b"0", STORAGE.replace(b"K\x08", b"K\x09")),
    "module": step_by_step(STORAGE.replace(b"X\x07\x00\x00\x00storage", b"X\x06\x00\x00\x00module")),
    "one_number_a_million_times": tensor(b"J\x40\x42\x0f\x00\x85", b"K\x00\x85"),
    "beyond_the_storage": tensor(b"K\x03K\x03\x86", b"K\x03K\x01\x86"),
    "beyond_by_its_steps": tensor(b"K\x02\x85", b"K\x09\x85"),
    "beyond_by_its_place": tensor(b"K\x02\x85", b"K\x01\x85", offset=b"K\x07"),
    "before_the_storage": tensor(b"K\x02\x85", b"K\x01\x85", offset=b"J\xff\xff\xff\xff"),
    "backwards": tensor(b"K\x02\x85", b"J\xff\xff\xff\xff\x85", offset=b"K\x07"),
    "overflow": tensor(BIG + b"K\x04\x86", b"K\x00K\x00\x86"),
    "many_sides": tensor(b"(" + b"K\x01" * 65 + b"t", b"(" + b"K\x01" * 65 + b"t"),
    "hooks_of_another_kind": tensor(b"K\x02\x85", b"K\x01\x85", hooks=named("collections.OrderedDict")),
    "over_no_storage": tensor(b"K\x02\x85", b"K\x01\x85", storage=b"}"),
    "parameter_of_a_dictionary": step_by_step(named("torch._utils._rebuild_parameter"), b"(}\x88", HOOKS, b"tR"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile(case):
    started = time.perf_counter()
    with pytest.raises((PickleError, ValueError)) as error:
        scanned(HOSTILE[case])
    assert time.perf_counter() - started < 5 and "\n" not in str(error.value)


def test_the_steps_that_those_are_made_of_pass():
    """Else all of the above could be refused for the wrong reason."""
    scanned(tensor(b"K\x02\x85", b"K\x01\x85"))
    scanned(tensor(b"K\x03K\x02\x86", b"K\x02K\x01\x86", offset=b"K\x02"))
    scanned(tensor(b"K\x00K\x05\x86", b"K\x05K\x01\x86", offset=b"K\x08"))
    scanned(step_by_step(STORAGE))
    scanned(step_by_step(b"}", doubled(b"\x86", 10), b"K\x01s"))
    scanned(step_by_step(named("collections.OrderedDict"), b")R}b"))


@pytest.mark.slow
def test_the_hostile_ones_are_what_they_seem():
    """What they cost without the scan: 40 doublings are never hashed to the end, a few bytes take any amount."""
    from torch._weights_only_unpickler import load

    made = load(io.BytesIO(pickled(Made(bytearray, 1 << 28))))
    assert len(made) == 1 << 28
    started = time.perf_counter()
    load(io.BytesIO(step_by_step(b"}", doubled(b"\x86", 18), b"K\x01s")))
    quick = time.perf_counter() - started
    load(io.BytesIO(step_by_step(b"}", doubled(b"\x86", 22), b"K\x01s")))
    assert time.perf_counter() - started - quick > 3 * quick
