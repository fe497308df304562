"""Inspects a sample of a data set's image files when it is opened, to find the rule by which all of them are read (reading.py)
and to warn about images that the rule does not fit.

Only the headers of the sample are read, so a start is fast however many images there are. Only images with 16 bits or with
transparent parts are decoded, about MAX_DECODED pixels at most.
"""

import contextlib
import dataclasses
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from .decode import INSTALL_HEIF, can_read_heif
from .image_files import HEIF_EXTENSIONS, FileImages, shown
from .reading import (
    AUTO,
    FULL_RANGE,
    UPRIGHT,
    Reading,
    flatten,
    is_color16,
    is_gray16,
    orientation,
    tiff_orientation,
    values16,
)
from .splits import DataError, ImageError, Splits, abbreviate

SAMPLE = 256                      # images whose headers are read
MAX_DECODED = 4_000_000           # pixels of the sample that are decoded
MAX_INSPECTED = 250_000           # pixels of one image that are inspected, evenly spaced
FAINT = 16                        # of 256 levels: an image with fewer between its darkest and lightest pixel shows nothing
HIGHEST = (255, 1023, 4095, 16383, 32767, 65535)       # of 8, 10, 12, 14, 15 (signed) and 16 bits
OUTSIDE = 0.1                     # percent of an image's pixels, such as dead ones, that are ignored in finding its range
ALPHAS = ("white", "black", "mask", "ignore")           # the first that shows the images is used
FEW = 0.1                         # ratio of images that white may hide, such as a white cup, before others are tried


@dataclasses.dataclass
class Survey:
    """What was found in `images` sampled files. The lists have one entry for each decoded image of their kind."""

    images: int = 0
    turned: int = 0                                     # with an EXIF orientation, followed or not
    turned_tiffs: int = 0                               # with a TIFF orientation, which Pillow always follows
    deep: int = 0                                       # with 16 bits per channel
    transparent: int = 0
    ranges: list[tuple[str, int, int]] = dataclasses.field(default_factory=list)             # path, darkest, lightest value
    contrasts: list[tuple[str, dict[str, int]]] = dataclasses.field(default_factory=list)    # path, levels 0..255 by ALPHAS


def read_as(splits: Splits, wish: Reading, follow_exif: bool) -> Splits:
    """Return the data set with its files read by the rule `wish`; what is "auto" there is found from the images.

    Notes report what was found. HEIC images that cannot be read here are skipped, with a warning. `follow_exif` is what "auto"
    means for EXIF. Raises DataError if no rule can be found, or a class is left without images.
    """
    wish = wish.replace(exif="follow" if follow_exif else "off") if wish.exif == AUTO else wish
    splits = _without_heif(splits)
    files = [split for split in (splits.train, *splits.held_out.values()) if isinstance(split, FileImages)]
    reading, notes = _find(files, wish) if wish.unknown else (wish, ())
    splits = splits.changed(lambda split: split.read_as(reading) if split in files else split)
    return splits.replace(*notes, reading=reading)


def loose_files(samples: list[tuple[str, int]], root: str | Path, wish: Reading) -> FileImages:
    """Return images that are not in a data set, read as `wish` says; "auto" is found from the images (EXIF: followed)."""
    wish = wish.replace(exif="follow") if wish.exif == AUTO else wish
    reading = _find([FileImages(samples)], wish)[0] if wish.unknown else wish
    return FileImages(samples, root, reading)


def faint_images(files: FileImages) -> str:
    """Return a warning if 16-bit images of a sample become nearly one color when they are read as `files` are, perhaps by the
    rule of another data set; else ''."""
    survey, (low, high) = take([files]), files.reading.intensity_range
    faint = _faint(survey, low, high)
    return _warning(survey, faint, f"the model reads {low:,} to {high:,} as black to white") if faint else ""


def _without_heif(splits: Splits) -> Splits:
    """Remove HEIC images if pillow-heif is not installed."""
    endings = Counter()

    def without(split: Dataset) -> Dataset:
        samples = getattr(split, "samples", [])
        skipped = [path for path, _ in samples if path.lower().endswith(HEIF_EXTENSIONS)]
        if not skipped or can_read_heif():
            return split
        endings.update(Path(path).suffix.lower() for path in skipped)
        return FileImages([each for each in samples if not each[0].lower().endswith(HEIF_EXTENSIONS)], split.root, split.reading)

    kept = splits.changed(without)
    if not endings:
        return splits
    counts = " and ".join(f"{count:,} {ending}" for ending, count in sorted(endings.items()))
    gone = set(splits.train.targets.tolist()) - set(kept.train.targets.tolist())
    if gone:
        raise DataError(f"{splits.train.root}: the images of class {abbreviate(splits.classes[label] for label in gone)} are "
                        f"all {' and '.join(sorted(endings))} files, which this Python cannot read. Install the package for "
                        f"them: {INSTALL_HEIF}")
    subject = "image is" if endings.total() == 1 else "images are"
    return kept.replace(f"warning: {counts} {subject} skipped. To read HEIC: {INSTALL_HEIF}")


# ------------------------------------------------------------------------------------------------------ the sample


