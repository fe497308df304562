"""Edit files: a written edit is read back, wrong files are refused in one line, and two images never share a file."""

import hashlib
import json
import os

import numpy as np
import pytest
from PIL import Image

from utils.attention import edits
from utils.attention.edits import Edit, EditError, find, path_of, read, write
from utils.data.image_files import FileImages
from utils.data.splits import ArrayImages, Concat, Subset

SUM = "sha256:" + 64 * "a"


def edit(image="train/3", sum_=SUM, grid=(2, 3), **more) -> Edit:
    random = np.random.default_rng(sum(grid))
    edited = random.random(grid) < 0.5
    edited[0, 0] = True
    values = np.where(edited, random.random(grid), 0).astype(np.float32)
    values[0, 0] = 0.9
    return Edit(image, sum_, values, edited, **more)


def fields(**changed) -> dict:
    return {"format": "attention-edit-1", "image": "train/3", "checksum": SUM, "grid": [2, 3], "region": [0, 0, 1, 1],
            "values": [[None, 0.25, 1], [0, None, None]], "who": "", "when": "", "note": ""} | changed


def pictures(count=5, part="train", seed=0) -> ArrayImages:
    random = np.random.default_rng(seed)
    return ArrayImages(random.integers(0, 256, (count, 4, 4, 3), dtype=np.uint8), np.zeros(count), part)


