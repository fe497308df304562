"""batch.png: the first images that the model sees, drawn while the batches pass. The batches are the same without it."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from building import ONE_RANK, build_objects
from PIL import Image, ImageDraw, ImageFont
from PIL._util import DeferredError
from torch.utils._python_dispatch import TorchDispatchMode

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


def picture_of(folder, mix=unmixed, warn=print, step_images=32, micro_steps=1) -> BatchPicture:
    return BatchPicture(folder / BATCH_FILE, "run: what the model sees", ["ant", "bee", "cat", "dog"], mix, warn,
                        step_images=step_images, micro_steps=micro_steps)


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
    picture = picture_of(tmp_path, mix)
    picture.classes = list("0123456789")
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


def test_it_costs_little(tmp_path, monkeypatch):
    """0.07 s of processor time for 32 images of 224 px. Torch only picks images; its operations on pixels would use all cores."""
    class Operations(TorchDispatchMode):
        names = set()

        def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
            self.names.add(operation.overloadpacket.__name__)
            return operation(*args, **kwargs or {})

    measured, getlength = [], ImageFont.FreeTypeFont.getlength
    monkeypatch.setattr(ImageFont.FreeTypeFont, "getlength",
                        lambda self, *what: measured.append(what) or getlength(self, *what))
    picture, one, other = picture_of(tmp_path), batch(side=224), batch(side=224)
    picture.classes = [letter * 240 for letter in "abcd"]
    with Operations() as operations:
        list(picture.evaluation([other], "val"))
        next(picture.training(iter([one])))
    assert (tmp_path / BATCH_FILE).exists()
    assert operations.names <= {"select", "slice", "unbind", "_local_scalar_dense", "detach", "alias"}
    assert len(measured) <= 12 * 35


def test_a_step_in_micro_batches_is_shown_up_to_16_images(tmp_path, drawn):
    picture = picture_of(tmp_path, micro_steps=4, step_images=24)
    batches = picture.training(batch(6, step=step) for step in (0, 0, 0, 0, 1, 1))
    next(batches), next(batches)
    assert not drawn, "12 images"
    next(batches)
    assert drawn[1] == "training, step 1: the first 16 of 24 images" and len(drawn) == 18
    assert len(list(batches)) == 3 and len(drawn) == 18
    few = picture_of(tmp_path, micro_steps=2, step_images=6)
    assert len(list(few.training([batch(3), batch(3), batch(3, step=1)]))) == 3
    assert drawn[19] == "training, step 1: the first 6 of 6 images"


@pytest.mark.parametrize("missing, expected", [("nothing", ["\u00e4rger", "\u043e\u0441\u0430", "class 2", "\u00e4 ??"]),
                                               ("FreeType", ["\u00e4rger", "class 1", "class 2", "\u00e4 ??"]),
                                               ("Matplotlib", ["?rger", "class 1", "class 2", "class 3"])])
def test_names_in_any_letters(tmp_path, monkeypatch, missing, expected, drawn):
    """No letter becomes a box. Without FreeType, Pillow has a bitmap font with Latin letters; with it, one with English ones."""
    if missing == "FreeType":
        monkeypatch.setattr(ImageFont, "core", DeferredError(ImportError("The _imagingft C module is not installed")))
    if missing == "Matplotlib":
        monkeypatch.setattr(batch_picture.importlib.util, "find_spec", lambda name: None)
    batch_picture.load_font.cache_clear()
    picture = picture_of(tmp_path, warn=pytest.fail)
    picture.classes = ["\u00e4rger", "\u043e\u0441\u0430", "\u72ac", "a\u0308 \u72ac\udcff"]
    next(picture.training(iter([batch()])))
    batch_picture.load_font.cache_clear()
    assert (tmp_path / BATCH_FILE).exists() and drawn[2:6] == expected


def test_any_error_costs_the_picture_only(tmp_path, monkeypatch):
    """In one line; nothing is tried again."""
    def fail(*arguments):
        raise RuntimeError("no\nfont")

    warnings = []
    picture = picture_of(tmp_path, warn=warnings.append)
    monkeypatch.setattr(batch_picture, "load_font", fail)
    assert len(list(picture.evaluation([batch(), batch()], "val"))) == 2
    assert len(list(picture.training([batch(), batch(step=1)]))) == 2
    assert warnings == [f"warning: cannot draw {tmp_path / BATCH_FILE} (RuntimeError: no font); "
                        "the run continues without batch.png"]
    monkeypatch.undo()
    picture = picture_of(tmp_path, warn=warnings.append)
    next(picture.training(iter([batch()])))
    monkeypatch.setattr(batch_picture, "load_font", fail)
    list(picture.evaluation([batch()], "val"))
    assert warnings[1].endswith("; the run continues with the batch.png that it has")


def test_errors_of_the_batches_are_raised(tmp_path):
    def batches():
        yield batch(4)
        raise ValueError("image 5")

    with pytest.raises(ValueError, match="image 5"):
        list(picture_of(tmp_path, micro_steps=2).training(batches()))


def test_long_names_lose_their_middle(tmp_path, drawn):
    """Names of classes often differ at their end only."""
    picture = picture_of(tmp_path)
    names = [f"{'common beginning ' * 15}{end}" for end in ("ant", "bee", "cat")]
    picture.classes = [*names, "two\nlines"]
    next(picture.training(iter([batch()])))
    font = batch_picture.load_font(batch_picture.SMALL)
    for text, name in zip(drawn[2:5], names):
        assert text.startswith("common") and "..." in text and text.endswith(name[-3:])
        assert 90 < font.getlength(text) / batch_picture.TIMES <= batch_picture.TILE
    assert drawn[5] == "two lines"
    assert font.getlength(batch_picture._fitting("a" * 10**6, font, 448)) <= 448
    assert batch_picture._fitting("a" * 30, font, 1) == "..."


def test_small_words_have_gaps():
    """Pillow's own spacing at 11 pixels wrote "64images"."""
    sheet, font = Image.new("RGB", (200, 20), "white"), batch_picture.load_font(batch_picture.SMALL)
    batch_picture._write(sheet, (2, 1), "64 images", font, 190)
    inked = (np.asarray(sheet.convert("L")) < 200).any(axis=0).nonzero()[0]
    assert np.diff(inked).max() > 2
