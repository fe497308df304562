"""batch.png: the first images that the model sees, drawn while the batches pass. The batches are the same without it."""

import dataclasses
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from building import ONE_RANK, build_objects
from PIL import Image, ImageDraw

from utils.data.loader import Batch
from utils.data.sampler import SampleIndices
from utils.files import StorageError
from utils.report import batch_picture
from utils.report.batch_picture import BATCH_FILE, BatchPicture, watch_first_batches


def batch(count=32, side=8, classes=4, step=0) -> Batch:
    images = torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(step))
    index = np.arange(count)
    return Batch(images, torch.arange(count) % classes, SampleIndices(step, 0, np.zeros_like(index), index))


def unmixed(images, targets, step, position):
    return images, targets


@pytest.fixture
def drawn(monkeypatch) -> list[str]:
    """Return a list of the texts that are drawn."""
    texts, text = [], ImageDraw.ImageDraw.text

    def note(self, at, words, *how):
        texts.append(words)
        text(self, at, words, *how)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", note)
    return texts


def picture_of(folder, mix=unmixed, warn=print) -> BatchPicture:
    return BatchPicture(folder / BATCH_FILE, "run: what the model sees", ["ant", "bee", "cat", "dog"], mix, warn)


def test_both_batches_are_in_the_picture(tmp_path, drawn):
    picture, first = picture_of(tmp_path), batch()
    evaluated, = picture.evaluation([batch(40, step=7)], "val")
    assert len(evaluated.images) == 40 and not list(tmp_path.iterdir())
    passed = list(picture.training([first, batch(step=1)]))
    assert passed[0] is first and len(passed) == 2
    assert drawn[:2] == ["run: what the model sees", "training, step 1: the first 16 of 32 images"]
    assert drawn[2:18] == ["ant", "bee", "cat", "dog"] * 4
    assert drawn[18:20] == ["evaluation on val: 16 of the first 40 images", "ant"]
    with Image.open(tmp_path / BATCH_FILE) as image:
        assert image.format == "PNG" and 900 < image.width < 1100 and 500 < image.height < 800
        tile = np.asarray(image.crop((8, 60, 8 + batch_picture.TILE, 60 + batch_picture.TILE)))
    colors = {tuple(color) for color in tile.reshape(-1, 3)}
    assert {tuple(color) for color in first.images[0].permute(1, 2, 0).reshape(-1, 3).tolist()} <= colors, "its own pixels"


def test_an_evaluation_that_comes_later_is_added(tmp_path, drawn):
    picture = picture_of(tmp_path)
    next(picture.training(iter([batch()])))
    size = (tmp_path / BATCH_FILE).stat().st_size
    list(picture.evaluation([batch(20), batch(20)], "test"))
    assert (tmp_path / BATCH_FILE).stat().st_size > size and "evaluation on test: 16 of the first 20 images" in drawn
    written = (tmp_path / BATCH_FILE).stat().st_mtime_ns
    list(picture.evaluation([batch(20)], "test"))
    assert (tmp_path / BATCH_FILE).stat().st_mtime_ns == written, "only the first"


def test_mixed_images_have_both_labels(tmp_path, drawn):
    """MixUp and CutMix as in the step, with the same random numbers."""
    objects = build_objects("--mixup_alpha", 1, "--cutmix_alpha", 1, "--train_batch_size", 8)
    mix, first = objects.trainer.criterion.mix, next(iter(objects.data.loader))
    picture = BatchPicture(tmp_path / BATCH_FILE, "run", list("0123456789"), mix, print)
    assert next(picture.training(iter([first]))) is first
    _, targets = mix(first.images.clone(), first.targets, 0, 0)
    labels = drawn[2:]
    assert len([label for label in labels if "%" in label]) == 2 * sum(int((target > 0).sum() == 2) for target in targets)
    one = targets[0].argmax()
    assert any(label == f"{targets[0][one]:.0%} {one}" or label == str(int(one)) for label in labels)


def test_a_full_disk_costs_the_picture_only(tmp_path, monkeypatch):
    def refuse(path, write):
        raise StorageError(f"cannot write {path} (no room)")

    monkeypatch.setattr(batch_picture, "atomic_write", refuse)
    warnings = []
    assert len(list(picture_of(tmp_path, warn=warnings.append).training([batch(), batch()]))) == 2
    assert warnings == [f"warning: cannot write {tmp_path / BATCH_FILE} (no room); the run continues without batch.png"]


def watched(folder, objects, main=True):
    ranks = ONE_RANK if main else dataclasses.replace(ONE_RANK, rank=1, size=2)
    run = SimpleNamespace(ranks=ranks, config=SimpleNamespace(name="run"),
                          outputs=SimpleNamespace(folder=folder, logger=SimpleNamespace(log=print)))
    return watch_first_batches(run, objects.trainer, objects.data)


def test_the_batches_of_a_run_stay_the_same(tmp_path):
    """All batches, in training and in evaluation. The state of the generators does not change."""
    flags = ("--mixup_alpha", 1, "--augmentation", "crop_flip", "--train_batch_size", 8, "--num_steps", 3)
    plain, other = build_objects(*flags), build_objects(*flags)
    state = torch.get_rng_state()
    data = watched(tmp_path, other)
    pairs = [(each.eval_loader(each.final.images), each.batches) for each in (plain.data, data)]
    for expected, found in zip(*pairs):
        for one, same in zip(expected, found, strict=True):
            assert torch.equal(one.images, same.images) and torch.equal(one.targets, same.targets) and one.keys == same.keys
    assert torch.equal(torch.get_rng_state(), state) and (tmp_path / BATCH_FILE).exists()


def test_only_the_main_process_draws_and_a_resumed_run_keeps_the_picture(tmp_path):
    objects = build_objects()
    assert watched(tmp_path, objects, main=False) is objects.data
    (tmp_path / BATCH_FILE).write_bytes(b"as the run began")
    assert watched(tmp_path, objects) is objects.data


def test_it_takes_little_time(tmp_path):
    """0.09 s of processor time for images of 224 px on two idle cores; at most 0.2 s."""
    picture = picture_of(tmp_path)
    list(picture.evaluation([batch(side=224)], "val"))
    began = time.thread_time()
    next(picture.training(iter([batch(side=224)])))
    assert time.thread_time() - began < 0.2


def test_names_of_any_letters_and_lengths(tmp_path, monkeypatch):
    picture = picture_of(tmp_path)
    picture.classes = ["犬" * 40, "a" * 300, "\udcff", "two\nlines"]
    next(picture.training(iter([batch()])))
    font = batch_picture.ImageFont.load_default(11)
    assert font.getlength(batch_picture._fitting("a" * 300, font, 112)) <= 112
    basic = batch_picture.ImageFont.load_default_imagefont()
    assert batch_picture._fitting("犬", basic, 112) == "?"


def test_small_words_have_gaps():
    """Pillow's own spacing at 11 pixels wrote "64images"."""
    sheet, font = Image.new("RGB", (200, 20), "white"), batch_picture.ImageFont.load_default(4 * batch_picture.SMALL)
    batch_picture._write(sheet, (2, 1), "64 images", font, 190)
    inked = (np.asarray(sheet.convert("L")) < 200).any(axis=0).nonzero()[0]
    assert np.diff(inked).max() > 2