def files(folder, *names, root=None) -> FileImages:
    """Every image has another color."""
    samples = []
    for number, name in enumerate(names):
        path = os.path.join(folder, name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        Image.new("RGB", (4, 4), (number, 0, 0)).save(path, "PNG")
        samples.append((path, 0))
    return FileImages(samples, folder if root is None else root)


def mark(folder, split, index, **more) -> None:
    write(path_of(folder, split.name(index)), edit(split.name(index), edits.checksum(split, index), **more))


def refused(action, *arguments) -> str:
    with pytest.raises(EditError) as raised:
        action(*arguments)
    text = str(raised.value)
    assert text.isprintable() and len(text) < 1500, text
    return text


# ------------------------------------------------------------------------------------------- write and read


@pytest.mark.parametrize("grid", [(1, 1), (2, 3), (14, 14), (256, 256), (1, 256)])
def test_a_written_edit_is_read_back(tmp_path, grid):
    given = edit(grid=grid, region=(0.125, 0, 1, 1 / 3), who="Ana Ñ", when="2024-05-01", note='two\nlines "and" \u2603')
    place = path_of(tmp_path / "new" / "folder", given.image)
    write(place, given)
    got = read(place)
    assert got.values.dtype == np.float32 and got.edited.dtype == bool
    assert np.array_equal(got.values, given.values) and np.array_equal(got.edited, given.edited)
    assert (got.image, got.checksum, got.region, got.who, got.when, got.note) == (
        given.image, given.checksum, given.region, given.who, given.when, given.note)
    assert [path.name for path in (tmp_path / "new" / "folder" / "train").iterdir()] == ["3.json"]        # nothing left over


def test_the_file_is_the_format_that_is_documented(tmp_path):
    """The format suits git: the same edit gives the same bytes, and each row of patches is a line."""
    values = np.array([[0, 0.25, 1], [0, 0.5, 0.1]], np.float32)
    edited = np.array([[0, 1, 1], [1, 0, 0]], bool)
    write(tmp_path / "a.json", Edit("train/3", SUM, values, edited, who="me"))
    content = (tmp_path / "a.json").read_bytes()
    assert json.loads(content) == fields(values=[[None, 0.25, 1.0], [0.0, None, None]], who="me")
    assert b"\n  [null, 0.25, 1.0],\n  [0.0, null, null]\n" in content
    write(tmp_path / "b.json", read(tmp_path / "a.json"))
    assert (tmp_path / "b.json").read_bytes() == content
    (tmp_path / "c.json").write_text(json.dumps(fields(values=[[None, 0.25, 1], [0, None, None]])))
    for name in ("region", "who", "when", "note"):                   # optional
        rest = {key: value for key, value in fields(who="x", note="y").items() if key != name}
        (tmp_path / "d.json").write_text(json.dumps(rest))
        assert getattr(read(tmp_path / "d.json"), name) == ((0, 0, 1, 1) if name == "region" else "")
    by_hand = read(tmp_path / "c.json")
    assert np.array_equal(by_hand.edited, edited) and by_hand.values.tolist() == [[0, 0.25, 1], [0, 0, 0]]


def test_writing_replaces_whole_files_only(tmp_path, monkeypatch):
    place = tmp_path / "a.json"
    write(place, edit(note="old"))

    def fail(*arguments):
        raise OSError(28, "No space left on device")

    for step in ("replace", "fsync"):
        with monkeypatch.context() as patched:
            patched.setattr(os, step, fail)
            assert "No space left" in refused(write, place, edit(note="new"))
        assert read(place).note == "old" and len(list(tmp_path.iterdir())) == 1
    write(place, edit(note="new"))
    assert read(place).note == "new"


def test_an_edit_that_could_not_be_read_is_not_written(tmp_path):
    place = tmp_path / "a.json"
    write(place, edit(note="old"))
    wrong = [edit(note="x" * edits.MAX_BYTES), edit(grid=(257, 1)), edit(image="../up"), edit(sum_="md5:1"),
             edit(region=(0, 0, 0, 1)), Edit("a", SUM, np.full((1, 1), 1.5, np.float32), np.ones((1, 1), bool)),
             Edit("a", SUM, np.full((1, 1), np.nan, np.float32), np.ones((1, 1), bool))]
    for given in wrong:
        refused(write, place, given)
        assert read(place).note == "old" and len(list(tmp_path.iterdir())) == 1
    (tmp_path / "file").write_text("")
    assert str(tmp_path / "file") in refused(write, tmp_path / "file" / "below.json", edit())


# ------------------------------------------------------------------------------------------ damaged and hostile files


def encoded(**changed) -> bytes:
    return json.dumps(fields(**changed)).encode()


HOSTILE = {
    "empty": b"", "cut off": encoded()[:90], "not JSON": b"<html>404</html>", "conflict": b"<<<<<<< HEAD\n" + encoded(),
    "not UTF-8": b'{"format": "\xff\xfe"}', "UTF-16": encoded().decode().encode("utf-16"), "NUL": b"\0" * 500,
    "a list": b"[]", "a number": b"3", "null": b"null", "another object": b"{}",
    "field twice": encoded().replace(b'"who": ""', b'"values": []'), "too large": b" " * (edits.MAX_BYTES + 1),
    "deep": encoded(values=0).replace(b'"values": 0', b'"values": ' + b"[" * 100_000 + b"]" * 100_000),
    "deep objects": b'{"a":' * 50_000, "many digits": encoded(who=0).replace(b'"who": 0', b'"who": ' + b"9" * 1_000_000),
    "infinite region": encoded(region=[0, 0, 1, 7]).replace(b"7]", b"1e999]"),
}
for name in ("format", "image", "checksum", "grid", "values"):
    HOSTILE[f"no {name}"] = json.dumps({key: value for key, value in fields().items() if key != name}).encode()
for text in ("1e999", "-1e999", "9" * 5000):
    HOSTILE[f"value {text[:6]}"] = encoded(values=[[None, 7, 1], [0, None, None]]).replace(b"7", text.encode())
for value in (1.0001, -0.0001, True, "0.5", [0.5], float("nan"), float("-inf"), 10 ** 19):
    HOSTILE[f"value {value!r}"] = encoded(values=[[None, value, 1], [0, None, None]])
WRONG = {
    "format": ["attention-edit-2", ["attention-edit-1"], None],
    "extra": [1],
    "image": [3, "", "../../etc/passwd", "/a", ".git/config", "a\0b", "\ud800"],
    "checksum": ["sha256:12", None, SUM + "\n", SUM.upper()],
    "note": [["x"], None],
    "grid": [[2], [0, 3], [2.0, 3], [True, 3], [10 ** 18, 10 ** 18], [-2, 3], "23", [3, 2], [2, 257], None],
    "values": [[[None, 0.25, 1]], [[0, 0, 0], [0, 0]], [[0, 0, 0], [0, 0, 0, 0]], ["abc", "abc"], None, {"0": []}, []],
    "region": [[0, 0, 1], [0.5, 0, 0.5, 1], [1, 0, 0, 1], [0, 0, 1, 1.01], [-0.1, 0, 1, 1], [0, 0, 1, True], None,
               [0, 0, 1, float("nan")], ["0", 0, 1, 1]],
}
HOSTILE |= {f"{field} {value!r}": encoded(**{field: value}) for field, values in WRONG.items() for value in values}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_damaged_or_hostile_file_is_refused_in_one_line(tmp_path, kind):
    place = tmp_path / "a.json"
    place.write_bytes(HOSTILE[kind])
    text = refused(read, place)
    assert str(place) in text and ("edit the image again" in text or "Remove it" in text)
    if kind == "many digits":
        assert "1000000 digits" in text                 # which Python does not convert
        os.truncate(place, 10 ** 10)
        assert "more than 4,000,000 bytes" in refused(read, place)


def test_only_regular_files_are_read(tmp_path):
    os.mkfifo(tmp_path / "pipe.json")
    (tmp_path / "folder.json").mkdir()
    write(tmp_path / "real", edit())
    (tmp_path / "link.json").symlink_to(tmp_path / "real")
    (tmp_path / "nowhere.json").symlink_to(tmp_path / "gone")
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else None
    for name in ("pipe.json", "folder.json", "link.json", "nowhere.json", "gone.json"):
        assert name in refused(read, tmp_path / name)
    assert "regular" in refused(read, "/dev/zero")
    (tmp_path / "two\nlines \u202e.json").write_text("{}")
    refused(read, tmp_path / "two\nlines \u202e.json")                 # one line, as all
    refused(read, tmp_path / ("x" * 5000))
    refused(write, tmp_path / ("x" * 300), edit())
    assert before is None or len(os.listdir("/proc/self/fd")) == before


# ------------------------------------------------------------------------------------------------------ names


@pytest.mark.parametrize("name", ["", ".", "..", "/etc/passwd", "../a", "a/../b", "a/./b", "a//b", "a/", "/", ".git/hooks/x",
                                  "a/.GIT/x", "a\0b", "\ud800"])
def test_names_that_leave_the_folder_are_refused(tmp_path, name):
    refused(path_of, tmp_path, name)


AWKWARD = ["a.png", "a.png.json", "a", "a.json", "été/日本.png", "with space /x .png", "-x.png", "a\\b.png", "new\nline.png",
           "%2e%2e/x.png", "~/x.png", "C:x.png", "con.png", "x" * 240 + ".png", os.fsdecode(b"latin-\xe9.png"), "...",
           "deep/" * 40 + "x"]


def test_awkward_names_work_and_share_no_file(tmp_path):
    split = files(str(tmp_path / "data"), *AWKWARD)
    assert [split.name(index) for index in range(len(split))] == AWKWARD
    for index in range(len(split)):
        mark(tmp_path / "edits", split, index, note=str(index))
    found = find(tmp_path / "edits", split)
    assert [(found[index].image, found[index].note) for index in range(len(split))] == [
        (name, str(number)) for number, name in enumerate(AWKWARD)]
    assert len({path_of("x", name) for name in AWKWARD}) == len(AWKWARD)


def test_a_link_does_not_lead_out_of_the_folder(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "edits").mkdir()
    (tmp_path / "edits" / "train").symlink_to(tmp_path / "elsewhere")
    assert "link" in refused(path_of, tmp_path / "edits", "train/3")
    assert "link" in refused(find, tmp_path / "edits", pictures())
    (tmp_path / "way").symlink_to(tmp_path / "elsewhere")           # the folder itself may be one
    mark(tmp_path / "way", pictures(), 3)
    assert list(find(tmp_path / "way", pictures())) == [3]


def test_names_of_files_are_relative_safe_and_unique(tmp_path, monkeypatch):
    """A list may name images above or next to the folder of the data set, or by absolute paths."""
    root = tmp_path / "data"
    (root / "sub").mkdir(parents=True)
    (tmp_path / "else" / "deep").mkdir(parents=True)
    (root / "link").symlink_to(tmp_path / "else" / "deep")
    named = ["a.png", "sub/a.png", "./sub//b.png", f"{root}/c.png", "../a.png", f"{tmp_path}/else/a.png", "sub/../../else/b.png",
             "link/../a.png", "link/a.png", "outside/a.png"]
    samples = [(os.path.join(root, name), 0) for name in named]
    names = [FileImages(samples, root).name(index) for index in range(len(samples))]
    assert names[:4] == ["a.png", "sub/a.png", "sub/b.png", "c.png"] and names[8:] == ["link/a.png", "outside/a.png"]
    assert len(set(names)) == len(names) and all(edits.is_safe(name) for name in names)
    assert all(name.startswith("outside/") and name.endswith(".png") for name in names[4:8])
    # However the folder of the data set is spelled, and wherever it is with what is around it:
    monkeypatch.chdir(root)
    for spelling in ("", ".", "../data", "..//data/", "./", f"{root}/", f"{tmp_path}//data"):
        spelled = FileImages([(os.path.join(spelling, name), 0) for name in named if not os.path.isabs(name)], spelling)
        assert [spelled.name(index) for index in range(len(spelled))] == [
            name for name, given in zip(names, named) if not os.path.isabs(given)], spelling


# -------------------------------------------------------------------------------------------------- a folder


def test_find_returns_the_edits_of_this_split_only(tmp_path):
    train, test = pictures(5, "train"), pictures(5, "test", 1)
    for split, index in ((train, 1), (train, 4), (test, 0)):
        mark(tmp_path, split, index, note=f"{split.part} {index}")
    (tmp_path / "README.md").write_text("# edits")
    (tmp_path / "notes.json").write_text("not an edit, and of no image")
    (tmp_path / "train" / ".1.tmp").write_text("half a fi")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "x.json").write_text("")
    (tmp_path / "test" / "9.json").write_text("of no image")
    assert {index: edit.note for index, edit in find(tmp_path, train).items()} == {1: "train 1", 4: "train 4"}
    assert {index: edit.note for index, edit in find(str(tmp_path), test).items()} == {0: "test 0"}
    assert find(tmp_path, pictures(5, "val")) == {}
    drawn = Subset(Concat([train, test]), [5, 4, 2, 5])              # an image may occur twice
    assert {index: edit.note for index, edit in find(tmp_path, drawn).items()} == {0: "test 0", 1: "train 4", 3: "test 0"}
    nothing = Edit("val/0", edits.checksum(pictures(5, "val"), 0), np.zeros((2, 2), np.float32), np.zeros((2, 2), bool))
    write(path_of(tmp_path, "val/0"), nothing)
    assert find(tmp_path, pictures(5, "val")) == {}                  # no patch is edited


