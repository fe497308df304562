"""Reading untrusted .npz archives: plain numbers are read, anything else is one line."""

import io
import pickle
import struct
import tracemalloc
import zipfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch
from weight_files import archive

from models.checkpoints.npz import NpzFile
from models.errors import WeightsError


def npy(array, **more) -> bytes:
    stream = io.BytesIO()
    np.lib.format.write_array(stream, np.asanyarray(array), **more)
    return stream.getvalue()


def header(text: str, version: tuple[int, int] = (1, 0), data: bytes = bytes(8)) -> bytes:
    """Return an array file with this header, whatever it claims."""
    length = struct.pack("<H" if version == (1, 0) else "<I", len(text))
    return b"\x93NUMPY" + bytes(version) + length + text.encode("latin1") + data


def described(descr: str = "'<f4'", shape: str = "(2,)", order: str = "False", **more) -> bytes:
    return header(f"{{'descr': {descr}, 'fortran_order': {order}, 'shape': {shape}}}", **more)


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    with closing(NpzFile(path)) as file:
        return {name: file.read_array(name) for name in file.names}


def refused(path: Path, message: str) -> None:
    with pytest.raises(WeightsError, match=message) as error:
        read_arrays(path)
    assert "\n" not in str(error.value) and str(path) in str(error.value)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_reads_what_numpy_writes(tmp_path, save):
    random = np.random.default_rng(0)
    arrays = {
        "a/kernel": random.standard_normal((3, 4, 5)).astype(np.float32),
        "a/fortran": np.asfortranarray(random.standard_normal((3, 4))),
        "b/big_endian": random.standard_normal(5).astype(">f4"),
        "c/int": np.arange(6, dtype=np.int64).reshape(2, 3),
        "d/scalar": np.float32(2.5),
        "d/empty": np.zeros((0, 4), np.float32),
        "d/zeros": np.zeros((100, 1000), np.float32),
    }
    save(tmp_path / "x.npz", **arrays)
    read = read_arrays(tmp_path / "x.npz")
    assert read.keys() == arrays.keys()
    for name, array in arrays.items():
        assert (read[name].shape, read[name].dtype) == (array.shape, array.dtype)
        np.testing.assert_array_equal(read[name], array)


def test_shapes_come_only_from_the_header(tmp_path):
    """A member with damaged data still has a shape, since only its header is read."""
    path = archive(tmp_path / "x.npz", {"good.npy": npy(np.ones(4)), "bad.npy": npy(np.full(1000, 7.0))})
    path.write_bytes(path.read_bytes().replace(np.full(1000, 7.0).tobytes(), np.full(1000, 8.0).tobytes()))
    with closing(NpzFile(path)) as file:
        assert file.shape("bad") == (1000,)
        assert (file.read_array("good") == 1).all()
        with pytest.raises(WeightsError, match=r"'bad' is damaged .*CRC"):
            file.read_array("bad")


@pytest.mark.parametrize("order", ["C", "F"])
def test_bfloat16_as_jax_saves_it(tmp_path, order):
    """As two bytes of void: the upper half of a float32."""
    values = torch.randn(3, 5).bfloat16()
    raw = np.asarray(values.view(torch.int16).numpy(), order=order).view("V2")
    assert np.lib.format.dtype_to_descr(raw.dtype) == "|V2"
    np.savez(tmp_path / "x.npz", a=raw)
    read = read_arrays(tmp_path / "x.npz")["a"]
    assert read.dtype == np.float32
    np.testing.assert_array_equal(read, values.float().numpy())


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_reused_memory_belongs_to_one_thread(tmp_path, save):
    """Only the same thread's next call reuses it."""
    arrays = {"a": np.full(1000, 1.0), "b": np.full(2000, 2.0), "c": np.full(500, 3.0)}
    save(tmp_path / "x.npz", **arrays)
    with closing(NpzFile(tmp_path / "x.npz")) as file, ThreadPoolExecutor(1) as pool:
        first, own = file.read_array("b", reuse=True), file.read_array("a")
        theirs = pool.submit(file.read_array, "c", reuse=True).result()
        np.testing.assert_array_equal(first, arrays["b"])
        second = file.read_array("a", reuse=True)
        assert np.shares_memory(first, second) and not np.shares_memory(first, theirs) and not np.shares_memory(first, own)
        for read, name in ((second, "a"), (own, "a"), (theirs, "c")):
            np.testing.assert_array_equal(read, arrays[name])


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_several_threads_read_the_right_arrays(tmp_path, save):
    arrays = {f"{number}": np.full(20_000 + number, float(number)) for number in range(40)}
    save(tmp_path / "x.npz", **arrays)
    with closing(NpzFile(tmp_path / "x.npz")) as file, ThreadPoolExecutor(4) as pool:
        for name, read in zip(arrays, pool.map(lambda name: file.read_array(name, reuse=True).copy(), arrays)):
            np.testing.assert_array_equal(read, arrays[name])


