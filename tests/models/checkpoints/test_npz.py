"""Reading .npz archives that cannot be trusted: plain numbers come back, all else is one line."""

import io
import os
import pickle
import random
import struct
import tracemalloc
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from models.checkpoints import npz, zip_archive
from models.checkpoints.npz import NpzError, NpzFile


def npy(array, **more) -> bytes:
    stream = io.BytesIO()
    np.lib.format.write_array(stream, np.asanyarray(array), **more)
    return stream.getvalue()


def header(text: str, version: tuple[int, int] = (1, 0), data: bytes = bytes(8)) -> bytes:
    """An array file with this header, whatever it says."""
    length = struct.pack("<H" if version == (1, 0) else "<I", len(text))
    return b"\x93NUMPY" + bytes(version) + length + text.encode("latin1") + data


def described(descr: str = "'<f4'", shape: str = "(2,)", order: str = "False", **more) -> bytes:
    return header(f"{{'descr': {descr}, 'fortran_order': {order}, 'shape': {shape}}}", **more)


def archive(path: Path, members: dict[str, bytes], **more) -> Path:
    with zipfile.ZipFile(path, "w", **more) as file:
        for name, data in members.items():
            file.writestr(name, data)
    return path


def read_all(path: Path) -> dict[str, np.ndarray]:
    with NpzFile(path) as file:
        return {name: file.read(name) for name in file.names}


def refused(path: Path, message: str) -> None:
    with pytest.raises(NpzError, match=message) as error:
        read_all(path)
    assert "\n" not in str(error.value) and str(path) in str(error.value)


# ------------------------------------------------------------------------------------------- what can be read


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_reads_what_numpy_writes(tmp_path, save):
    random = np.random.default_rng(0)
    arrays = {
        "a/kernel": random.standard_normal((3, 4, 5)).astype(np.float32),
        "a/fortran": np.asfortranarray(random.standard_normal((3, 4))),
        "b/half": random.standard_normal(7).astype(np.float16),
        "b/big_endian": random.standard_normal(5).astype(">f4"),
        "c/int": np.arange(6, dtype=np.int64).reshape(2, 3),
        "c/bytes": np.arange(6, dtype=np.uint8),
        "d/scalar": np.float32(2.5),
        "d/empty": np.zeros((0, 4), np.float32),
        "d/zeros": np.zeros((100, 1000), np.float32),
    }
    save(tmp_path / "x.npz", **arrays)
    read = read_all(tmp_path / "x.npz")
    assert read.keys() == arrays.keys()
    for name, array in arrays.items():
        assert (read[name].shape, read[name].dtype) == (array.shape, array.dtype)
        np.testing.assert_array_equal(read[name], array)


def test_reads_both_header_versions(tmp_path):
    array = np.arange(4.0)
    read = read_all(archive(tmp_path / "x.npz", {f"v{v}.npy": npy(array, version=(v, 0)) for v in (1, 2)}))
    assert all((value == array).all() for value in read.values()) and len(read) == 2


def test_shapes_come_from_the_header_alone(tmp_path):
    """A member whose data are damaged still has a shape: nothing was read but its header."""
    path = archive(tmp_path / "x.npz", {"good.npy": npy(np.ones(4)), "bad.npy": npy(np.full(1000, 7.0))})
    path.write_bytes(path.read_bytes().replace(np.full(1000, 7.0).tobytes(), np.full(1000, 8.0).tobytes()))
    with NpzFile(path) as file:
        assert file.shape("bad") == (1000,)
        assert (file.read("good") == 1).all()
        with pytest.raises(NpzError, match=r"'bad' is damaged .*CRC"):
            file.read("bad")


