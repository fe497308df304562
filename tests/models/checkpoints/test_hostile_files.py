"""Files of every kind, damaged at random: each is refused on one line, or read as it was written.

Each is read in a forked child that may use at most half a GB more memory than the file, and 5 seconds. .npz and PyTorch's zip
files have checksums, so no number may be changed; .safetensors, PyTorch's older files, lists and edits have none: there only the
structure is checked.
"""

import argparse
import io
import json
import mmap
import os
import resource
import signal
import struct
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from mutations import mutated
from safetensors.torch import save
from weight_files import rezipped, run_state, same

from models import create_model, save_timm
from models.checkpoints.formats import open_weights
from models.checkpoints.torch_file import read
from models.errors import ModelError, WeightsError
from utils.attention import edits
from utils.data.csv_lists import csv_lists
from utils.data.splits import DataError

FIXTURES = Path(__file__).parents[2] / "fixtures" / "torch_formats"
SECONDS, MEMORY, GROWTH = 5, 512 << 20, 64 << 20       # MEMORY: what a copy may ask for, GROWTH: what it may take
OWN_ERRORS = (ModelError, DataError, edits.EditError)
ARRAYS = {"head/bias": np.arange(5, dtype=np.float32), "head/kernel": np.ones((4, 5), np.float32), "cls": np.zeros(3),
          "position": np.linspace(0, 1, 60).reshape(1, 10, 6).astype(np.float16)}


# ---------------------------------------------------------------------------------------------------- the child


def survived(folder: Path, content: bytes, check: Callable[[Path, int], None], times: int, mutate=mutated) -> int:
    """Read `times` damaged copies in a child process, and return how many were refused.

    check(path, seed) reads one; it may raise one of our own errors. Any other error, more than one line, a crash, too much time
    or too much memory fails the test with the seed.
    """
    progress = mmap.mmap(-1, 24)           # the seed at work, how many were refused, most memory that one took
    child = os.fork()
    if child == 0:
        code = 1
        try:
            _limit_memory(len(content))
            refused, before = 0, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            for seed in range(times):
                progress[:] = struct.pack("<3q", seed, refused, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
                path = folder / "x"
                path.write_bytes(mutate(content, seed))
                signal.alarm(SECONDS)
                started = time.process_time()
                refused += _refused(check, path, seed)
                assert time.process_time() - started < SECONDS
                signal.alarm(0)
            progress[:] = struct.pack("<3q", times, refused, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
            code = 0
        except BaseException:
            (folder / "failure").write_text(traceback.format_exc())
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    seed, refused, memory = struct.unpack("<3q", progress[:])
    text = (folder / "failure").read_text() if (folder / "failure").exists() else f"ended by signal {status}"
    assert status == 0, f"seed {seed}: {text}"
    assert seed == times and memory * 1024 < GROWTH + len(content), (seed, memory)
    return refused


def _limit_memory(more: int) -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY + more, resource.RLIM_INFINITY))


def _refused(check: Callable, path: Path, seed: int) -> bool:
    try:
        check(path, seed)
    except OWN_ERRORS as error:
        text = str(error)
        assert "\n" not in text and len(text) < 1500, text
        assert text.isprintable() or isinstance(error, DataError), text
        return True
    return False


# ------------------------------------------------------------------------------------------------------ archives


def npz(save=np.savez) -> bytes:
    stream = io.BytesIO()
    save(stream, **ARRAYS)
    return stream.getvalue()


def check_npz(path: Path, seed: int) -> None:
    with open_weights(path) as file:
        found = {name: file.read(name) for name in file.names}
    assert found and found.keys() <= ARRAYS.keys()           # a model notices an array that got lost
    for name, array in found.items():
        assert torch.equal(array, torch.from_numpy(ARRAYS[name]).float()), name


@pytest.mark.contract("P7", "a damaged .npz is refused on one line, or its arrays are the right ones")
@pytest.mark.parametrize("packed", [False, True])
def test_npz(tmp_path, tries, figure, packed):
    times = tries(40, 5000)
    tokens = (b"PK\x01\x02", b"PK\x03\x04", b"PK\x05\x06", b"PK\x06\x07", b"PK\x06\x06", b"\x93NUMPY\x01\x00")
    refused = survived(tmp_path, npz(np.savez_compressed if packed else np.savez), check_npz, times,
                       lambda content, seed: mutated(content, seed, tokens))
    assert refused > times / 2
    figure(f"mutated .npz, {'deflated' if packed else 'stored'}", times)


def with_members(folder: Path, content: bytes, edit: Callable[[str, bytes], bytes]) -> bytes:
    """Return the archive with changed members and correct checksums."""
    (folder / "old").write_bytes(content)
    return rezipped(folder / "old", folder / "new", edit).read_bytes()


