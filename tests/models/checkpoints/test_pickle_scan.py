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

from models.checkpoints.pickle_scan import ITEM_BYTES, LEGACY_NUMBER, PickleError, Scan, Storage
from models.checkpoints.torch_file import LEGACY_MAGIC


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
    scanned(described(tmp_path, [ordered, {1: 2, -3: 4}, torch.Size((2, 3)), torch.float16, torch.device("cpu"), -5,
                                 1 << 62, -1 << 63, 2.5, True, None, "text", torch.nn.Parameter(torch.ones(2)), (1, ("a", 2)),
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


def keyed(*keys: bytes) -> bytes:
    """{key: None, ...}"""
    return step_by_step(b"}(", *(key + b"N" for key in keys), b"u")


def long(value: int) -> bytes:
    size = value.bit_length() // 8 + 1
    return b"\x8a" + bytes([size]) + value.to_bytes(size, "little", signed=True)


NAMES = [b"X\x04\x00\x00\x00" + f"{number:04}".encode() for number in range(5000)]
ATTRIBUTES = b"}(" + b"".join(name + b"N" for name in NAMES) + b"u"


def again_and_again(first: bytes, step: bytes, times: int) -> bytes:
    """A list of something and of what is made of it by a few bytes each time."""
    return step_by_step(b"](", first, b"q\x00", step * times, b"e")


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
    "keys_of_one_hash": keyed(*(long(number * ((1 << 61) - 1)) for number in range(1, 240_000))),
    "one_key_of_another_hash": keyed(long(1 << 61)),
    "one_key_too_large": keyed(long(1 << 32)),
    "one_key_too_small": step_by_step(b"}" + long(-1 << 32) + b"Ns"),
    "numbered_entries": keyed(*(b"J" + number.to_bytes(4, "little") for number in range(100_001))),
    "long_integer": step_by_step(long(1 << 63)),
    "long_negative_integer": step_by_step(long((-1 << 63) - 1)),
    "number_as_a_key": step_by_step(b"}G" + bytes(8) + b"Ns"),
    "truth_as_a_key": keyed(b"\x88"),
    "nothing_as_a_key": keyed(b"N"),
    "tuple_as_a_key": keyed(b"K\x01\x85"),
    "dtype_as_a_key": keyed(named("torch.float16")),
    "set": pickled({1, 2}),
    "counter": pickled(Counter("aab")),
    "long_size_again_and_again": again_and_again(b"(" + b"K\x01" * 65 + b"t\x85", named("torch.Size") + b"h\x00R", 2),
    "attributes_again_and_again": again_and_again(ATTRIBUTES, named("collections.OrderedDict") + b")Rh\x00b", 21),
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
    "storage_of_two_sizes": step_by_step(b"](", STORAGE, STORAGE.replace(b"K\x08", b"K\x09"), b"e"),
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
    scanned(step_by_step(doubled(b"\x86", 10)))
    scanned(keyed(long((1 << 32) - 1), long(1 - (1 << 32)), *NAMES))
    scanned(keyed(*(b"J" + number.to_bytes(4, "little") for number in range(100_000))))
    scanned(again_and_again(ATTRIBUTES, named("collections.OrderedDict") + b")Rh\x00b", 20))
    scanned(again_and_again(b"(" + b"K\x01" * 64 + b"t\x85", named("torch.Size") + b"h\x00R", 2))
    scanned(step_by_step(b"](", STORAGE, STORAGE, b"e"))
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


def test_integers_of_one_hash_are_refused_at_once():
    content = HOSTILE["keys_of_one_hash"]
    assert len(content) > 2_800_000 and len({hash(number * ((1 << 61) - 1)) for number in range(1, 100)}) == 1
    started = time.perf_counter()
    with pytest.raises(PickleError):
        scanned(content)
    assert time.perf_counter() - started < 1


def test_the_magic_number_of_the_older_format_is_its_one_long_integer():
    scan = Scan(legacy=True)
    scan.run(LEGACY_MAGIC)
    assert scan.result == LEGACY_NUMBER
    with pytest.raises(PickleError):
        scanned(LEGACY_MAGIC)
    with pytest.raises(PickleError):
        Scan(legacy=True).run(pickled(LEGACY_NUMBER + 1))