@pytest.mark.parametrize("order", ["C", "F"])
def test_bfloat16_as_jax_saves_it(tmp_path, order):
    """Two bytes of nothing in particular: the upper half of a float32."""
    values = torch.randn(3, 5).bfloat16()
    raw = np.asarray(values.view(torch.int16).numpy(), order=order).view("V2")
    assert np.lib.format.dtype_to_descr(raw.dtype) == "|V2"
    np.savez(tmp_path / "x.npz", a=raw)
    read = read_all(tmp_path / "x.npz")["a"]
    assert read.dtype == np.float32
    np.testing.assert_array_equal(read, values.float().numpy())


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_lent_arrays_lie_in_memory_that_is_used_again(tmp_path, save):
    """Of the same thread alone: another one's are not touched."""
    arrays = {"a": np.full(1000, 1.0), "b": np.full(2000, 2.0), "c": np.full(500, 3.0)}
    save(tmp_path / "x.npz", **arrays)
    with NpzFile(tmp_path / "x.npz") as file, ThreadPoolExecutor(1) as pool:
        first, own = file.read("b", lend=True), file.read("a")
        theirs = pool.submit(file.read, "c", lend=True).result()
        np.testing.assert_array_equal(first, arrays["b"])
        second = file.read("a", lend=True)
        assert np.shares_memory(first, second) and not np.shares_memory(first, theirs) and not np.shares_memory(first, own)
        for read, name in ((second, "a"), (own, "a"), (theirs, "c")):
            np.testing.assert_array_equal(read, arrays[name])


def test_several_threads_read_the_right_arrays(tmp_path):
    arrays = {f"{number}": np.full(20_000 + number, float(number)) for number in range(40)}
    for save in (np.savez, np.savez_compressed):
        save(tmp_path / "x.npz", **arrays)
        with NpzFile(tmp_path / "x.npz") as file, ThreadPoolExecutor(4) as pool:
            for name, read in zip(arrays, pool.map(lambda name: file.read(name, lend=True).copy(), arrays)):
                np.testing.assert_array_equal(read, arrays[name])


def test_a_file_that_is_cut_off_while_it_is_read(tmp_path):
    """Is an error; a mapping of it would end the process."""
    np.savez(tmp_path / "x.npz", a=np.ones(1 << 16))
    with NpzFile(tmp_path / "x.npz") as file:
        assert file.shape("a") == (1 << 16,)
        os.truncate(tmp_path / "x.npz", 1 << 12)
        with pytest.raises(NpzError, match="'a' is damaged"):
            file.read("a")


def test_an_array_whose_header_has_an_odd_length(tmp_path):
    odd = header("{'descr': '<f8', 'fortran_order': False, 'shape': (2,)}", data=np.array([1.5, -2.5]).tobytes())
    read = read_all(archive(tmp_path / "x.npz", {"a.npy": odd}))["a"]
    assert read.flags.aligned and read.tolist() == [1.5, -2.5]


def test_closes_its_file(tmp_path):
    with NpzFile(archive(tmp_path / "x.npz", {"a.npy": npy(np.ones(4))})) as file:
        pass
    with pytest.raises(ValueError, match="closed"):
        file.read("a")


# ------------------------------------------------------------------------------------------------ no archive


@pytest.mark.parametrize("content", [
    b"", b"not a zip", b"PK\x03\x04", b"<!DOCTYPE html><html><body>Sign in</body></html>", npy(np.ones(4)),
    pickle.dumps({"a": 1}), b"PK\x05\x06" + bytes(17)])
def test_no_archive(tmp_path, content):
    (tmp_path / "x.npz").write_bytes(content)
    refused(tmp_path / "x.npz", "not a readable .npz archive")


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.999])
def test_cut_off(tmp_path, share):
    path = archive(tmp_path / "x.npz", {f"{i}.npy": npy(np.ones(50)) for i in range(5)})
    os.truncate(path, int(path.stat().st_size * share))
    refused(path, "not a readable .npz archive")


def test_missing_or_a_folder(tmp_path):
    refused(tmp_path / "absent.npz", "not a readable .npz archive")
    refused(tmp_path, "not a readable .npz archive")


# -------------------------------------------------------------------------------------------- hostile members


class Touch:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_pickled_objects_are_not_executed(tmp_path):
    marker = tmp_path / "executed"
    np.savez(tmp_path / "x.npz", weights=np.array([Touch(marker)], dtype=object))
    refused(tmp_path / "x.npz", "'weights' holds object, not plain numbers")
    assert not marker.exists()
    with np.load(tmp_path / "x.npz", allow_pickle=True) as file:      # the trap itself works
        file["weights"]
    assert marker.exists()


