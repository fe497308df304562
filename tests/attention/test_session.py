"""Sessions of the editor: edits on the disk, revisions, filters, the search for mistakes. The model is one of plain numpy."""

import dataclasses
import os
import threading
import time

import numpy as np
import pytest
from galleries import CLASSES, gallery, values_of

from utils.attention import edits
from utils.attention.editor.session import Session
from utils.data.splits import ImageError

NOTHING = np.zeros((4, 4), bool)


@pytest.fixture
def session(tmp_path):
    return Session(gallery(), tmp_path, who="Ada")


def one(value: float, row: int = 1, column: int = 2):
    """An edit of one patch -> values, edited"""
    values, edited = np.zeros((4, 4), np.float32), NOTHING.copy()
    values[row, column], edited[row, column] = value, True
    return values, edited


def test_an_edit_is_written_to_the_disk_and_read_back(session, tmp_path):
    saved = session.save(2, "", *one(0.7))
    edit = edits.read(tmp_path / "train/2.png.json")
    assert (edit.image, edit.checksum, edit.who) == ("train/2.png", session.gallery.checksum(2), "Ada")
    assert edit.edited.sum() == 1 and edit.values[1, 2] == np.float32(0.7) and edit.when.startswith("20")
    for again in (session, Session(gallery(), tmp_path)):
        shown = again.image(2)
        assert shown["revision"] == saved["revision"] and shown["values"][1] == [None, None, 0.7, None]
        assert shown["counts"]["edited"] == 1 and not shown["problem"]
        assert shown["now"]["weights"] != shown["own"]["weights"]


def test_the_answer_shows_the_most_probable_classes_and_the_label(session):
    names, _, after = zip(*session.outcome(2, *one(0.9))["top"])
    assert list(after[:5]) == sorted(after[:5], reverse=True) and CLASSES[session.gallery.labels[2]] in names


def test_a_conflict_writes_nothing(session, tmp_path):
    first = session.save(0, "", *one(0.1))
    assert session.save(0, "", *one(0.2)) is None and values_of(tmp_path / "train/0.png.json")[1][2] == 0.1
    assert session.save(0, "no such", *one(0.2)) is None
    session.save(0, first["revision"], *one(0.2))
    assert values_of(tmp_path / "train/0.png.json")[1][2] == 0.2
    assert session.save(0, first["revision"], *one(0.3)) is None


def test_an_edit_without_patches_removes_the_file(session, tmp_path):
    saved = session.save(0, "", *one(0.1))
    assert session.save(0, saved["revision"], np.zeros((4, 4), np.float32), NOTHING) == {"revision": ""}
    assert not (tmp_path / "train/0.png.json").exists() and session.counts()["edited"] == 0
    assert session.save(0, "", np.zeros((4, 4), np.float32), NOTHING) == {"revision": ""}


@pytest.mark.parametrize("damage", ["{", "", "\0" * 100])
def test_a_damaged_file_is_reported_and_kept(session, tmp_path, damage):
    path = tmp_path / "train/0.png.json"
    path.parent.mkdir()
    path.write_text(damage)
    shown = session.image(0)
    assert str(path) in shown["problem"] and shown["values"] is None and shown["now"]
    assert session.save(0, "", *one(0.5)) is None, "nobody who has not seen it may replace it"
    session.save(0, shown["revision"], *one(0.5))
    assert values_of(path)[1][2] == 0.5 and (tmp_path / "train/0.png.json.damaged").read_text() == damage
    path.write_text("again")
    session.save(0, session.image(0)["revision"], np.zeros((4, 4), np.float32), NOTHING)
    assert not path.exists() and (tmp_path / "train/0.png.json.damaged-2").read_text() == "again"


def test_an_edit_of_another_image_is_not_used_for_this_one(session, tmp_path):
    session.save(0, "", *one(0.5))
    os.rename(tmp_path / "train/0.png.json", tmp_path / "train/1.png.json")
    assert "another image" in session.image(1)["problem"] and session.image(0)["revision"] == ""