@pytest.mark.contract("P7", "an .npz whose check sums agree with hostile headers is refused, or read within its bounds")
def test_npz_headers_with_right_check_sums(tmp_path, tries, figure):
    times = tries(40, 2000)

    def check(path: Path, seed: int) -> None:
        with open_weights(path) as file:
            for name in file.names:
                assert tuple(file.read(name).shape) == file.shape(name)

    def change(content: bytes, seed: int) -> bytes:
        def damage(name: str, data: bytes) -> bytes:
            words = (b"|O", b"<f8", b"9" * 12, b"(", b"-1,")
            return mutated(data[:140], seed, words) + data[140:] if name == "position.npy" else data

        return with_members(tmp_path, content, damage)

    assert survived(tmp_path, npz(), check, times, change) > times / 4
    figure("hostile .npz headers", times)


# ------------------------------------------------------------------------------------------------- files of torch


def pt(content, **more) -> bytes:
    stream = io.BytesIO()
    torch.save(content, stream, **more)
    return stream.getvalue()


def use(value: object) -> None:
    """Read every number: one outside the file would crash the process."""
    if isinstance(value, torch.Tensor):
        value.detach().float().sum()
        value.detach().clone()
    elif isinstance(value, dict):
        for inner in value.values():
            use(inner)
    elif isinstance(value, (list, tuple, set)):
        for inner in value:
            use(inner)


ZIP_WORDS = (b"PK\x01\x02", b"PK\x03\x04", b"PK\x05\x06", b"PK\x06\x07", b"PK\x06\x06", b"PK\x07\x08", b"data/0", b"\x10\0\0\0")
PICKLE_WORDS = (b"cbuiltins\neval\n", b"c__builtin__\nbytearray\n", b"ccollections\nOrderedDict\n", b"R", b"h\x00", b"q\x01",
                b"b", b"\x81", b"Q", b"(", b"t", b"\x86", b"}", b"]", b"0", b"J\xff\xff\xff\x7f",
                b"\x8a\x08\xff\xff\xff\xff\xff\xff\xff\x7f")


@pytest.mark.contract("P7", "a damaged checkpoint is refused on one line, without its digest too, or its tensors are right")
def test_checkpoints_of_our_own(tmp_path, tries, figure):
    times, state = tries(60, 5000), dict(vars(run_state("adamw")))

    def check(path: Path, seed: int) -> None:
        assert same(read(path, mapped=seed % 2 == 0), state)

    refused = survived(tmp_path, pt(state), check, times, lambda content, seed: mutated(content, seed, ZIP_WORDS))
    assert refused > times / 2
    figure("mutated checkpoints of our own", times)


def test_a_pickle_that_would_need_more_memory_than_the_file_is_refused(tmp_path):
    """Python's reader allocates memory for all memo indices up to the largest: 2 ** 30 of them take 16 GB."""
    far = b"\x80\x02}r\xff\xff\xff\x3f."
    (tmp_path / "x.pt").write_bytes(with_members(tmp_path, pt({}), lambda name, data: far if name.endswith("data.pkl") else data))
    with pytest.raises(WeightsError, match="a pickle of 9 bytes with a memo index 1073741823"):
        read(tmp_path / "x.pt")


@pytest.mark.contract("P7", "a hostile description in a checkpoint whose check sums agree is refused, or read within its bounds")
def test_descriptions_with_right_check_sums(tmp_path, tries, figure):
    times, state = tries(80, 5000), dict(vars(run_state("adamw")))

    def check(path: Path, seed: int) -> None:
        use(read(path, mapped=seed % 2 == 0))

    def change(content: bytes, seed: int) -> bytes:
        return with_members(tmp_path, content,
                            lambda name, data: mutated(data, seed, PICKLE_WORDS) if name.endswith("data.pkl") else data)

    assert survived(tmp_path, pt(state), check, times, change) > times / 2
    figure("hostile pickles in a whole archive", times)


@pytest.mark.contract("P7", "a damaged published checkpoint is refused on one line, or its tensors are the right ones")
def test_published_checkpoints(tmp_path, tries, figure):
    times, content = tries(40, 2000), (FIXTURES / "mae_pretrain_enc.pth").read_bytes()
    with open_weights(FIXTURES / "mae_pretrain_enc.pth") as file:
        expected = {name: file.read(name) for name in file.names}

    def check(path: Path, seed: int) -> None:
        with open_weights(path) as file:
            assert same({name: file.read(name) for name in file.names}, expected)

    survived(tmp_path, content, check, times, lambda content, seed: mutated(content, seed, ZIP_WORDS))
    figure("mutated published .pth", times)


def use_weights(path: Path, seed: int) -> None:
    with open_weights(path) as file:
        for name in file.names:
            assert tuple(file.read(name).shape) == file.shape(name)


@pytest.mark.contract("P7", "a damaged PyTorch file of before 2020 is refused on one line, or read within its bounds")
def test_older_files(tmp_path, tries, figure):
    times = tries(60, 3000)
    model = {name: torch.from_numpy(array) for name, array in ARRAYS.items()}
    content = pt({"model": model, "args": argparse.Namespace(lr=1e-3)}, _use_new_zipfile_serialization=False)
    refused = survived(tmp_path, content, use_weights, times, lambda content, seed: mutated(content, seed, PICKLE_WORDS))
    assert refused > times / 2
    figure("mutated legacy .pth", times)


