"""Which folders are used as which split, for common trees, given only as listings."""

import re
from pathlib import Path

import pytest

from utils.data.classes import ClassRule
from utils.data.layouts import ANYTHING, HELD_OUT, TRAIN, Listing, Request, find, is_hidden, split_names
from utils.data.splits import DataError

ROOT = Path("/data")
PETS = "{} / cat/a.jpg dog/b.jpg"


def listing_of(tree: str):
    """Return the listing of a tree below ROOT, such as 'train/cat/a.jpg train/dog/b.jpg'; a name that ends in / is an empty
    folder"""
    content: dict[Path, tuple[set, set]] = {ROOT: (set(), set())}
    for word in tree.split():
        path = ROOT / word
        is_folder = word.endswith("/")
        for place, inside in zip([path, *path.parents], [None, path, *path.parents]):
            if place == ROOT.parent:
                break
            if inside is None:
                if is_folder:
                    content.setdefault(place, (set(), set()))
                continue
            content.setdefault(place, (set(), set()))[inside is path and not is_folder].add(inside.name)

    def listing(folder: Path) -> Listing:
        folders, files = ({name for name in names if not is_hidden(name)} for names in content.get(folder, (set(), set())))
        images = {name for name in files if name.endswith(".jpg")}
        return Listing(*(tuple(sorted(names)) for names in (folders, images, files - images)))

    return listing


def below(*places: str, images: int = 1) -> str:
    """Return a tree with class folders cat and dog in each of these folders"""
    return " ".join(f"{place}/{name}/{number}.jpg" for place in places for name in ("cat", "dog") for number in range(images))


def found(tree: str, **options):
    layout = find(str(ROOT), listing_of(tree), Request(**{"need": TRAIN} | options))
    return {role: str(folder.relative_to(ROOT)) for role, folder in layout.folders.items()}, layout


@pytest.mark.parametrize(("places", "roles"), [
    ("train val", "train val"), ("Train Val", "train val"), ("TRAIN VALID", "train val"), ("training validation", "train val"),
    ("train dev", "train val"), ("train test", "train test"), ("Training Testing", "train test"), ("train val test",
                                                                                                 "train val test"),
    ("training_set test_set", "train test"), ("seg_train seg_test", "train test"), ("train-images val-images", "train val"),
    ("pets/train pets/val", "train val"), ("pets/pets/Train pets/pets/Test", "train test"),
    ("training_set/training_set test_set/test_set", "train test")])
@pytest.mark.parametrize("options", [{}, {"test_fraction": 0.2}, {"val_fraction": 0.1}, {"need": ANYTHING}], ids=str)
def test_common_layouts_need_no_flag(places, roles, options):
    folders, layout = found(below(*places.split()), **options)
    assert folders == dict(zip(roles.split(), places.split())) and not layout.whole
    plain = set(places.split()) >= {"train", "val"}
    assert plain == (layout.notes == ())
    if not plain:
        assert all(f"{place}/" in layout.notes[0] for place in places.split()) and layout.notes[0].startswith("using: ")
    warned = [note for note in layout.notes if "best.pt is chosen on the test set" in note and "--val_fraction" in note]
    assert bool(warned) == (options == {} and roles == "train test")


def test_other_folders_are_reported():
    notes = found(below("train", "val") + " Examples/x.jpg __MACOSX/train/cat/._0.jpg notes.txt")[1].notes
    assert notes == (f"skipped: {ROOT}/Examples/",)
    folders, layout = found(below("train", "val") + " test/1.jpg")
    assert set(folders) == {"train", "val"} and f"{ROOT}/test/ (no class folders" in layout.notes[0]
    assert set(found(below("train", "val") + " test/images/1.jpg")[0]) == {"train", "val"}           # as Tiny-ImageNet
    assert "test" in found(below("train", "val", "test"))[0]
    folders, layout = found(below("train", "val", "Val"))
    assert folders["val"] == "val" and any(note.startswith("warning: ") and "Val is skipped" in note for note in layout.notes)