def test_links_folders_and_pipes_instead_of_a_file_are_moved_aside(session, tmp_path):
    (tmp_path / "train/1.png.json").mkdir(parents=True)
    (tmp_path / "train/2.png.json").symlink_to(tmp_path / "elsewhere")
    os.mkfifo(tmp_path / "train/3.png.json")
    for index in (1, 2, 3):
        shown = session.image(index)
        assert shown["problem"]
        session.save(index, shown["revision"], *one(0.5))
        assert values_of(tmp_path / f"train/{index}.png.json")[1][2] == 0.5
        assert os.path.lexists(tmp_path / f"train/{index}.png.json.damaged")
    assert not (tmp_path / "elsewhere").exists()


def test_an_edit_on_other_patches_is_shown_at_its_place_in_the_image(tmp_path):
    """Two columns of the left half on a grid of 2 x 2, seen by a crop of the image's lower right three quarters."""
    fine = Session(gallery(region=(0.25, 0.25, 1.0, 1.0)), tmp_path)
    values = np.array([[0.2, 0.4], [0.6, 0.8]], np.float32)
    edit = edits.Edit("train/5.png", fine.gallery.checksum(5), values, np.array([[True, False], [True, True]]))
    edits.write(tmp_path / "train/5.png.json", edit)
    shown = fine.image(5)
    # Middles of the rows and columns: 0.34, 0.53, 0.72, 0.91 of the image; 0.5 divides the edit's patches.
    assert shown["values"] == [[0.2, None, None, None]] + [[0.6, 0.8, 0.8, 0.8]] * 3 and "2 x 2" in shown["note"]
    outside = edits.Edit("train/6.png", fine.gallery.checksum(6), values, np.ones((2, 2), bool), (0.0, 0.0, 0.25, 0.25))
    edits.write(tmp_path / "train/6.png.json", outside)
    assert fine.image(6)["values"] == [[None] * 4] * 4


def test_an_unreadable_image_is_reported(tmp_path):
    session = Session(gallery(unreadable=(1,)), tmp_path)
    assert "cut off" in session.image(1)["unreadable"] and not session.image(0)["unreadable"]
    with pytest.raises(ImageError, match="cut off"):
        session.save(1, "", *one(0.5))
    session.search(threading.Event())
    assert session.counts()["unreadable"] == 1 and session.counts()["looked_at"] == 12


def test_filters(session):
    session.search(threading.Event())
    session.save(5, "", *one(0.5))
    assert session.counts() == {"images": 12, "edited": 1, "looked_at": 12, "unreadable": 0, "misclassified": 3, "labelled": True}
    assert session.find("misclassified", 3, 1) == {"index": 7, "position": 1, "total": 3}
    assert session.find("misclassified", 3, -1)["index"] is None and session.find("misclassified", 11, 1)["index"] is None
    assert [session.find("misclassified", start, 0)["index"] for start in (0, 3, 4, 11)] == [3, 3, 7, 11]
    assert session.find("edited", 0, 1)["index"] == 5 and session.find("edited", 8, 0)["index"] == 5
    assert session.find("unedited", 4, 1)["index"] == 6 and session.find("all", 4, -1)["index"] == 3
    assert Session(gallery(labelled=False), session.folder).counts()["labelled"] is False


def test_the_search_pauses_during_requests(tmp_path):
    """A long request pauses it, and saving never waits for it."""
    images = gallery(count=200)
    slow = dataclasses.replace(images, predict=lambda indices: (time.sleep(0.2), images.predict(indices))[1])
    session, stop = Session(slow, tmp_path), threading.Event()
    thread = threading.Thread(target=session.search, args=(stop,))
    thread.start()
    try:
        time.sleep(0.05)                     # within the first batch
        before = time.monotonic()
        session.save(0, "", *one(0.5))
        assert time.monotonic() - before < 0.15
        with session._request():
            time.sleep(0.25)
            resting = session.counts()["looked_at"]
            time.sleep(0.45)
            assert session.counts()["looked_at"] == resting
    finally:
        stop.set()
        thread.join(5)
    assert not thread.is_alive()