MEMBERS = {
    "more_than_there_is": (described(shape="(3,)"), r"says \(3,\) float32, which does not fit its size"),
    "less_than_there_is": (described(shape="(1,)"), "does not fit its size"),
    "terabytes": (described(shape=f"({1 << 40},)"), "does not fit its size"),
    "overflow": (described(shape=f"({1 << 63}, 2)"), "does not fit its size"),
    "negative": (described(shape="(-2,)"), "impossible shape"),
    "twice_negative": (described(shape="(-1, -2)"), "impossible shape"),
    "objects": (described("'|O'", shape="(1,)"), "holds object"),
    "structure": (described("[('a', '<f4')]"), "not plain numbers"),
    "structure_of_objects": (described("[('a', '|O')]", shape="(1,)"), "not plain numbers"),
    "text": (described("'<U1'"), "not plain numbers"),
    "void": (described("'|V4'"), "not plain numbers"),
    "void_of_one_byte": (described("'|V1'", shape="(8,)"), "not plain numbers"),
    "bfloat16_of_another_size": (described("'|V2'", shape="(3,)"), "does not fit its size"),
    "complex": (described("'<c8'", shape="(1,)"), "not plain numbers"),
    "bool": (described("'|b1'", shape="(8,)"), "not plain numbers"),
    "dates": (described("'<M8[s]'", shape="(1,)"), "not plain numbers"),
    "no_dtype": (described("'nonsense'"), "no readable array header"),
    "fractional_shape": (described(shape="(2.0,)"), "no readable array header"),
    "code": (header("__import__('os').system('true')"), "no readable array header"),
    "nested": (header("(" * 1500 + ")" * 1500), "no readable array header"),
    "brackets_left_open": (header("(" * 10), "no readable array header"),
    "text_left_open": (header("\"\"\"{'"), "no readable array header"),
    "no_dict": (header("1"), "no readable array header"),
    "key_missing": (header("{'descr': '<f4', 'shape': (2,)}"), "no readable array header"),
    "future_version": (header("{}", version=(3, 0)), "no readable array header"),
    "not_an_array": (b"<html></html>", "no readable array header"),
    "empty": (b"", "no readable array header"),
    "header_cut": (described()[:40], "no readable array header"),
    "header_too_long": (described(shape="(2,)" + " " * 5000, version=(2, 0)), "no readable array header"),
}


@pytest.mark.parametrize("case", MEMBERS)
def test_hostile_member(tmp_path, case):
    data, message = MEMBERS[case]
    refused(archive(tmp_path / "x.npz", {"a.npy": data}), message)


def test_members_that_are_no_arrays(tmp_path):
    refused(archive(tmp_path / "x.npz", {"data.pkl": b"x"}), "member 'data.pkl' is not an array")


def test_a_member_that_stands_twice(tmp_path):
    with pytest.warns(UserWarning, match="Duplicate name"), zipfile.ZipFile(tmp_path / "x.npz", "w") as file:
        for value in (1.0, 2.0):
            file.writestr("a.npy", npy(np.full(4, value)))
    refused(tmp_path / "x.npz", "'a.npy' stands twice")


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_packed_as_numpy_does_not(tmp_path, method):
    refused(archive(tmp_path / "x.npz", {"a.npy": npy(np.ones(4))}, compression=method), "packed (in a way|as weights never are)")


def set_flag(path: Path, bit: int) -> None:
    """Sets a flag of the first member, in its own header and in the archive's directory."""
    data = bytearray(path.read_bytes())
    directory = data.index(b"PK\x01\x02")
    for position in (6, directory + 8):
        flags, = struct.unpack_from("<H", data, position)
        struct.pack_into("<H", data, position, flags | bit)
    path.write_bytes(data)


@pytest.mark.parametrize("bit", [0x01, 0x20, 0x40])
def test_flags_that_zipfile_cannot_read(tmp_path, bit):
    """Encrypted; a patch of another file; strongly encrypted."""
    path = archive(tmp_path / "x.npz", {"a.npy": npy(np.ones(4))})
    set_flag(path, bit)
    refused(path, "'a.npy' is encrypted, or packed as weights never are")


def test_a_name_that_is_no_text(tmp_path):
    """The directory's name is fine, the one that stands before the member is not UTF-8."""
    path = archive(tmp_path / "x.npz", {"a.npy": npy(np.ones(4))})
    path.write_bytes(path.read_bytes().replace(b"a.npy", b"\xff.npy", 1))
    set_flag(path, 0x800)
    refused(path, "'a' is damaged")


