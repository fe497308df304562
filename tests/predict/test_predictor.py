"""From images to labels: the same numbers in any batch, in evaluation and from Python."""

import dataclasses
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from building import write_checkpoint
from miniatures import png
from PIL import Image, ImageOps

from models import ModelError, load_model
from utils.build import open_model
from utils.data.splits import ImageError
from utils.predict.predictor import Answers, Work, loading_processes
from utils.predict.sources import Batches, open_sources


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """Make a run of a tiny model on small photographs: files of every kind, one of them truncated and one not an image."""
    root = tmp_path_factory.mktemp("predictor")
    (root / "p").mkdir()
    draw = np.random.default_rng(0)
    for number in range(9):
        pixels = draw.integers(0, 256, (5, 6, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((60 + number, 50), Image.BICUBIC).save(root / f"p/{number}.jpg", quality=95)
    image = Image.open(root / "p/1.jpg")
    image.convert("L").save(root / "p/gray.png")
    image.convert("RGBA").save(root / "p/alpha.png")
    Image.fromarray(draw.integers(0, 65536, (20, 30), dtype=np.uint16)).save(root / "p/deep.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(root / "p/turned.jpg", exif=exif, quality=95)
    (root / "p/cut.jpg").write_bytes((root / "p/2.jpg").read_bytes()[:400])
    (root / "p/none.jpg").write_bytes(b"no image")
    write_checkpoint(root / "r/best.pt", "--eval_crop", 0.875, "--img_size", 16)
    return root


def work_of(opened, **more) -> Work:
    return Work(opened.model, opened.transform, opened.reading, 3, 4, device="cpu", workers=0, **more)


def answers_of(work: Work, paths, size: int = 4) -> Answers:
    items, work = list(paths), dataclasses.replace(work, size=size)
    parts = list(work([items[first:first + size] for first in range(0, len(items), size)]))
    bad = [(number * size + position, why) for number, part in enumerate(parts) for position, why in part.bad]
    return Answers(*(np.concatenate([part[number] for part in parts]) for number in range(3)), tuple(bad))


def test_numbers_do_not_depend_on_the_batch_nor_on_who_loads(place):
    opened = open_model(place / "r")
    whole = answers_of(work_of(opened), open_sources([str(place / "p")]))
    assert whole.labels.shape == (13, 3) and len({*whole.labels[:, 0]}) > 2 and (np.diff(whole.probabilities) <= 0).all()
    assert "truncated" in whole.bad[0][1] and len(whole.bad) == 2
    assert whole.bad[1][1].startswith("cannot be read as an image (none of the formats JPEG, PNG")
    assert (whole.losses == 0).all()
    for size, workers in ((1, 0), (64, 0), (5, 1)):
        other = answers_of(dataclasses.replace(work_of(opened), workers=workers), open_sources([str(place / "p")]), size)
        assert (other.labels == whole.labels).all() and other.bad == whole.bad
        np.testing.assert_allclose(other.probabilities, whole.probabilities, atol=1e-6)


def test_loader_processes_return_their_batches_when_no_image_follows(place):
    """Batches without images give results without rows."""
    items = list(open_sources([str(place / "p")]))
    work, given = dataclasses.replace(work_of(open_model(place / "r")), workers=1), []
    batches = Batches(itertools.chain(items, itertools.repeat(None)), 4)
    for _ in work(given.append(batch) or batch for batch in batches):
        batches.answered(given.pop(0))
        if not batches.owed:
            break
    assert not any(given)                       # the batches still in progress have no images


def test_a_file_that_hangs_its_reading_process_does_not_stop_the_others(monkeypatch):
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    for cores, processes, found in ((1, 1, (1, 1)), (2, 2, (1, 1)), (2, 1, (2, 1)), (16, 2, (4, 7))):
        for name in ("predict.predictor", "data.loader"):
            monkeypatch.setattr(f"utils.{name}.core_count", lambda cores=cores: cores)
        assert (loading_processes("folder", processes, cpu), loading_processes("csv", processes, gpu)) == found
        assert loading_processes("digits", processes, cpu) == 0


def test_every_batch_is_computed_at_one_shape(place):
    opened, shapes = open_model(place / "r"), []
    opened.model.register_forward_hook(lambda module, inputs, output: shapes.append(tuple(inputs[0].shape)))
    answers_of(work_of(opened), open_sources([str(place / "p")]))                 # 15 images, two of them unreadable
    assert set(shapes) == {(4, 3, 16, 16)}


def test_predictions_from_python_have_the_same_numbers(place):
    paths = sorted(str(path) for path in (place / "p").iterdir())
    opened = open_model(place / "r")
    whole = answers_of(work_of(opened), open_sources([str(place / "p")]))
    model = load_model(place / "r").train()
    found = model.predict(paths, top_k=3)
    readable = [one for one in found if not one.error]
    assert model.training and [bool(one.error) for one in found] == [Path(path).name in ("cut.jpg", "none.jpg") for path in paths]
    assert [one.label for one in readable] == [opened.classes[label] for label in whole.labels[:, 0]]
    np.testing.assert_allclose([[number for _, number in one.top] for one in readable], whole.probabilities, atol=2e-6)
    first = model.predict(paths[0], top_k=3)
    assert first == model.predict(Path(paths[0]), 3) == model.predict(Image.open(paths[0]), top_k=3)
    assert first.label == found[0].label and (first.label, first.probability) == first.top[0]
    assert model.predict([]) == [] and len(model.predict(paths[0]).top) == 1
    decoded = Image.open(paths[0])
    decoded.load()                                             # full size: a JPEG decoded smaller has other pixels
    assert model.predict(decoded).label == first.label
    with pytest.raises(ValueError, match="top_k must be from 1 to 10, the model's number of classes, got 11"):
        model.predict(paths, top_k=11)


def test_an_unreadable_image_raises_and_in_a_list_its_entry_has_the_error(place):
    """For a path, a path that does not exist, and an image in memory. The other images of the list get labels."""
    model = load_model(place / "r")
    good = place / "p/1.jpg"
    for bad, reason in ((place / "p/none.jpg", "cannot be read as an image"), (str(place / "p/gone.jpg"), "no such file"),
                        (Image.new("F", (3, 3)), "mode F cannot be read")):
        with pytest.raises(ImageError, match=reason) as caught:
            model.predict(bad)
        assert isinstance(caught.value, ValueError)
        assert isinstance(bad, Image.Image) or str(caught.value).startswith(str(bad))
        first, second = model.predict([bad, good])
        assert reason in first.error and (first.label, first.probability, first.top) == (None, None, ())
        assert second == model.predict(good) and not second.error


def test_an_image_in_memory_is_read_as_its_file(place):
    """With an EXIF rotation, one channel or an alpha channel. An image of unknown range is reported in one line."""
    model = load_model(place / "r")
    for name in ("turned.jpg", "gray.png", "alpha.png", "deep.png"):
        image = Image.open(place / "p" / name)
        image.load()
        by_file = model.predict(place / "p" / name, 3)
        for (label, number), (other, expected) in zip(model.predict(image, 3).top, by_file.top):
            assert label == other and number == pytest.approx(expected, abs=1e-3)
    assert model.predict(place / "p/turned.jpg", 3) != model.predict(place / "p/1.jpg", 3)
    with pytest.raises(ImageError, match=r"an image of mode F cannot be read \(32 bits per pixel"):
        model.predict(Image.new("F", (3, 3)))
    assert "mode F" in model.predict([Image.new("F", (3, 3))])[0].error


@pytest.mark.parametrize("ending", ["tif", "gif"])
def test_a_later_frame_of_a_file_is_used_as_given(place, tmp_path, ending):
    frames, model = [Image.open(place / f"p/{number}.jpg").resize((50, 40)) for number in (0, 3)], load_model(place / "r")
    frames[0].save(tmp_path / f"x.{ending}", save_all=True, append_images=frames[1:])
    image = Image.open(tmp_path / f"x.{ending}")
    first = model.predict(image, 3)
    assert first == model.predict(tmp_path / f"x.{ending}", 3)
    image.seek(1)
    assert model.predict(image, 3) == model.predict(image.convert("RGB"), 3) != first


def test_an_input_that_is_neither_path_nor_image_is_refused(place):
    model = load_model(place / "r")
    for given, words in ((np.zeros((3, 4, 3)), "not ndarray of ndarray"), (b"a.png", "not bytes"), (3, "not int"),
                         (b"", "not bytes"), ([str(place / "p/1.jpg"), None], "not list of NoneType")):
        with pytest.raises(TypeError, match=f"predict takes a path, a PIL image, or a list of them, {words}"):
            model.predict(given)
    assert len(model.predict(place / f"p/{number}.jpg" for number in range(2))) == 2


def test_models_of_another_program_and_untrained_ones_predict(place, tmp_path):
    """Settings of reading that are "auto" are decided by the images."""
    opened = open_model(None)
    assert opened.reading.unknown == {"exif", "intensity_range", "alpha"}
    model = opened.model
    with pytest.raises(ModelError, match=r"load it with models\.load_model"):
        model.predict(str(place / "p/1.jpg"))
    (tmp_path / "a.png").write_bytes(png())
    pretrained = load_model(Path("assets/ViT-Nano_2-letters.npz").resolve())
    assert pretrained.predict(tmp_path / "a.png", 2).top[1][0].startswith("class ")
    with pytest.raises(ModelError, match=r"^no checkpoint at .*nothing"):
        load_model(tmp_path / "nothing")


def test_a_mirror_image_counts_if_the_run_uses_it(tmp_path, place):
    write_checkpoint(tmp_path / "r/best.pt", "--tta", "flip")
    model = load_model(tmp_path / "r")
    image = Image.open(place / "p/3.jpg")
    image.load()
    both, mirrored = model.predict([image, ImageOps.mirror(image)], 10)
    assert dict(both.top) == pytest.approx(dict(mirrored.top), abs=5e-3)


def test_the_rounding_of_products_is_restored(place):
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    try:
        torch.set_float32_matmul_precision("high")
        load_model(place / "r").predict(place / "p/1.jpg")
        assert torch.get_float32_matmul_precision() == "high" and torch.backends.cudnn.allow_tf32 == before[1]
    finally:
        torch.set_float32_matmul_precision(before[0])


def test_a_converted_model_predicts_too(place):
    model = load_model(place / "r")
    label = model.predict(place / "p/1.jpg").label
    assert model.bfloat16().predict(place / "p/1.jpg").label == label
