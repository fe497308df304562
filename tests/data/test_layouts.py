"""Which folders are taken as what: trees as people have them, made of listings alone."""

import re
from pathlib import Path

import pytest

from utils.data.classes import ClassRule
from utils.data.layouts import ANYTHING, HELD_OUT, TRAIN, Listing, Request, find, is_hidden, split_names
from utils.data.splits import DataError

ROOT = Path("/data")
PETS = "{} / cat/a.jpg dog/b.jpg"


def listing_of(tree: str):
    """'train/cat/a.jpg train/dog/b.jpg': the listing of that tree below ROOT; what ends in / is an empty folder"""
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
    """cat and dog in each of these folders"""
    return " ".join(f"{place}/{name}/{number}.jpg" for place in places for name in ("cat", "dog") for number in range(images))


def found(tree: str, **asked):
    layout = find(str(ROOT), listing_of(tree), Request(**{"need": TRAIN} | asked))
    return {role: str(folder.relative_to(ROOT)) for role, folder in layout.folders.items()}, layout


@pytest.mark.parametrize(("places", "roles"), [
    ("train val", "train val"), ("Train Val", "train val"), ("TRAIN VALID", "train val"), ("training validation", "train val"),
    ("train dev", "train val"), ("train test", "train test"), ("Training Testing", "train test"), ("train val test",
                                                                                                 "train val test"),
    ("training_set test_set", "train test"), ("seg_train seg_test", "train test"), ("train-images val-images", "train val"),
    ("pets/train pets/val", "train val"), ("pets/pets/Train pets/pets/Test", "train test"),
    ("training_set/training_set test_set/test_set", "train test")])
@pytest.mark.parametrize("asked", [{}, {"test_fraction": 0.2}, {"val_fraction": 0.1}, {"need": ANYTHING}], ids=str)
def test_common_layouts_are_taken_without_a_flag(places, roles, asked):
    taken, layout = found(below(*places.split()), **asked)
    assert taken == dict(zip(roles.split(), places.split())) and not layout.whole
    plain = set(places.split()) >= {"train", "val"}
    assert plain == (layout.notes == ())
    if not plain:
        assert all(f"{place}/" in layout.notes[0] for place in places.split()) and layout.notes[0].startswith("taken: ")
    warned = [note for note in layout.notes if "best.pt is chosen on the test set" in note and "--val_fraction" in note]
    assert bool(warned) == (asked == {} and roles == "train test")


def test_what_lies_beside_is_named():
    notes = found(below("train", "val") + " Examples/x.jpg __MACOSX/train/cat/._0.jpg notes.txt")[1].notes
    assert notes == ("left out: Examples/",) or notes == (f"left out: {ROOT}/Examples/",)
    taken, layout = found(below("train", "val") + " test/1.jpg")
    assert set(taken) == {"train", "val"} and f"{ROOT}/test/ has no class folders" in layout.notes[0]
    assert set(found(below("train", "val") + " test/images/1.jpg")[0]) == {"train", "val"}           # as Tiny-ImageNet
    assert "test" in found(below("train", "val", "test"))[0]
    taken, layout = found(below("train", "val", "Val"))
    assert taken["val"] == "val" and any(note.startswith("warning: ") and "Val is left out" in note for note in layout.notes)


def test_tiny_imagenet():
    layout = found("train/n01/images/0.jpg train/n02/images/0.jpg val/images/0.jpg val/val_annotations.txt test/images/0.jpg")[1]
    assert layout.val_list == ROOT / "val" / "val_annotations.txt" and set(layout.folders) == {"train", "val"}


def test_train_alone_needs_a_share():
    with pytest.raises(DataError, match=r"holds train/ \(2 folders\) but no val/ or test/.*--val_fraction 0.1.*--test_fraction"):
        found(below("train"))
    for asked in ({"val_fraction": 0.1}, {"test_fraction": 0.2}):
        taken, layout = found(below("train"), **asked)
        assert taken == {"train": "train"} and not layout.whole
    with pytest.raises(DataError, match=r"but no val/ or test/ with class folders \(there are 1 folder \(raw\) and 1 other file"):
        found(below("train") + " raw/x.jpg a.zip")


def test_held_out_images_alone_serve_an_evaluation():
    for place in ("val", "Test", "pets/valid"):
        with pytest.raises(DataError, match=r"but no train/ to train on.*--eval_only"):
            found(below(place), val_fraction=0.1)
        assert list(found(below(place), need=HELD_OUT)[0].values()) == [place]
    assert found("cat/1.jpg dog/1.jpg", need=HELD_OUT)[1].whole
    with pytest.raises(DataError, match="--val_fraction"):
        found(below("train"), need=HELD_OUT)


def test_an_undivided_tree_is_divided_by_a_fraction():
    tree = "cat/1.jpg dog/1.jpg fish/deep/1.jpg fish/deeper/2.jpg"
    with pytest.raises(DataError, match=r"holds 3 folders but no train/ and val/ \(cat, dog, fish\).*--test_fraction 0.2"):
        found(tree)
    for asked in ({"test_fraction": 0.2}, {"val_fraction": 0.2}):
        taken, layout = found(tree, **asked)
        assert layout.whole and taken == {"train": "."} and layout.notes == ()
    taken, layout = found("pets/pets/cat/1.jpg pets/pets/dog/1.jpg", test_fraction=0.2)
    assert taken == {"train": "pets/pets"} and layout.notes == (f"taken: the 2 folders of {ROOT}/pets/pets/ as classes",)
    taken, layout = found("ant/front/1.jpg ant/side/1.jpg bee/top/1.jpg bee/side/1.jpg bee/x/1.jpg", val_fraction=0.2)
    assert layout.whole and not layout.notes


