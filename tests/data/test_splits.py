"""Subsets and concatenations, held-out shares, and the checks that every data set passes."""

from collections import Counter

import numpy as np
import pytest
import torch

from utils.config import FLAGS
from utils.data.image_files import FileImages
from utils.data.splits import (
    SKIPPED,
    ArrayImages,
    Concat,
    DataError,
    Splits,
    Subset,
    check,
    draw_test,
    fingerprint,
    flags_to_skip,
    hold_out,
    stratified_share,
)

CLASSES = 6
SIZES = (1, 2, 3, 10, 25, 60)           # images of each class


def images(sizes=SIZES, seed=0) -> ArrayImages:
    """Shuffled; image i is filled with the value i."""
    labels = np.random.default_rng(seed).permutation(np.repeat(np.arange(len(sizes)), sizes))
    return ArrayImages(np.arange(len(labels), dtype=np.uint8)[:, None, None].repeat(2, 1).repeat(3, 2), labels)


def published(own_val=False) -> Splits:
    train, val, test = images(), images((2,) * CLASSES, 1), images((5,) * CLASSES, 2)
    return Splits(train, val if own_val else test, test, "val" if own_val else "test", tuple("abcdef"))


def contents(split) -> list[tuple[int, int]]:
    """(pixel, label) of every image; `targets` holds the same labels"""
    found = [(image.getpixel((0, 0))[0], label) for image, label in (split[index] for index in range(len(split)))]
    assert [label for _, label in found] == split.targets.tolist() and split.targets.dtype == np.int64
    assert all(type(label) is int for _, label in found)
    return found


def test_subsets_and_concatenations():
    class Tensors(ArrayImages):
        def source(self, index):
            return torch.from_numpy(self.images[index].copy()), int(self.targets[index])

    split, other = images(), Tensors(images((2, 2), 3).images, images((2, 2), 3).targets)
    whole = contents(split)
    assert contents(Subset(split, [7, 3, 3])) == [whole[7], whole[3], whole[3]]
    joined = Concat([split, other, images((1,))])
    assert contents(joined) == whole + contents(other) + [(0, 0)] and len(joined) == len(whole) + 5
    assert contents(Subset(Subset(split, range(10, 20)), [2])) == [whole[12]]
    assert joined[np.int64(len(whole))] == other[0]
    subset = Subset(joined, [7, len(split) + 1])
    assert subset.source(0) == split[7]
    image, label = subset.source(1)                  # what is not decoded stays so
    assert torch.equal(image, other.source(1)[0]) and label == other.targets[1]


@pytest.mark.parametrize("fraction", [0.01, 0.2, 0.5, 0.99])
def test_a_share_takes_its_part_of_every_class(fraction):
    labels = images().targets
    chosen = stratified_share(labels, fraction, 0, "val")
    assert sorted(set(chosen.tolist())) == chosen.tolist()
    counts = Counter(labels[chosen].tolist())
    for label, size in enumerate(SIZES):
        exact = fraction * size
        assert abs(counts[label] - exact) <= 0.5 or (counts[label] == 1 and exact < 1) or (counts[label] == size - 1 < exact)
        assert counts[label] <= size - 1 and (counts[label] >= 1 or size == 1)


def test_a_share_is_a_function_of_its_seed_purpose_and_stratum():
    labels = images().targets
    assert Counter(labels[stratified_share(labels, 0.2, 5, "val")].tolist()) == {1: 1, 2: 1, 3: 2, 4: 5, 5: 12}
    torch.manual_seed(1)
    first = stratified_share(labels, 0.3, 0, "val").tolist()
    torch.manual_seed(2)
    np.random.seed(3)
    assert stratified_share(labels, 0.3, 0, "val").tolist() == first
    drawn = {str(stratified_share(labels, 0.3, seed, purpose).tolist()) for seed in range(10) for purpose in ("val", "test")}
    assert len(drawn) == 20
    assert set(first) < set(stratified_share(labels, 0.6, 0, "val").tolist())
    seen = {index for seed in range(60) for index in stratified_share(labels, 0.2, seed, "val").tolist()}
    assert seen == set(np.flatnonzero(labels != 0).tolist())        # every image can be drawn
    merged = stratified_share(np.where(labels == 3, 4, labels), 0.3, 0, "val")
    assert [i for i in first if labels[i] in (1, 2, 5)] == [i for i in merged if labels[i] in (1, 2, 5)]


@pytest.mark.parametrize("fraction", [0.1, 0.9])
def test_held_out_images_leave_the_training_set(fraction):
    before = published()
    after = hold_out(before, fraction, 0)
    assert sorted(contents(after.train) + contents(after.val)) == sorted(contents(before.train))
    assert not set(contents(after.train)) & set(contents(after.val))
    assert after.test is before.test and after.val_name == "val" and after.classes == before.classes
    assert set(after.train.targets.tolist()) == set(range(CLASSES))
    positions = [contents(before.train).index(one) for one in contents(after.train)]
    assert positions == sorted(positions)            # the rest keeps its order


