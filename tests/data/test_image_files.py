"""Images in files: decoding, trees of class folders, lists in CSV."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from miniatures import GOOD_TREE, csv_files, png, tree
from PIL import Image
from torchvision.datasets import ImageFolder

from utils.data.datasets import open_splits
from utils.data.image_files import FileImages
from utils.data.splits import DataError, ImageError

# ------------------------------------------------------------------------------------------------- decoding


def read(path: Path) -> Image.Image:
    image, label = FileImages([(str(path), 3)])[0]
    assert image.mode == "RGB" and label == 3
    return image


@pytest.mark.parametrize("form", ["JPEG", "PNG", "BMP", "TIFF", "WEBP", "PPM", "GIF"])
def test_formats_whole_and_cut(tmp_path, form):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8))
    picture.save(tmp_path / "whole", form)
    with Image.open(tmp_path / "whole") as expected:
        assert np.array_equal(read(tmp_path / "whole"), expected.convert("RGB"))
    content = (tmp_path / "whole").read_bytes()
    (tmp_path / "cut").write_bytes(content[:len(content) // 2])
    with pytest.raises(ImageError, match=f"{tmp_path / 'cut'}: cannot be read as an image"):
        read(tmp_path / "cut")


def test_sixteen_bit_images_keep_their_range(tmp_path):
    ramp = (np.arange(256, dtype=np.uint16) * 257).reshape(16, 16)
    Image.fromarray(ramp).save(tmp_path / "ramp.png")
    Image.fromarray(ramp).save(tmp_path / "ramp.tif")
    (tmp_path / "ramp.pgm").write_bytes(b"P5 16 16 65535\n" + ramp.astype(">u2").tobytes())
    for name in ("ramp.png", "ramp.tif", "ramp.pgm"):
        assert np.asarray(read(tmp_path / name))[..., 0].ravel().tolist() == list(range(256)), name


def quadrants(mode="RGB") -> Image.Image:
    """Another colour in each corner, so that any turn shows; wider than high"""
    pixels = np.full((16, 32, 3), 255, dtype=np.uint8)
    pixels[:8, :16], pixels[:8, 16:], pixels[8:, :16] = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    return Image.fromarray(pixels).convert(mode)


def test_an_exif_orientation_is_not_followed(tmp_path):
    """As torchvision and timm, with which published checkpoints were trained."""
    exif = Image.Exif()
    exif[0x0112] = 6
    quadrants().save(tmp_path / "photo.png", exif=exif)
    assert np.array_equal(read(tmp_path / "photo.png"), quadrants())


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "CMYK", "YCbCr"])
def test_modes_become_rgb(tmp_path, mode):
    name = tmp_path / ("photo.jpg" if mode in ("CMYK", "YCbCr") else "photo.png")
    quadrants(mode).save(name)
    with Image.open(name) as stored:
        assert np.array_equal(read(name), stored.convert("RGB"))
    if mode not in ("1", "L"):
        assert np.abs(np.asarray(read(name)).astype(int) - np.asarray(quadrants())).mean() < 12


@pytest.mark.parametrize("form", ["RGBA", "LA", "P", "RGB", "GIF"])
def test_transparent_parts_become_white(tmp_path, form):
    """Beneath the transparent half there is black, which convert("RGB") alone would show."""
    grey, alpha = np.full((4, 4), 60, dtype=np.uint8), np.full((4, 4), 255, dtype=np.uint8)
    grey[:, 2:], alpha[:, 2:] = 0, 0
    file = tmp_path / f"part.{'gif' if form == 'GIF' else 'png'}"
    if form in ("RGBA", "LA"):
        Image.merge("LA", (Image.fromarray(grey), Image.fromarray(alpha))).convert(form).save(file)
    elif form == "RGB":
        Image.fromarray(grey).convert("RGB").save(file, transparency=(0, 0, 0))
    else:
        image = Image.fromarray((grey > 0).astype(np.uint8)).convert("P")
        image.putpalette([0, 0, 0, 60, 60, 60])
        image.save(file, transparency=0)
    assert np.asarray(read(file))[..., 1].tolist() == [[60, 60, 255, 255]] * 4
    if form == "RGBA":
        Image.new("RGBA", (2, 2), (100, 0, 200, 51)).save(file)
        assert read(file).getpixel((0, 0)) == tuple(round(255 - 0.2 * (255 - value)) for value in (100, 0, 200))


# --------------------------------------------------------------------------------------------------- folders


def test_folder(tmp_path):
    splits = open_splits("folder", tree(tmp_path, GOOD_TREE))
    assert splits.classes == ("ant", "bee") and splits.can_flip
    assert splits.train.targets.tolist() == [0, 0, 0, 1, 1]
    assert splits.val.targets.tolist() == [0, 1, 1]
    assert splits.test is splits.val and splits.val_name == "test"
    image, label = splits.train[3]
    assert image.mode == "RGB" and image.size == (10, 12) and label == 1 and image.getpixel((0, 0)) == (4, 8, 100)


def test_folder_reads_nested_folders_and_ignores_hidden_ones_and_other_files(tmp_path):
    root = tree(tmp_path, GOOD_TREE | {"train/ant/more/deeper": 2, ".git/objects": 1, "train/.cache": 1, "val/.thumbs": 1})
    (tmp_path / "train" / "notes.txt").write_text("not a class")
    (tmp_path / "train" / "ant" / "notes.txt").write_text("not an image")
    (tmp_path / "train" / "ant" / "._0.png").write_bytes(b"what macOS knows of 0.png")
    Image.new("L", (4, 4), 7).save(tmp_path / "val" / "bee" / "GREY.JPEG")
    splits = open_splits("folder", root)
    assert splits.classes == ("ant", "bee")
    assert Counter(splits.train.targets.tolist()) == {0: 5, 1: 2}
    assert Counter(splits.val.targets.tolist()) == {0: 1, 1: 3}
    assert {splits.val[index][0].mode for index in range(4)} == {"RGB"}


def test_the_order_of_the_files_is_that_of_torchvision(tmp_path):
    layout = {"train/b.c": 2, "train/b/z": 3, "train/b/a/deep": 2, "train/b-a": 1, "train/B": 11, "train/b/a.x": 2}
    root = tree(tmp_path, layout | {f"val/{name}": 1 for name in ("b.c", "b", "b-a", "B")})
    (tmp_path / "train" / "b" / "last.png").write_bytes(png())
    (tmp_path / "train" / "B" / "linked").symlink_to(tmp_path / "train" / "b.c")
    splits = open_splits("folder", root)
    expected = ImageFolder(tmp_path / "train")
    assert splits.train.samples == expected.samples and list(splits.classes) == expected.classes


def test_every_folder_is_visited_once_whatever_links_to_it(tmp_path):
    """By its own path, so that its images keep their names."""
    root = tree(tmp_path, GOOD_TREE | {f"train/cat/{name}": 1 for name in "abcdef"} | {"outside": 0, "outside/deep/end": 1})
    for one in "abcdef":
        for other in "abcdef":
            (tmp_path / "train" / "cat" / one / f"to_{other}").symlink_to(f"../{other}")
    for name in ("z", "y"):
        (tmp_path / "train" / "cat" / "a" / name).symlink_to(tmp_path / "outside")
    for place, target in (("outside/deep/up", "."), ("train/ant/again", "train/ant"), ("train/ant/above", ".")):
        (tmp_path / place).symlink_to(tmp_path / target)          # circles
    splits = open_splits("folder", root)
    found = [Path(path).relative_to(tmp_path).as_posix() for path, label in splits.train.samples if label == 2]
    assert splits.train.targets.tolist() == [0, 0, 0, 1, 1] + [2] * 7
    assert found == ["train/cat/a/0.png", "train/cat/a/y/deep/end/0.png", *(f"train/cat/{name}/0.png" for name in "bcdef")]


BAD_TREES = {
    "no such folder": ({}, ["no such folder: {root}/train", "--data_dir {root}", "train/ and val/"]),
    "no val": ({"train/ant": 1}, ["no such folder: {root}/val"]),
    "no classes": ({"train": 0, "val": 0}, ["{root}/train", "no class folders"]),
    "unsorted val": ({"train/ant": 2, "val": 2}, ["{root}/val holds images but no class folders", "one folder a class",
                                                 "ImageNet"]),
    "empty class": (GOOD_TREE | {"train/cat": 0, "val/cat": 1}, ["{root}/train", "of class cat"]),
    "nothing in val": ({"train/ant": 1, "val/ant": 0}, ["{root}/val: no images", "of class ant"]),
    "class in val alone": (GOOD_TREE | {"val/cat": 1, "val/dog": 1}, ["only in val: cat, dog"]),
    "renamed class": ({"train/ant": 1, "val/aunt": 1}, ["only in train: ant", "only in val: aunt"]),
    "many classes": ({f"train/c{n}": 1 for n in range(8)} | {"val/ant": 1}, ["c0, c1, c2, c3, c4 and 3 more"]),
    "one tree": ({"ant": 2, "bee": 2}, ["2 folders but no train/ and val/", "--test_fraction 0.2"]),
    "other things": ({"ant": 2, "notes": 0}, ["of class notes", "neither train/ nor val/"]),
}


# what is there besides ant and bee: labels of val
TREES_THAT_WORK = {
    "class missing in val": ({"train/cat": 1, "val/dog": 1, "train/dog": 1}, [0, 1, 1, 3]),
    "class empty in val": ({"train/aa": 1, "val/aa": 0}, [1, 2, 2]),
    "left by notebooks": ({"train/.ipynb_checkpoints": 2, "val/.ipynb_checkpoints": 1}, [0, 1, 1]),
}


@pytest.mark.contract("P14", "labels come from the classes of train; what does not fit is reported before the first step")
def test_class_folders_that_differ(tmp_path, figure):
    for number, case in enumerate(TREES_THAT_WORK):
        layout, labels = TREES_THAT_WORK[case]
        splits = open_splits("folder", tree(tmp_path / str(number), GOOD_TREE | layout))
        assert splits.val.targets.tolist() == labels, case
        for split in (splits.train, splits.val):
            for index, (path, label) in enumerate(split.samples):
                assert splits.classes[label] == Path(path).relative_to(tmp_path / str(number)).parts[1]
                assert split[index][1] == label
    for number, case in enumerate(BAD_TREES):
        tree(tmp_path / f"bad{number}", BAD_TREES[case][0])
        with pytest.raises(DataError) as raised:
            open_splits("folder", str(tmp_path / f"bad{number}"))
        assert "\n" not in str(raised.value), case
        for word in BAD_TREES[case][1]:
            assert word.format(root=tmp_path / f"bad{number}") in str(raised.value), case
    figure("trees of class folders that differ", len(TREES_THAT_WORK) + len(BAD_TREES))


def test_a_third_split_is_the_test_set(tmp_path):
    splits = open_splits("folder", tree(tmp_path / "three", {**GOOD_TREE, "test/ant": 4, "test/bee": 1}))
    assert (len(splits.train), len(splits.val), len(splits.test), splits.val_name) == (5, 3, 5, "val")
    unlabelled = tree(tmp_path / "two", {**GOOD_TREE, "test": 3})
    two = open_splits("folder", unlabelled)
    assert two.val is two.test and two.val_name == "test"
    with pytest.raises(DataError, match="train and test have different classes"):
        open_splits("folder", tree(tmp_path / "other", {**GOOD_TREE, "test/wasp": 1}))


def test_one_tree_is_divided_by_a_test_fraction(tmp_path):
    splits = open_splits("folder", tree(tmp_path, {"ant": 10, "bee/small": 3, "bee/large": 2, ".hidden": 1}), test_fraction=0.2)
    assert splits.classes == ("ant", "bee") and splits.val is splits.test and splits.val_name == "test"
    assert Counter(splits.test.targets.tolist()) == {0: 2, 1: 1} and Counter(splits.train.targets.tolist()) == {0: 8, 1: 4}
    both = open_splits("folder", str(tmp_path), test_fraction=0.2, val_fraction=0.25)
    assert [len(split) for split in (both.train, both.val, both.test)] == [9, 3, 3] and both.val_name == "val"


def test_imagenet_wants_its_thousand_classes_and_its_own_splits(tmp_path):
    with pytest.raises(DataError, match=r"has 2 classes, not 1000: .*--dataset folder"):
        open_splits("imagenet", tree(tmp_path / "two", GOOD_TREE))
    with pytest.raises(DataError, match=r"no such folder: .*/train"):
        open_splits("imagenet", tree(tmp_path / "one", {"ant": 2, "bee": 2}), test_fraction=0.5)


# ------------------------------------------------------------------------------------------------------ lists


def test_csv(tmp_path):
    splits = open_splits("csv", csv_files(tmp_path, train="b.png,cat\na.png, a dog \nc.png,cat\n", val="d.png,cat"))
    assert splits.classes == ("a dog", "cat") and splits.can_flip
    assert splits.train.targets.tolist() == [1, 0, 1] and splits.val.targets.tolist() == [1]
    assert splits.test is splits.val and splits.val_name == "test"
    assert [splits.train[index][0].getpixel((0, 0))[0] for index in range(3)] == [10, 0, 20]
    after = open_splits("csv", str(tmp_path), val_fraction=0.5)
    assert [len(after.train), after.val.targets.tolist(), after.val_name] == [2, [1], "val"] and len(after.test) == 1


def test_csv_with_three_lists(tmp_path):
    root = csv_files(tmp_path, train="a.png,x\nb.png,y\n", val="c.png,y\n", test="d.png,x\ne.png,x\n")
    splits = open_splits("csv", root)
    assert [split.targets.tolist() for split in (splits.train, splits.val, splits.test)] == [[0, 1], [1], [0, 0]]
    assert splits.val_name == "val"
    with pytest.raises(DataError, match=r"validation split of its own \(1 images\)"):
        open_splits("csv", root, val_fraction=0.5)
    drawn = open_splits("csv", root, test_fraction=0.4)
    assert drawn.val is drawn.test and len(drawn.train) + len(drawn.test) == 5


@pytest.mark.parametrize("header", ["path,label", "Image,Class", "FILE, label", '"path","class"', "\ufeffpath,label"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_csv_header_is_detected(tmp_path, header, end):
    text = end.join([header, "a.png,x", "", "b.png,y", ""])
    splits = open_splits("csv", csv_files(tmp_path, train=end + text if header[0] == "F" else text, val="c.png,x"))
    assert splits.classes == ("x", "y") and len(splits.train) == 2


def test_csv_header_is_not_a_class_elsewhere(tmp_path):
    (tmp_path / "path").write_bytes(png())
    splits = open_splits("csv", csv_files(tmp_path, train="path,x\npath,label\n", val="path,x"))
    assert splits.classes == ("label", "x") and splits.train.targets.tolist() == [1, 0]


@pytest.mark.parametrize(("labels", "classes", "expected"), [
    ("2 0 1 1 10 3 4 5 6 7 8 9", [str(number) for number in range(11)], [2, 0, 1, 1, 10, 3, 4, 5, 6, 7, 8, 9]),
    ("7 100 9", ["7", "9", "100"], [0, 2, 1]),                       # gaps: names, still in numerical order
    ("0 1 x 10 2", ["0", "1", "10", "2", "x"], [0, 1, 4, 2, 3]),      # not all are integers: names
    ("01 1 0", ["0", "01", "1"], [1, 2, 0]),                         # 01 and 1 would be one class
    ("9" * 5000, ["9" * 5000], [0]),
])
def test_csv_labels(tmp_path, labels, classes, expected):
    labels = labels.split(" ")
    splits = open_splits("csv", csv_files(tmp_path, train="".join(f"a.png,{label}\n" for label in labels),
                                          val=f"b.png,{labels[0]}"))
    assert list(splits.classes) == classes and splits.train.targets.tolist() == expected
    assert splits.val.targets.tolist() == expected[:1]


def test_csv_paths_with_commas_folders_and_from_the_root(tmp_path):
    (tmp_path / "sub").mkdir()
    for name in ("one, two.png", 'a "b".png', "ü.png"):
        (tmp_path / "sub" / name).write_bytes(png())
    train = f'"sub/one, two.png",x\n"sub/a ""b"".png",x\nsub/ü.png,x\n{tmp_path}/data/a.png,x\n../sub/ü.png,x\n'
    splits = open_splits("csv", csv_files(tmp_path / "data", train=train.replace("sub/", "../sub/").replace("../../", "../"),
                                          val="a.png,x"))
    assert [splits.train[index][0].size for index in range(5)] == [(20, 20)] * 3 + [(4, 3), (20, 20)]


BAD_LISTS = {
    "no comma": ({"train": "a.png,x\n\nb.png\n"}, ["train.csv:3: no comma", "path,label"]),
    "semicolons": ({"train": "path;label\na.png;x\n"}, ["train.csv:1: no comma"]),
    "three columns": ({"train": "a.png,x,y\n"}, ["train.csv:1: 3 columns"]),
    "unquoted comma": ({"val": "a,b.png,x\n"}, ["val.csv:1: 3 columns", '"a,b.png",cat']),
    "open quote": ({"train": 'a.png,x\n"b.png,x\nc.png,x\n'}, ["train.csv:2: "]),
    "empty label": ({"train": "path,label\na.png,x\nb.png,\n"}, ["train.csv:3: empty label"]),
    "empty path": ({"train": "a.png,x\n,x\n"}, ["train.csv:2: empty path"]),
    "unknown label": ({"val": "a.png,x\nb.png,z\n"}, ["val.csv:2: the label 'z' does not occur in train.csv"]),
    "unknown test label": ({"test": "a.png,X\n"}, ["test.csv:1: the label 'X' does not occur"]),
    "no image": ({"train": "a.png,x\ngone.png,x\nb.png,x\n"}, ["train.csv:2: the image {root}/gone.png does not exist"]),
    "no images": ({"val": "path,label\n1.png,x\n2.png,x\n3.png,x\n"}, ["val.csv:2: ", "{root}/1.png", "exist, nor 2 more"]),
    "nothing": ({"train": ""}, ["train.csv: no rows"]),
    "NUL": ({"train": b"a.png,x\nb.p\0ng,x\n"}, ["train.csv:2: NUL bytes"]),
    "UTF-16": ({"train": "a.png,x\n".encode("utf-16")}, ["train.csv:1: NUL bytes", "UTF-8"]),
    "Latin-1": ({"train": "a.png,x\nb.png,kätzchen\n".encode("latin-1")}, ["train.csv:2: not UTF-8 text", "column 8"]),
    "picture": ({"train": png()}, ["train.csv:1: "]),
    "one long line": ({"train": "a.png,x\n" + "y" * 70_000}, ["train.csv:2: the line is longer than"]),
}


@pytest.mark.parametrize("case", BAD_LISTS)
def test_bad_lists_are_reported_by_line(tmp_path, case):
    texts, words = BAD_LISTS[case]
    csv_files(tmp_path, **{"train": "a.png,x\nb.png,y\n", "val": "c.png,y\n"} | texts)
    with pytest.raises(DataError) as raised:
        open_splits("csv", str(tmp_path))
    assert "\n" not in str(raised.value) and "\r" not in str(raised.value)
    for word in words:
        assert word.format(root=tmp_path) in str(raised.value)


def test_missing_lists_are_reported(tmp_path):
    for missing in ("train", "val"):
        csv_files(tmp_path, train="a.png,x", val="b.png,x")
        (tmp_path / f"{missing}.csv").unlink()
        with pytest.raises(DataError, match=rf"no such file: {tmp_path}/{missing}.csv .*must hold train.csv and val.csv"):
            open_splits("csv", str(tmp_path))