@pytest.mark.parametrize("name", ["train", "Training", "test_set", "val-images"])
def test_a_class_that_may_be_a_split_is_warned_of(name):
    layout = found(f"bus/1.jpg car/1.jpg {name}/1.jpg", test_fraction=0.2)[1]              # pictures of trains
    assert layout.whole and len(layout.notes) == 1
    assert layout.notes[0].startswith(f"warning: {ROOT}/{name}/ is taken for a class, as the 2 folders beside it are: move it ")
    assert not found("bus/1.jpg bullet_train/1.jpg", test_fraction=0.2)[1].notes
    kept = ClassRule(wanted=("bus", "car", name))
    assert not found(f"bus/1.jpg car/1.jpg {name}/1.jpg", classes=kept, test_fraction=0.2)[1].notes


def test_class_folders_inside_one_folder_of_each_split_are_taken():
    taken, layout = found(below("train/images", "val/images"))
    assert taken == {"train": "train/images", "val": "val/images"}
    assert layout.notes == (f"taken: train/images/ to train on, val/images/ held out (in {ROOT})",)
    assert found(below("train/data", "test"), val_fraction=0.1)[0] == {"train": "train/data", "test": "test"}
    assert found(below("train") + " val/cat/a/1.jpg val/cat/b/1.jpg")[0]["val"] == "val"            # a class of train
    assert found(below("val/images"), need=HELD_OUT, classes=ClassRule(wanted=("images",)))[0] == {"val": "val"}
    assert found("train/cat/1.jpg val/cat/1.jpg")[0]["train"] == "train"


# what is there: what the refusal says
AMBIGUOUS = {
    "Dataset/0/1.jpg Dataset/1/1.jpg Dataset/2/1.jpg Examples/1.jpg": r"which folders are the classes\? For the 3 of Dataset "
                                                                      r"\(0, 1, 2\) give --data_dir /data/Dataset; for 2 folders",
    below("color", "gray"): "For the 2 of color .*--data_dir /data/color, or put those of color, gray together.*; for 2 folders",
    below("fold1", "fold2", "Examples/old"): "which folders are the classes",
    below("s1", "s2", "s3") + " s3/bird/1.jpg s4/bird/1.jpg": r"For the 3 of s3 .*for 4 folders \(s1, s2, s3, s4\)",
    "ant/front/1.jpg ant/side/1.jpg bee/front/1.jpg bee/side/1.jpg": r"for 2 folders \(ant, bee\) move them into /data/train",
    "a/1.jpg b/1.jpg test/1.jpg": r"^/data: is test/ a class beside a, b\? .*rename it if it is a class",
    "a/1.jpg b/1.jpg val/1.jpg": "is val/ a class", "pets/a/1.jpg pets/b/1.jpg pets/Testing/1.jpg": "^/data/pets: is Testing/ a",
    below("v1/train", "v1/val", "v2/train", "v2/val"): "more than one data set: /data/v1, /data/v2",
    "cat/train/1.jpg cat/test/1.jpg dog/train/1.jpg dog/test/1.jpg":
        r"^/data: each class has test/ and train/ inside it .*move cat/test to test/cat, and so on",
    "a/Valid/1.jpg b/Valid/1.jpg b/training/1.jpg": r"each class has Valid/ inside it \(a/Valid, b/Valid, b/training\)",
    below("Train", "training", "val"): "holds Train and training: remove or rename",
    below("train", "valid", "dev"): "holds dev and valid",
    below("cats_train", "cats_test", "dogs_train", "dogs_test"): "which of them are the data set",
    "a.zip readme.txt": r"no class folders, but 2 other files \(a.zip, readme.txt\).*Unpack the archive first",
    "1.jpg 2.jpg": "but 2 images.*Sort the images into one folder a class",
    "all.csv": "--dataset csv", "empty/": r"holds one folder|no class folders",
}


@pytest.mark.parametrize("tree", AMBIGUOUS)
def test_what_could_mean_two_things_is_refused_with_the_choice(tree):
    asked = {} if "empty" in tree else {"test_fraction": 0.2}
    with pytest.raises(DataError) as raised:
        found(tree, **asked)
    assert re.search(AMBIGUOUS[tree], str(raised.value)) and "\n" not in str(raised.value)


def test_a_run_that_took_folders_for_classes_keeps_them():
    wanted = ClassRule(None, ("Dataset", "Examples"))
    tree = "Dataset/0/1.jpg Dataset/1/1.jpg Dataset/2/1.jpg Examples/1.jpg"
    assert found(tree, classes=wanted, test_fraction=0.2)[1].whole
    old = found(below("train", "val", "Testing"), classes=ClassRule(None, ("cat", "dog")))[0]
    assert set(old) == {"train", "val"}                          # which was no test set then
    assert set(found(below("train", "val", "Testing"))[0]) == {"train", "val", "test"}


def test_names_of_splits():
    assert split_names(["Train", "VAL"]) == {"train": ["Train"], "val": ["VAL"]}
    assert split_names(["bullet_train", "bus"]) == {} and split_names(["trainer", "testament", "value"]) == {}
    assert split_names(["train_images", "test_images", "labels"]) == {"train": ["train_images"], "test": ["test_images"]}