@pytest.mark.parametrize("own_val", [False, True])
def test_a_drawn_test_set_takes_from_all_images(own_val):
    before = published(own_val)
    after = draw_test(before, 0.2, 0)
    parts = [before.train, before.val, before.test] if own_val else [before.train, before.test]
    assert sorted(contents(after.train) + contents(after.test)) == sorted(one for part in parts for one in contents(part))
    assert after.val is after.test and after.val_name == "test"
    pooled = Counter(label for part in parts for label in part.targets.tolist())
    assert Counter(after.test.targets.tolist()) == {label: round(0.2 * count) for label, count in pooled.items()}
    with_val = hold_out(after, 0.25, 0)
    assert sorted(contents(with_val.train) + contents(with_val.val)) == sorted(contents(after.train))
    assert with_val.test is after.test and with_val.val_name == "val"


def test_a_drawn_val_without_a_test_set_only_chooses():
    whole, none = published(), Subset(images(), [])
    after = hold_out(whole.replace(val=none, test=none), 0.2, 0)
    assert after.val is after.test and after.val_name == "val" and not after.val_is_test
    assert whole.val_is_test and draw_test(after, 0.2, 0).val_is_test


def test_a_share_that_cannot_be_held_out_is_reported():
    with pytest.raises(DataError, match=r"--val_fraction: .* already has a validation split \(12 images\)\. Omit --val_fraction"):
        hold_out(published(own_val=True), 0.1, 0)
    single = images((1, 1))
    with pytest.raises(DataError, match=r"--val_fraction 0.5: no class has two images"):
        hold_out(Splits(single, single, single, "test", ("a", "b")), 0.5, 0)


def changed(name: str, labels: list[int]) -> Splits:
    parts = {split: images() for split in ("train", "val", "test")}
    parts[name] = ArrayImages(np.zeros((len(labels), 2, 2), dtype=np.uint8), np.array(labels))
    return Splits(**parts, val_name="val", classes=tuple("abcdef"))


@pytest.mark.parametrize(("splits", "words"), [
    (changed("train", [0, 1, 2, 3, 4]), "no training images of class f: "),
    (changed("train", [5]), "class a, b, c, d, e: "),
    (changed("train", [0, 1, 2, 3, 4, 5, 6]), "train has the label 6, but there are 6 classes"),
    (changed("val", [-1]), "val has the label -1"),
    (changed("test", [0, 255]), "test has the label 255"),
    (changed("test", []), "no images in test"),
    (Splits(images(), images(), images(), "val", tuple("abcdda")), "two classes are called a, d"),
])
def test_bad_splits_are_reported(splits, words):
    with pytest.raises(DataError) as raised:
        check(splits, "birds in data")
    assert words in str(raised.value) and str(raised.value).startswith("birds in data: ") and "\n" not in str(raised.value)


def files(root: str, count: int = 3000, **changed) -> FileImages:
    """Files that need not be there; changed: "i17" = (name, label) of image 17"""
    samples = [changed.get(f"i{index}", (f"train/{index:05d}.png", index % 7)) for index in range(count)]
    return FileImages([(f"{root}/{name}", label) for name, label in samples], root)


def test_a_fingerprint_depends_on_the_images_and_not_on_their_folder():
    one = fingerprint(files("/here"))
    assert one == fingerprint(files("/else/where")) and len(one) == 16 and int(one, 16)
    others = [files("/here", 2999), files("/here", 3001), files("/here", i1234=("train/01234.png", 6)),
              files("/here", i0=("train/x.png", 0)), Subset(files("/here"), range(3000)[::-1]), files("/here", 0), images()]
    assert len({one, *map(fingerprint, others)}) == 8
    small = {fingerprint(files("/here", 20, **{f"i{index}": (f"renamed{index}", index % 7)})) for index in range(20)}
    assert len(small) == 20                    # of a small split every name counts


def test_the_flags_that_skip_so_many_unreadable_images_let_the_run_go_on():
    for images in (1, 3, 100, 196, 1000, 1281167):
        for bad in range(1, min(images, 300) + 1):
            flags = flags_to_skip(bad, images).split()
            limit = float(flags[3]) if flags[2:] else SKIPPED
            assert flags[:2] == ["--bad_images", "skip"] and bad <= limit * images and limit <= 1, (bad, images)
            assert (len(flags) == 2) == (bad <= SKIPPED * images)
    assert flags_to_skip(2, 196) == "--bad_images skip --max_bad_images 0.011"
    assert FLAGS["max_bad_images"].default == SKIPPED