def test_tiny_imagenet_is_recognized():
    layout = found("train/n01/images/0.jpg train/n02/images/0.jpg val/images/0.jpg val/val_annotations.txt test/images/0.jpg")[1]
    assert layout.val_list == ROOT / "val" / "val_annotations.txt" and set(layout.folders) == {"train", "val"}


def test_single_train_folder_needs_a_fraction():
    with pytest.raises(DataError, match=r"contains train/ \(2 folders\) but no val/ or test/.*VAL_FRACTION=0.2 \(--val_.*--test"):
        found(below("train"))
    for options in ({"val_fraction": 0.1}, {"test_fraction": 0.2}):
        folders, layout = found(below("train"), **options)
        assert folders == {"train": "train"} and not layout.whole
    with pytest.raises(DataError, match=r"no val/ or test/ with class folders \(there are also 1 folder \(raw\) and 1 other"):
        found(below("train") + " raw/x.jpg a.zip")


def test_evaluation_needs_no_training_folder():
    for place in ("val", "Test", "pets/valid"):
        with pytest.raises(DataError, match=r"but no train/ to train on.*--eval_only"):
            found(below(place), val_fraction=0.1)
        assert list(found(below(place), need=HELD_OUT)[0].values()) == [place]
    assert found("cat/1.jpg dog/1.jpg", need=HELD_OUT)[1].whole
    with pytest.raises(DataError, match="--val_fraction"):
        found(below("train"), need=HELD_OUT)


def test_fraction_divides_a_tree_without_splits():
    tree = "cat/1.jpg dog/1.jpg fish/deep/1.jpg fish/deeper/2.jpg"
    with pytest.raises(DataError, match=r"contains 3 folders but no train/.*\(cat, dog, fish\).*VAL_FRACTION=0.2.*--test_f"):
        found(tree)
    for options in ({"test_fraction": 0.2}, {"val_fraction": 0.2}):
        folders, layout = found(tree, **options)
        assert layout.whole and folders == {"train": "."} and layout.notes == ()
    folders, layout = found("pets/pets/cat/1.jpg pets/pets/dog/1.jpg", test_fraction=0.2)
    assert folders == {"train": "pets/pets"} and layout.notes == (f"using: the 2 folders of {ROOT}/pets/pets/ as classes",)
    folders, layout = found("ant/front/1.jpg ant/side/1.jpg bee/top/1.jpg bee/side/1.jpg bee/x/1.jpg", val_fraction=0.2)
    assert layout.whole and not layout.notes


@pytest.mark.parametrize("name", ["train", "Training", "test_set", "val-images"])
def test_class_with_the_name_of_a_split_gives_a_warning(name):
    layout = found(f"bus/1.jpg car/1.jpg {name}/1.jpg", test_fraction=0.2)[1]              # pictures of trains
    assert layout.whole and len(layout.notes) == 1
    assert layout.notes[0].startswith(f"warning: {ROOT}/{name}/ is used as a class, like the 2 folders next to it. If it is not ")
    assert not found("bus/1.jpg bullet_train/1.jpg", test_fraction=0.2)[1].notes
    kept = ClassRule(wanted=("bus", "car", name))
    assert not found(f"bus/1.jpg car/1.jpg {name}/1.jpg", classes=kept, test_fraction=0.2)[1].notes


def test_class_folders_inside_an_extra_folder_are_found():
    folders, layout = found(below("train/images", "val/images"))
    assert folders == {"train": "train/images", "val": "val/images"}
    assert layout.notes == (f"using: train/images/ to train on, val/images/ to validate on (in {ROOT})",)
    assert found(below("train/data", "test"), val_fraction=0.1)[0] == {"train": "train/data", "test": "test"}
    assert found(below("train") + " val/cat/a/1.jpg val/cat/b/1.jpg")[0]["val"] == "val"            # a class of train
    assert found(below("val/images"), need=HELD_OUT, classes=ClassRule(wanted=("images",)))[0] == {"val": "val"}
    assert found("train/cat/1.jpg val/cat/1.jpg")[0]["train"] == "train"