def test_a_deflate_bomb(tmp_path):
    """17 MB of zeros in 17 kB."""
    path = archive(tmp_path / "x.npz", {"a.npy": npy(np.zeros(17 << 20, np.uint8))}, compression=zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 1 << 15
    refused(path, "'a' claims 178.* bytes from ")


def test_many_small_bombs(tmp_path, monkeypatch):
    """None is suspicious alone; together they unpack to more than the file has and what is allowed beyond it."""
    zeros = npy(np.zeros(100_000, np.uint8))
    path = archive(tmp_path / "x.npz", {f"{i}.npy": zeros for i in range(11)}, compression=zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 20_000 and len(read_all(path)) == 11
    monkeypatch.setattr(npz, "MAX_GAIN", 1_000_000)
    refused(path, "its members claim 1101408 bytes, the file has")


def test_a_member_that_calls_itself_a_folder(tmp_path):
    path = archive(tmp_path / "x.npz", {"a.npy": npy(np.ones(4))})
    data = bytearray(path.read_bytes())
    data[data.index(b"PK\x01\x02") + 38] |= 0x10
    path.write_bytes(data)
    refused(path, "'a.npy' calls itself a folder")


def test_an_array_takes_its_own_memory_and_no_more(tmp_path):
    """8 MB of zeros, packed: nothing of it is held twice."""
    path = archive(tmp_path / "x.npz", {"a.npy": npy(np.zeros(1 << 20))}, compression=zipfile.ZIP_DEFLATED)
    with NpzFile(path) as file:
        file.shape("a")
        tracemalloc.start()
        try:
            assert file.read("a").shape == (1 << 20,)
            assert tracemalloc.get_traced_memory()[1] < 12 << 20
        finally:
            tracemalloc.stop()


def test_too_many_members(tmp_path, monkeypatch):
    monkeypatch.setattr(zip_archive, "MAX_MEMBERS", 3)
    members = {f"{i}.npy": npy(np.ones(1)) for i in range(4)}
    refused(archive(tmp_path / "x.npz", members), "4 members")
    assert len(read_all(archive(tmp_path / "y.npz", dict(list(members.items())[:3])))) == 3


def lie_about_size(path: Path, size: int) -> Path:
    """An archive whose one array claims `size` bytes of data everywhere: in its header, and in the archive's directory."""
    member = described(shape=f"({size // 4},)")
    data = bytearray(archive(path, {"a.npy": member}).read_bytes())
    directory = data.index(b"PK\x01\x02")
    for position in (18, 22, directory + 20, directory + 24):           # packed and unpacked size, in both places
        struct.pack_into("<I", data, position, len(member) - 8 + size)
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("everywhere", [False, True])
def test_no_memory_is_taken_for_what_is_not_there(tmp_path, everywhere):
    """A header that says 4 TB; and one of 2 GB whose archive says so as well."""
    if everywhere:
        path = lie_about_size(tmp_path / "x.npz", 1 << 31)
    else:
        path = archive(tmp_path / "x.npz", {"a.npy": described(shape=f"({1 << 40},)")})
    tracemalloc.start()
    try:
        refused(path, "'a")
        assert tracemalloc.get_traced_memory()[1] < 1 << 22
    finally:
        tracemalloc.stop()


def test_random_damage_is_an_error_or_nothing(tmp_path):
    """One to three bytes or bits changed, or the end cut: never another exception, never other numbers."""
    arrays = {"head/bias": np.arange(5, dtype=np.float32), "head/kernel": np.ones((4, 5), np.float32), "cls": np.zeros(3)}
    refusals = 0
    for seed in range(400):
        dice, stream = random.Random(seed), io.BytesIO()
        dice.choice([np.savez, np.savez_compressed])(stream, **arrays)
        data = bytearray(stream.getvalue())
        for _ in range(dice.randint(1, 3)):
            place = dice.randrange(len(data))
            data[place] = dice.choice([data[place] ^ (1 << dice.randrange(8)), dice.randrange(256), 0, 255])
        if dice.random() < 0.1:
            del data[dice.randrange(len(data)):]
        (tmp_path / "x.npz").write_bytes(data)
        try:
            read = read_all(tmp_path / "x.npz")
        except NpzError as error:
            refusals += 1
            assert "\n" not in str(error), seed
        else:
            for name in read.keys() & arrays.keys():
                np.testing.assert_array_equal(read[name], arrays[name], err_msg=f"seed {seed}")
    assert refusals > 200
