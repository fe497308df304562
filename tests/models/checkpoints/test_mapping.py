"""Mapped files, whose arrays are views of their pages."""

import gc
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from configs import architecture
from models import create_model
from models.checkpoints.mapping import MappedFile
from models.checkpoints.opened import OpenedCheckpoint


@pytest.fixture
def mapped(tmp_path):
    (tmp_path / "x").write_bytes(bytes(range(256)) * 64)
    with open(tmp_path / "x", "rb") as stream:
        return MappedFile(stream)


def test_released_views_can_be_read_again(mapped):
    view = mapped.bytes_at(5000, 10)
    assert view.tolist() == [(5000 + i) % 256 for i in range(10)] == list(mapped.memory_at(5000, 10))
    mapped.release(5000, 10)
    mapped.release_view(view.view(torch.uint8)[2:])
    assert view.tolist() == [(5000 + i) % 256 for i in range(10)] and len(mapped.bytes_at(0, 0)) == 0


def test_other_memory_is_not_released(mapped):
    other = torch.full((5000,), 7, dtype=torch.uint8)
    mapped.release_view(other)
    assert other.unique().tolist() == [7]


def file_pages() -> int:
    """Return how many MiB of this process's memory are pages of files."""
    return int(Path("/proc/self/status").read_text().partition("RssFile:")[2].split()[0]) >> 10


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no Linux")
@pytest.mark.parametrize("save, name", [(save_file, "x.safetensors"), (torch.save, "x.pth")])
def test_loading_needs_memory_for_one_copy_of_the_weights(tmp_path, save, name):
    row = architecture(8, 512, 2048, 8, 6, img_size=16)
    save({key: value.clone() for key, value in create_model(row, 3).state_dict().items()}, tmp_path / name)
    gc.collect()
    before = file_pages()
    with OpenedCheckpoint(tmp_path / name) as file:
        model = create_model(row, 3, pretrained=file, head="keep")
        assert sum(value.numel() * 4 for value in model.state_dict().values()) >> 20 > 70 and file_pages() - before < 25


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int32, torch.bool])
def test_safetensors_of_all_types(tmp_path, dtype):
    arrays = {"odd": torch.ones(3, dtype=torch.uint8), "x": torch.arange(6).to(dtype).view(2, 3), "one": torch.ones(()).to(dtype)}
    save_file(arrays, tmp_path / "x.safetensors")
    with OpenedCheckpoint(tmp_path / "x.safetensors") as file:
        for name, value in arrays.items():
            for read in (file.file.read, file.file.read_view):
                assert torch.equal(read(name), value.float()) and read(name).dtype == torch.float32
        file.file.read("x").fill_(9)                              # memory of its own
        assert torch.equal(file.file.read_view("x"), arrays["x"].float())
