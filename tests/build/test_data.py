"""The data loaders, and which split is evaluated when."""

import types

import pytest
import torch
from building import build_objects
from runs import FOLDER, make_tree

from utils import build
from utils.build.data import describe_loading
from utils.distributed import Ranks


@pytest.mark.parametrize(("choice", "has_val", "names"), [
    ("always", True, ("test", "val", "test")), ("once", True, ("val", "val", "test")), ("never", True, ("val", "val", "val")),
    ("always", False, ("val", "val", "val")), ("once", False, (None, None, "val"))])
def test_which_split_is_evaluated_when(tmp_path, monkeypatch, choice, has_val, names):
    """Before step 1, during training and at the end, for the digits and for a folder with val/ only. A split with both uses is
    one object, so that it is evaluated once."""
    monkeypatch.chdir(make_tree(tmp_path / "tree").parent)
    data = build_objects("--test", choice, *([] if has_val else FOLDER)).data
    parts = data.evaluated_before, data.watched, data.final
    assert tuple(part and part.name for part in parts) == names
    assert (data.watched is data.final) == (names[1] == names[2])


def test_how_images_are_loaded_is_printed():
    def described(why="", workers=0, size=1, device="cpu"):
        loader = types.SimpleNamespace(not_cached=why, num_workers=workers)
        return describe_loading(loader, Ranks(0, size, 0, size, torch.device(device)))

    assert described() == "loading: all images stay in the memory of the CPU"
    assert described(device="cuda").endswith("of the GPU")
    assert described("why", 1) == "loading: images are read during training, by 1 loader process (why)"
    assert described("why", 3, 2) == "loading: images are read during training, by 3 loader processes on each GPU (why)"
    assert described("why") == "loading: images are read during training, by the training process (why)"


def test_each_rank_loads_its_own_part():
    objects = build_objects("--gradient_accumulation_steps", 2)
    second = Ranks(1, 2, 1, 2, objects.trainer.ranks.device)
    data = build.build_data(objects.config, objects.found, None, second, objects.built)
    assert list(data.sampler.own) == [2, 3] and data.sampler.micro_size == 16
    batch = next(iter(data.eval_loader(data.splits.val)))
    assert [sample.index for sample in batch.keys][:3] == [1, 3, 5]