# tree: the error
AMBIGUOUS = {
    "Dataset/0/1.jpg Dataset/1/1.jpg Dataset/2/1.jpg Examples/1.jpg":
        r"unclear which folders are the classes\. If they are the 3 in Dataset \(0, 1, 2\), set --data_dir /data/Dataset\. If",
    below("color", "gray"): "the 2 in color .*--data_dir /data/color, or merge those of color, gray in one folder.*the 2 folders",
    below("fold1", "fold2", "Examples/old"): "unclear which folders are the classes",
    below("s1", "s2", "s3") + " s3/bird/1.jpg s4/bird/1.jpg": "the 3 in s3 .*the 4 folders s1, s2, s3, s4, move",
    "ant/front/1.jpg ant/side/1.jpg bee/front/1.jpg bee/side/1.jpg": "the 2 folders ant, bee, move them into /data/train",
    "a/1.jpg b/1.jpg test/1.jpg": r"^/data: test/ has the name of a split, .* like a, b next to it\. Rename it if it is a class",
    "a/1.jpg b/1.jpg val/1.jpg": "val/ has the name of a split", "pets/a/1.jpg pets/b/1.jpg pets/Testing/1.jpg":
        "^/data/pets: Testing/ has the name of a split",
    below("v1/train", "v1/val", "v2/train", "v2/val"): "more than one data set: /data/v1, /data/v2",
    "cat/train/1.jpg cat/test/1.jpg dog/train/1.jpg dog/test/1.jpg":
        r"^/data: each class contains test/ and train/ .*Move cat/test to test/cat, and so on",
    "a/Valid/1.jpg b/Valid/1.jpg b/training/1.jpg": r"each class contains Valid/ \(a/Valid, b/Valid, b/training\)",
    below("Train", "training", "val"): r"contains Train and training\. Remove or rename",
    below("train", "valid", "dev"): "contains dev and valid",
    below("cats_train", "cats_test", "dogs_train", "dogs_test"): "more than one data set",
    "a.zip readme.txt": r"contains 2 other files \(a.zip, readme.txt\) but no .*class folders.*Unpack the archive first",
    "1.jpg 2.jpg": "contains 2 images but .*Sort the images into one folder per class",
    "all.csv": "--dataset csv", "empty/": r"contains one folder|no class folders",
}


@pytest.mark.parametrize("tree", AMBIGUOUS)
def test_ambiguous_trees_are_reported_with_the_choices(tree):
    options = {} if "empty" in tree else {"test_fraction": 0.2}
    with pytest.raises(DataError) as raised:
        found(tree, **options)
    assert re.search(AMBIGUOUS[tree], str(raised.value)) and "\n" not in str(raised.value)


def test_older_runs_keep_folders_as_classes():
    wanted = ClassRule(None, ("Dataset", "Examples"))
    tree = "Dataset/0/1.jpg Dataset/1/1.jpg Dataset/2/1.jpg Examples/1.jpg"
    assert found(tree, classes=wanted, test_fraction=0.2)[1].whole
    old = found(below("train", "val", "Testing"), classes=ClassRule(None, ("cat", "dog")))[0]
    assert set(old) == {"train", "val"}                          # older versions did not use it as a test set
    assert set(found(below("train", "val", "Testing"))[0]) == {"train", "val", "test"}


def test_names_of_splits_are_recognized():
    assert split_names(["Train", "VAL"]) == {"train": ["Train"], "val": ["VAL"]}
    assert split_names(["bullet_train", "bus"]) == {} and split_names(["trainer", "testament", "value"]) == {}
    assert split_names(["train_images", "test_images", "labels"]) == {"train": ["train_images"], "test": ["test_images"]}
