"""JPEGs that are decoded as far as a crop needs: same pixels, random draws and errors as for the fully decoded image."""

import io
import os
import sys
import types

import numpy as np
import pytest
import torch
from mutations import mutated
from PIL import Image, ImageFile, ImageOps
from torchvision.transforms import InterpolationMode, v2

from utils.attention.edit_transform import transform_with_edit
from utils.attention.edits import Edit
from utils.data import decode, transforms
from utils.data.image_files import FileImages
from utils.data.reading import ORIENTATION, Reading
from utils.data.splits import ImageError
from utils.data.transforms import eval_transform, train_transform
from utils.randomness import seeded

SIZE = (32, 32)
FOLLOW = Reading(exif="follow")


def photograph(width: int, height: int, seed: int = 0) -> Image.Image:
    """Return noise of every scale, as strong as in photographs, with a sharp edge."""
    random = np.random.default_rng(seed)
    pixels = np.full((height, width, 3), 128.0)
    for scale in (1, 2, 4, 8, 16, 32, 64):
        coarse = random.normal(0, 4 * scale ** 0.5, (-(-height // scale), -(-width // scale), 3)) * 0.6
        pixels += coarse.repeat(scale, 0).repeat(scale, 1)[:height, :width]
    pixels[:, width // 3:width // 2] *= 0.4
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def jpeg(image: Image.Image, form: str = "JPEG", **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, form, **{"quality": 90} | options)
    return stream.getvalue()


def split(folder, *contents: bytes) -> FileImages:
    for number, content in enumerate(contents):
        (folder / f"{number}.jpg").write_bytes(content)
    return FileImages([(str(folder / f"{number}.jpg"), number) for number in range(len(contents))], folder)


KINDS = {"color": {}, "full color": {"subsampling": 0}, "4:2:2": {"subsampling": 1}, "progressive": {"progressive": True},
         "restarts": {"restart_marker_blocks": 3}, "RGB inside": {"keep_rgb": True}}


@pytest.mark.parametrize("gray", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_fully_decoded_pixels_equal_pillows(tmp_path, kind, gray):
    picture = photograph(75, 61).convert("L" if gray else "RGB")
    options = {} if gray and kind == "RGB inside" else KINDS[kind]
    files = split(tmp_path, jpeg(picture, **options), jpeg(picture, "MPO", save_all=True, append_images=[Image.new("L", (9, 9))]))
    for index in range(2):
        image, label = files.source(index)
        assert isinstance(image, decode.Undecoded) and image.size == (75, 61) and label == index
        pixels, reduction = decode.decoded(image, (40, 40), SIZE, 1.0)
        assert reduction == 1 and pixels.dtype == torch.uint8
        assert np.array_equal(pixels.permute(1, 2, 0), files[index][0])


@pytest.mark.parametrize("mode", ["CMYK", "RGB", "L", "RGBA", "P", "I;16"])
def test_other_images_are_decoded_at_once(tmp_path, mode):
    form = "JPEG" if mode == "CMYK" else "PNG"
    files = split(tmp_path, jpeg(photograph(40, 30).convert(mode if mode != "I;16" else "I").convert(mode), form))
    image, _ = files.source(0)
    assert not isinstance(image, decode.Undecoded) and image.mode == "RGB" and np.array_equal(image, files[0][0])


def test_files_are_closed_and_large_ones_decoded_at_once(tmp_path, monkeypatch):
    files = split(tmp_path, jpeg(photograph(40, 30)))
    before = len(os.listdir("/proc/self/fd"))
    kept = [files.source(0) for _ in range(5)]
    assert len(os.listdir("/proc/self/fd")) == before and len(kept) == 5
    monkeypatch.setattr(decode, "MAX_HELD_BYTES", 100)
    image, _ = files.source(0)
    assert not isinstance(image, decode.Undecoded) and np.array_equal(image, files[0][0])


# --------------------------------------------------------------------------------------------- no more than needed


@pytest.mark.parametrize("margin", [1.0, 2.0])
@pytest.mark.parametrize("crop", [(31, 500), (63, 64), (64, 64), (127, 129), (300, 403)])
def test_decoded_crop_has_at_least_the_pixels_of_the_result(tmp_path, crop, margin):
    files = split(tmp_path, jpeg(photograph(603, 405)))
    pixels, reduction = decode.decoded(files.source(0)[0], crop, SIZE, margin)
    width, height = pixels.size if reduction > 1 else (pixels.shape[2], pixels.shape[1])
    assert (width, height) == (-(-603 // reduction), -(-405 // reduction))
    assert reduction == 1 or min(crop) / reduction >= margin * 32
    assert reduction == 8 or min(crop) / (2 * reduction) < margin * 32          # and at most twice


def theirs(kind: str, interpolation: InterpolationMode) -> v2.Compose:
    """Return torchvision's own steps, for the fully decoded image"""
    steps = {"crop_flip": [v2.RandomResizedCrop(SIZE, (0.05, 1), interpolation=interpolation), v2.RandomHorizontalFlip()],
             "none": [v2.Resize(SIZE, interpolation=interpolation)],
             "eval": [v2.Resize(SIZE, interpolation=interpolation)],
             "eval crop": [v2.Resize(36, interpolation=interpolation), v2.CenterCrop(SIZE)]}
    return v2.Compose([*steps[kind], v2.PILToTensor()])


def ours(kind: str, interpolation: str) -> v2.Compose:
    if kind.startswith("eval"):
        return eval_transform(SIZE, interpolation=interpolation, crop=0.875 if kind == "eval crop" else 0.0)
    return train_transform(kind, SIZE, interpolation=interpolation)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("kind", ["crop_flip", "none", "eval", "eval crop"])
def test_images_are_close_to_those_of_the_fully_decoded_image(tmp_path, kind, interpolation):
    """Within one gray level for full decoding, and within the figures of decode.decoded() otherwise. The crop boxes and flips
    are torchvision's, since otherwise far more would differ, and the generator has the same state afterwards."""
    files = split(tmp_path, *(jpeg(photograph(*size, seed)) for seed, size in enumerate([(60, 45), (403, 301), (300, 420)])))
    expected, transform = theirs(kind, InterpolationMode(interpolation)), ours(kind, interpolation)
    reduced = []
    for index in range(3):
        for epoch in range(8 if kind == "crop_flip" else 1):
            with seeded(0, index, epoch):
                whole, after = expected(files[index][0]), torch.rand(2)
            with seeded(0, index, epoch):
                image = transform(files.source(index)[0])
                assert torch.equal(torch.rand(2), after)
            gap = (image.int() - whole.int()).abs().float()
            assert image.shape == whole.shape and image.dtype == torch.uint8
            if index == 0:
                assert gap.max() <= 1 and gap.mean() < 0.06
            elif gap.max() > 1:
                reduced.append(gap)
                assert gap.mean() < (1 if kind.startswith("eval") else 3.5) and gap.quantile(0.99) < 16
                assert (image.float() - whole.float()).mean().abs() < 0.3
    assert len(reduced) >= (8 if kind == "crop_flip" else 1)
    means = torch.stack([gap.mean() for gap in reduced])
    assert means.mean() < (0.8 if kind.startswith("eval") else 2.0)


TENSOR_KINDS = [("crop_flip", {}), ("pad_flip", {}), ("none", {"rotation": 10.0, "color_jitter": 0.4}),
                ("crop_flip", {"randaugment_ops": 2, "random_erasing": 0.5})]


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("kind", "knobs"), TENSOR_KINDS)
@pytest.mark.parametrize("side", [20, 100])
def test_tensor_is_transformed_like_its_pil_image(kind, knobs, channels, side):
    """With the same random draws, within one gray level from the resize; operations such as equalize can amplify it."""
    transform = train_transform(kind, SIZE, channels=channels, **knobs)
    picture = photograph(side, side + 7)
    stored = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
    for pixels in (stored, stored.contiguous()):
        for epoch in range(6):
            results = []
            for image in (picture, pixels):
                with seeded(1, epoch):
                    results.append((transform(image), torch.rand(1)))
            (one, after), (other, also_after) = results
            gap = (one.int() - other.int()).abs().float()
            assert torch.equal(after, also_after) and one.shape == other.shape == (channels, *SIZE)
            assert gap.mean() < (1 if "randaugment_ops" in knobs else 0.1) and (gap.max() <= (64 if knobs else 1))
    assert torch.equal(stored, torch.from_numpy(np.array(picture)).permute(2, 0, 1))          # unchanged


def test_edit_follows_an_image_that_is_not_decoded(tmp_path):
    files = split(tmp_path, jpeg(photograph(300, 210)))
    edit = Edit("0.jpg", "", np.random.default_rng(0).random((7, 7)).astype(np.float32), np.ones((7, 7), bool))
    transform = train_transform("crop_flip", SIZE)
    for epoch in range(6):
        with seeded(0, epoch):
            image, moved = transform_with_edit(transform, files.source(0)[0], edit, (4, 4))
        with seeded(0, epoch):
            assert torch.equal(transform(files.source(0)[0]), image)
        with seeded(0, epoch):
            assert torch.equal(transform_with_edit(transform, files[0][0], edit, (4, 4))[1], moved)


# -------------------------------------------------------------------------------------------------- turned images


def turned_files(folder, orientation: int, size=(403, 301)) -> tuple[FileImages, FileImages]:
    """Return a photograph with an orientation that is followed, and its upright pixels, stored without loss."""
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    picture = photograph(*size)
    (folder / "turned.jpg").write_bytes(jpeg(picture, exif=exif))
    with Image.open(folder / "turned.jpg") as stored:
        ImageOps.exif_transpose(stored).save(folder / "upright.png")
    return tuple(FileImages([(str(folder / name), 0)], folder, FOLLOW) for name in ("turned.jpg", "upright.png"))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_turned_photograph_is_cropped_like_the_upright_one(tmp_path, orientation):
    turned, expected = turned_files(tmp_path, orientation)
    image, upright = turned.source(0)[0], expected[0][0]
    assert turned.dimensions(0) == image.size == upright.size == ((301, 403) if orientation > 4 else (403, 301))
    assert np.array_equal(turned[0][0], upright)
    transforms_of = {"crop_flip": train_transform("crop_flip", SIZE), "pad": train_transform("pad", (20, 40)),
                     "eval": eval_transform((24, 40)), "eval crop": eval_transform((24, 40), crop=0.875)}
    for name, transform in transforms_of.items():
        for epoch in range(6 if name == "crop_flip" else 1):
            with seeded(0, epoch):
                one, after = transform(turned.source(0)[0]), torch.rand(2)
            with seeded(0, epoch):
                other = transform(upright)
                assert torch.equal(torch.rand(2), after)
            gap = (one.int() - other.int()).abs().float()
            assert one.shape == other.shape and gap.mean() < 4 and gap.quantile(0.99) < 16, name


def test_fully_decoded_turned_photograph_has_the_same_pixels(tmp_path):
    for orientation in range(1, 9):
        turned, expected = turned_files(tmp_path, orientation, (60, 45))
        transform = train_transform("crop_flip", SIZE)
        for epoch in range(4):
            with seeded(0, epoch):
                one = transform(turned.source(0)[0])
            with seeded(0, epoch):
                assert (one.int() - transform(expected[0][0]).int()).abs().max() <= 2, orientation


def test_edit_follows_a_turned_photograph(tmp_path):
    turned, expected = turned_files(tmp_path, 6)
    edit = Edit("0.jpg", "", np.random.default_rng(0).random((7, 7)).astype(np.float32), np.ones((7, 7), bool))
    transform = train_transform("crop_flip", SIZE)
    for epoch in range(4):
        with seeded(0, epoch):
            image, moved = transform_with_edit(transform, turned.source(0)[0], edit, (4, 4))
        with seeded(0, epoch):
            other, also_moved = transform_with_edit(transform, expected[0][0], edit, (4, 4))
        assert torch.equal(moved, also_moved) and (image.int() - other.int()).abs().float().mean() < 4


# ------------------------------------------------------------------------------------------------------- HEIC


HEIC = b"\0\0\0\x18ftypheic" + b"\0" * 40


@pytest.fixture
def plugin(monkeypatch):
    """Replace pillow-heif by a module that reads every HEIC file as 6 x 4 px of one color."""
    class HeifImage(ImageFile.ImageFile):
        format = "HEIF"

        def _open(self):
            self._mode, self._size, self.tile = "RGB", (6, 4), []

        def load(self):
            if self._im is None:
                self._im = Image.new("RGB", (6, 4), (10, 20, 30)).im
            return Image.Image.load(self)

    module = types.ModuleType("pillow_heif")
    module.register_heif_opener = lambda: Image.register_open("HEIF", HeifImage, lambda start: start[4:8] == b"ftyp")
    monkeypatch.setitem(sys.modules, "pillow_heif", module)
    monkeypatch.setattr(Image, "OPEN", dict(Image.OPEN))
    monkeypatch.setattr(Image, "ID", list(Image.ID))
    decode.can_read_heif.cache_clear()
    yield
    decode.can_read_heif.cache_clear()


def test_heic_is_read_if_its_plugin_is_installed(tmp_path, plugin):
    for name in ("a.heic", "b.jpg"):                      # whatever its extension
        (tmp_path / name).write_bytes(HEIC)
        files = FileImages([(str(tmp_path / name), 1)], tmp_path, FOLLOW)
        image, label = files.source(0)
        assert (image.size, image.getpixel((0, 0)), label, files.dimensions(0)) == ((6, 4), (10, 20, 30), 1, (6, 4))


def test_heic_without_its_plugin_is_reported(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    decode.can_read_heif.cache_clear()
    (tmp_path / "a.heic").write_bytes(HEIC)
    with pytest.raises(ImageError, match=r"a HEIC image, which needs .*pip install pillow-heif"):
        FileImages([(str(tmp_path / "a.heic"), 0)])[0]
    decode.can_read_heif.cache_clear()


# ------------------------------------------------------------------------------------------------------- damaged


def verdict(read) -> tuple[str, str] | None:
    """Return the error, with and without the advice; None if the image was read"""
    try:
        read()
    except ImageError as error:
        return str(error), error.plain
    return None


@pytest.mark.parametrize("margin", [1.0, 1000.0])
def test_transform_reports_damage_like_full_decoding(tmp_path, margin, monkeypatch, capfd):
    """The error must not depend on the crop, which decides whether an image is decoded in part or in full."""
    monkeypatch.setattr(transforms, "TRAIN_MARGIN", margin)
    whole = [jpeg(photograph(90, 70)), jpeg(photograph(90, 70), progressive=True), jpeg(photograph(90, 70).convert("L"))]
    cut = [content[:-count] for content in whole for count in (2, 30, 1000)]
    files = split(tmp_path, *cut, *(mutated(whole[seed % 3], seed) for seed in range(150)))
    transform = train_transform("none", SIZE)
    refused = []
    for index in range(len(files)):
        expected = verdict(lambda index=index: files[index])
        assert verdict(lambda index=index: transform(files.source(index)[0])) == expected, index
        refused.append(expected is not None)
        if index < 9:
            assert refused[-1] and capfd.readouterr() == ("", "")          # truncated files, about which libjpeg would warn
    assert 9 < sum(refused) < len(refused)


@pytest.mark.parametrize("gone", [False, True])
def test_pillow_decodes_what_torchvision_cannot(monkeypatch, tmp_path, gone):
    """Also if torchvision was built without its JPEG decoder, or has removed it, as it has announced."""
    def refuses(*_):
        raise RuntimeError("not compiled with libjpeg support")

    monkeypatch.setattr("torchvision.io.decode_jpeg", refuses)
    if gone:
        monkeypatch.delattr("torchvision.io.decode_jpeg")
    files = split(tmp_path, jpeg(photograph(60, 45)))
    gap = train_transform("none", SIZE)(files.source(0)[0]).int() - train_transform("none", SIZE)(files[0][0]).int()
    assert gap.abs().max() == 0