@pytest.mark.contract("P7", "a damaged .safetensors file is refused on one line, or read within its bounds")
def test_safetensors(tmp_path, tries, figure):
    times = tries(60, 3000)
    content = save({name: torch.from_numpy(array) for name, array in ARRAYS.items()}, {"made": "by a test"})
    tokens = (b'"shape":[', b"18446744073709551615", b"-1", b'"F64"', b'"C64"', b"[[", b"{", b"\\u0000", b"0,", b'"dtype":"U8",')
    refused = survived(tmp_path, content, use_weights, times, lambda content, seed: mutated(content, seed, tokens))
    assert refused > times / 4
    figure("mutated .safetensors", times)


@pytest.mark.contract("P7", "a damaged config.json beside weights is refused on one line, or its values are plain")
def test_folders(tmp_path, tries, figure):
    times, folder = tries(60, 3000), tmp_path / "hub"
    folder.mkdir()
    save_timm(create_model("ViT-Nano_2", 2), folder / "model.safetensors")
    said = {"architecture": "vit", "label_names": ["a", "b"], "model_args": {"num_heads": 4, "act_layer": "gelu", "img_size": 8},
            "pretrained_cfg": {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5], "input_size": [3, 8, 8], "crop_pct": 0.9}}

    def check(path: Path, seed: int) -> None:
        path.replace(folder / "config.json")
        model = create_model("ViT-Nano_2", pretrained=folder, head="keep")
        assert model.config.gelu in ("tanh", "erf") and len(model.config.mean) == 3
        assert all(name.isprintable() for name in model.load_report.classes)

    tokens = (b"NaN", b"1e999", b"-1", b"[" * 3000, b"null", b"true", b'"', b"\\ud800", b"{}", b"9" * 500, b"\xff")
    survived(tmp_path, json.dumps(said).encode(), check, times, lambda content, seed: mutated(content, seed, tokens))
    figure("mutated config.json", times)


# ------------------------------------------------------------------------------------------------- lists and edits


@pytest.mark.contract("P7", "a damaged list of images is refused on one line")
def test_lists(tmp_path, tries, figure):
    times, data = tries(40, 2000), tmp_path / "data"
    (data / "images").mkdir(parents=True)
    rows = [f'images/{number}.png,"{label}"' for number, label in enumerate(["cat", "dog", "a,b", "ü"] * 3)]
    for number in range(len(rows)):
        (data / "images" / f"{number}.png").touch()
    content = "path,label\n" + "\n".join(rows) + "\n"
    (data / "val.csv").write_text(content)

    def check(path: Path, seed: int) -> None:
        path.replace(data / "train.csv")
        splits = csv_lists(str(data))
        assert all(0 <= label < len(splits.classes) for label in splits.train.targets)

    assert survived(tmp_path, content.encode(), check, times,
                    lambda content, seed: mutated(content, seed, (b'"', b",", b"\n", b"\r", b"\0", b"../", b"\xff"))) > times / 2
    figure("mutated lists of images", times)


@pytest.mark.contract("P7", "a damaged edit is refused on one line, or its values are in 0..1")
def test_edits(tmp_path, tries, figure):
    times, values = tries(60, 3000), np.linspace(0, 1, 12, dtype=np.float32).reshape(3, 4)
    edits.write(tmp_path / "whole.json", edits.Edit("train/a.png", "sha256:" + "0" * 64, values, values > 0.3, who="ü", note="n"))

    def check(path: Path, seed: int) -> None:
        edit = edits.read(path)
        assert edit.values.shape == edit.edited.shape and ((edit.values >= 0) & (edit.values <= 1)).all()
        assert edits.is_safe(edit.image) and 0 <= edit.region[0] < edit.region[2] <= 1

    tokens = (b"NaN", b"1e999", b"-1", b"9" * 500, b"[" * 3000, b"null", b"true", b'"', b"\\ud800", b'"image": "../x",', b"\xff")
    assert survived(tmp_path, (tmp_path / "whole.json").read_bytes(), check, times,
                    lambda content, seed: mutated(content, seed, tokens)) > times / 2
    figure("mutated edits", times)


def test_the_harness_notices_bad_readers(tmp_path):
    """A reader that crashes, takes memory, shows a traceback or breaks its line is noticed."""
    def crashes(path, seed):
        os.kill(os.getpid(), signal.SIGKILL)

    def takes_memory(path, seed):
        bytearray(1 << 40)                     # more than earlier tests can have left in this process to be used again

    def breaks_its_line(path, seed):
        raise ModelError("one\ntwo")

    for check, message in ((crashes, "ended by signal"), (takes_memory, "MemoryError"), (breaks_its_line, "AssertionError"),
                           (lambda path, seed: json.loads("{"), "JSONDecodeError")):
        with pytest.raises(AssertionError, match=message):
            survived(tmp_path, b"content", check, 3)
        (tmp_path / "failure").unlink(missing_ok=True)