def _find(files: list[FileImages], wish: Reading) -> tuple[Reading, tuple[str, ...]]:
    """-> (the rule, notes about it)"""
    survey = take(files)
    low_high, notes = _intensity_range(survey, wish.intensity_range)
    alpha, more = _alpha(survey, wish.alpha)
    reading = wish.replace(intensity_range=low_high, alpha=alpha)
    found = []
    if survey.turned:
        found.append(f"{survey.turned} with an EXIF orientation, which is " + (
            "followed" if reading.exif == "follow" else "not followed (--exif follow)"))
    if survey.turned_tiffs:
        found.append(f"{survey.turned_tiffs} TIFF with an orientation, which is always followed")
    if survey.deep:
        found.append("{} with 16 bits per channel, {:,} to {:,} read as black to white".format(survey.deep, *low_high))
    if survey.transparent:
        does = {"mask": "which is used as the image", "ignore": "which is ignored"}
        found.append(f"{survey.transparent} with an alpha channel, " + does.get(alpha, f"put on {alpha}"))
    if found:
        notes.insert(0, f"images: of {survey.images} sampled, {'; '.join(found)}")
    return reading, (*notes, *more)


def take(files: list[FileImages]) -> Survey:
    """Inspect a sample, spread over all the files in an order that is random, but always the same."""
    survey, decoded = Survey(), 0
    starts = np.cumsum([0, *map(len, files)])
    count = min(SAMPLE, int(starts[-1]))
    order = np.random.default_rng(0).permutation(count) * int(starts[-1]) // max(count, 1)
    for place in order.tolist():
        number = int(np.searchsorted(starts, place, side="right")) - 1
        split, index = files[number], int(place - starts[number])
        with contextlib.suppress(ImageError), split.opened(index) as image:
            decoded += _inspect_image(survey, shown(split.samples[index][0]), image, MAX_DECODED - decoded)
    return survey


def _inspect_image(survey: Survey, path: str, image: Image.Image, room: int) -> int:
    """Add an image, whose header is read, to the survey -> how many of its pixels were decoded: `room` at most, unless it is the
    first of its kind."""
    survey.images += 1
    survey.turned += orientation(image) != UPRIGHT
    survey.turned_tiffs += tiff_orientation(image) != UPRIGHT
    deep = is_gray16(image) or is_color16(image)
    transparent = image.has_transparency_data and not is_gray16(image)
    survey.deep += deep
    survey.transparent += transparent
    pixels = image.width * image.height
    first = (deep and not survey.ranges) or (transparent and not survey.contrasts)
    if not (deep or transparent) or (pixels > room and not first):
        return 0
    step = 1 + int((pixels / MAX_INSPECTED) ** 0.5)
    if deep:
        values = values16(image)[::step, ::step]
        low, high = np.percentile(values, (OUTSIDE, 100 - OUTSIDE), method="nearest")
        survey.ranges.append((path, int(min(low, values.min()) if values.min() < 0 else low), int(high)))
    if transparent:
        size = -(-image.width // step), -(-image.height // step)
        small = image if step == 1 else image.resize(size, Image.Resampling.NEAREST)
        survey.contrasts.append((path, {alpha: _contrast(flatten(small, alpha)) for alpha in ALPHAS}))
    return pixels


def _contrast(image: Image.Image) -> int:
    """Return the levels between the darkest and the lightest value of a channel, for the channel with the most."""
    extrema = image.getextrema() if len(image.getbands()) > 1 else (image.getextrema(),)
    return max(high - low for low, high in extrema)


# -------------------------------------------------------------------------------------------------------- the rules


def _intensity_range(survey: Survey, wish: tuple[int, int] | str) -> tuple[tuple[int, int], list[str]]:
    """-> ((low, high), warnings). Raises DataError for values below 0, since the images do not show which value is black."""
    if not survey.ranges:
        return (FULL_RANGE if wish == AUTO else wish), []
    lowest, highest = min(low for _, low, _ in survey.ranges), max(high for *_, high in survey.ranges)
    if lowest < 0 and (wish == AUTO or wish[0] >= 0):
        path = next(path for path, low, _ in survey.ranges if low == lowest)
        raise DataError(f"{path}: 16-bit values below 0 ({lowest:,} to {highest:,} in the sampled images). Set which values "
                        f"become black and white, for example --intensity_range={lowest},{highest}")
    low, high = (0, next(top for top in HIGHEST if highest <= top)) if wish == AUTO else wish
    faint = _faint(survey, low, high)
    advice = (f"--intensity_range={lowest},{highest} spreads their values" if len(faint) == len(survey.ranges)
              and lowest < highest else "their values do not fit the range of the others (--intensity_range)")
    return (low, high), [_warning(survey, faint, advice)] if faint else []


def _faint(survey: Survey, low: int, high: int) -> list[tuple[str, int, int]]:
    return [each for each in survey.ranges if (_inside(each[2], low, high) - _inside(each[1], low, high)) * 256
            < FAINT * (high + 1 - low)]


def _warning(survey: Survey, faint: list[tuple[str, int, int]], advice: str) -> str:
    example = "{}: {:,} to {:,}".format(*faint[0])
    return (f"warning: {len(faint)} of {len(survey.ranges)} decoded 16-bit images become nearly one color ({example}); "
            f"{advice}")


def _inside(value: int, low: int, high: int) -> int:
    return min(max(value, low), high)


def _alpha(survey: Survey, wish: str) -> tuple[str, list[str]]:
    """-> (a value of Reading.alpha, warnings)"""
    lost = {alpha: [path for path, contrast in survey.contrasts if contrast[alpha] < FAINT <= max(contrast.values())]
            for alpha in ALPHAS}
    alpha = wish
    if wish == AUTO:
        alpha = min(ALPHAS, key=lambda each: len(lost[each])) if len(lost["white"]) > FEW * len(survey.contrasts) else "white"
    if not lost[alpha]:
        return alpha, []
    return alpha, [f"warning: {len(lost[alpha])} of {len(survey.contrasts)} decoded images with an alpha channel become nearly "
                   f"one color with --alpha {alpha}, for example {lost[alpha][0]} (choices: {', '.join(ALPHAS)})"]