def test_an_array_with_a_header_of_odd_length_is_read(tmp_path):
    odd = header("{'descr': '<f8', 'fortran_order': False, 'shape': (2,)}", data=np.array([1.5, -2.5]).tobytes())
    read = read_arrays(archive(tmp_path / "x.npz", {"a.npy": odd}))["a"]
    assert read.flags.aligned and read.tolist() == [1.5, -2.5]


@pytest.mark.parametrize("content", [
    b"", b"PK\x03\x04", npy(np.ones(4)), pickle.dumps({"a": 1}), b"PK\x05\x06" + bytes(17), b"PK\x05\x06" + bytes(18)])
def test_a_file_that_is_no_archive_is_refused(tmp_path, content):
    (tmp_path / "x.npz").write_bytes(content)
    refused(tmp_path / "x.npz", "not a readable .npz archive")


MEMBERS = {
    "more_than_there_is": (described(shape="(3,)"), r"claims \(3,\) float32, which does not fit its size"),
    "terabytes": (described(shape=f"({1 << 40},)"), "does not fit its size"),
    "twice_negative": (described(shape="(-1, -2)"), "impossible shape"),
    "objects": (described("'|O'", shape="(1,)"), "holds object"),
    "text": (described("'<U1'"), "not plain numbers"),
    "complex": (described("'<c8'", shape="(1,)"), "not plain numbers"),
    "code": (header("__import__('os').system('true')"), "no readable array header"),
    "nested": (header("(" * 1500 + ")" * 1500), "no readable array header"),
    "text_left_open": (header("\"\"\"{'"), "no readable array header"),
    "future_version": (header("{}", version=(3, 0)), "no readable array header"),
    "not_an_array": (b"<html></html>", "no readable array header"),
    "header_too_long": (described(shape="(2,)" + " " * 5000, version=(2, 0)), "no readable array header"),
}


@pytest.mark.parametrize("case", MEMBERS)
def test_a_hostile_member_is_refused(tmp_path, case):
    data, message = MEMBERS[case]
    refused(archive(tmp_path / "x.npz", {"a.npy": data}), message)


def test_members_that_are_no_arrays_are_refused(tmp_path):
    refused(archive(tmp_path / "x.npz", {"data.pkl": b"x"}), "member 'data.pkl' is not an array")


def test_a_deflate_bomb_is_refused(tmp_path):
    """17 MB of zeros in 17 kB."""
    path = archive(tmp_path / "x.npz", {"a.npy": npy(np.zeros(17 << 20, np.uint8))}, compression=zipfile.ZIP_DEFLATED)
    refused(path, "'a.npy' claims 178.* bytes from ")


def test_an_array_takes_only_its_own_memory(tmp_path):
    """8 MB of zeros, compressed: no part is in memory twice."""
    path = archive(tmp_path / "x.npz", {"a.npy": npy(np.zeros(1 << 20))}, compression=zipfile.ZIP_DEFLATED)
    with closing(NpzFile(path)) as file:
        file.shape("a")
        tracemalloc.start()
        try:
            assert file.read_array("a").shape == (1 << 20,)
            assert tracemalloc.get_traced_memory()[1] < 12 << 20
        finally:
            tracemalloc.stop()