def test_a_checksum_is_the_sha_256_of_the_stored_bytes(tmp_path):
    """The checksum of the file, or of the pixels of an image in memory, which anyone with the images can check."""
    split, arrays = files(str(tmp_path), "a.png"), pictures()
    assert edits.checksum(split, 0) == f"sha256:{hashlib.sha256((tmp_path / 'a.png').read_bytes()).hexdigest()}"
    assert edits.checksum(arrays, 3) == f"sha256:{hashlib.sha256(arrays.images[3].tobytes()).hexdigest()}"


def test_an_edit_of_other_pixels_is_refused(tmp_path):
    mark(tmp_path, pictures(), 2)
    text = refused(find, tmp_path, pictures(seed=9))
    assert str(tmp_path / "train" / "2.json") in text and "changed" in text
    other = path_of(tmp_path, "train/3")
    other.write_bytes(path_of(tmp_path, "train/2").read_bytes())
    text = refused(find, tmp_path, pictures())
    assert str(other) in text and "train/2" in text


def test_a_missing_folder_and_a_file_in_its_place(tmp_path):
    assert str(tmp_path / "gone") in refused(find, tmp_path / "gone", pictures())
    (tmp_path / "file").write_text("")
    assert str(tmp_path / "file") in refused(find, tmp_path / "file", pictures())
    (tmp_path / "empty").mkdir()
    assert find(tmp_path / "empty", pictures()) == {}
