"""The editor's page in a browser: painting, moving, and losing nothing when servers, tabs and answers are lost."""

import dataclasses
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from galleries import gallery, serving, values_of

from utils.attention.editor.session import Session

pytest.importorskip("starlette", reason="needs requirements-annotate.txt")
pytest.importorskip("uvicorn", reason="needs requirements-annotate.txt")
sync_api = pytest.importorskip("playwright.sync_api", reason="needs requirements-test.txt")
expect = sync_api.expect

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium or google-chrome on this machine")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync"]
expect.set_options(timeout=8000)


@pytest.fixture(scope="module", autouse=True)
def program(tmp_path_factory):
    """A server in another process, for the test that kills it; it starts while other tests run. -> (process, folder of edits)"""
    folder = tmp_path_factory.mktemp("program") / "edits"
    process = subprocess.Popen([sys.executable, Path(__file__).parents[1] / "support/galleries.py", folder, "0"], text=True,
                               stdout=subprocess.PIPE, env=os.environ | {"OMP_NUM_THREADS": "1"})
    yield process, folder
    process.kill()
    process.communicate()


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def context(browser):
    """Check that no page sends a request to another origin, and that none logs an error."""
    context = browser.new_context(viewport={"width": 1280, "height": 800}, service_workers="block")
    context.set_default_timeout(8000)
    complaints, asked = watch(context)
    yield context
    context.close()
    assert not complaints, complaints
    assert all(re.match(r"http://127\.0\.0\.1:\d+/", address) for address in asked), asked


def watch(context) -> tuple[list[str], list[str]]:
    complaints, asked = [], []
    context.on("request", lambda request: asked.append(request.url))
    context.on("weberror", lambda error: complaints.append(str(error.error)))
    # Chromium itself reports requests that fail; the tests check what the page makes of them.
    context.on("console", lambda message: complaints.append(message.text) if message.type in ("error", "warning")
               and "Failed to load resource" not in message.text else None)
    return complaints, asked


@pytest.fixture
def folder(tmp_path) -> Path:
    return tmp_path / "edits"


def opened(context, port: int, fragment: str = ""):
    page = context.new_page()
    page.goto(f"http://127.0.0.1:{port}/{fragment}")
    expect(page.locator("#name")).to_contain_text("train/")
    return page


@pytest.fixture
def page(context, folder):
    """Of image 1, served from the folder."""
    with serving(Session(gallery(), folder)) as port:
        yield opened(context, port)


def middle(page, row: float, column: float, grid=(4, 4)) -> tuple[float, float]:
    """Of a patch, in the window."""
    box = page.locator("#board").bounding_box()
    return box["x"] + (column + 0.5) / grid[1] * box["width"], box["y"] + (row + 0.5) / grid[0] * box["height"]


def paint(page, *patches, grid=(4, 4)) -> None:
    """One stroke over patches (row, column)."""
    page.mouse.move(*middle(page, *patches[0], grid))
    page.mouse.down()
    for patch in patches[1:]:
        page.mouse.move(*middle(page, *patch, grid))
    page.mouse.up()


def saved(page) -> None:
    expect(page.locator("#saved")).to_have_text("saved")


def test_painting_changes_weight_and_prediction_and_is_saved(page, folder):
    readout, table = page.locator("#readout"), page.locator("#top")
    page.mouse.move(*middle(page, 0, 0))
    own = re.search(r"softmax weight (0\.\d+)$", readout.inner_text())[1]
    before = table.inner_text()
    expect(page.locator("#now")).to_have_text("no edit yet")
    paint(page, (0, 0), (0, 3), (2, 3))                          # fast: three events for six patches
    saved(page)
    assert values_of(folder / "train/0.png.json") == [[0.9] * 4, [None] * 3 + [0.9], [None] * 3 + [0.9], [None] * 4]
    expect(table).not_to_have_text(before)
    expect(page.locator("#now")).to_contain_text("%")
    page.mouse.move(*middle(page, 0, 0))
    expect(readout).to_contain_text(f"softmax weight {own} → ")
    now = re.search(r"→ 0\.9 \(edited\), softmax weight \S+ → (0\.\d+)$", readout.inner_text())[1]
    assert float(now) > 1.5 * float(own)
    expect(page.locator("#counts")).to_contain_text("1 edited")


def test_undo_redo_erase_clear_and_reset(page, folder):
    file = folder / "train/0.png.json"
    expect(page.locator("#undo")).to_be_disabled()
    paint(page, (1, 1), (1, 2))
    page.get_by_label("erase").check()
    paint(page, (1, 1))
    saved(page)
    assert values_of(file)[1] == [None, None, 0.9, None]
    page.get_by_role("button", name="Undo").click()
    saved(page)
    assert values_of(file)[1] == [None, 0.9, 0.9, None]
    page.keyboard.press("Control+z")
    saved(page)
    assert not file.exists()
    for keys, row in (("Control+Shift+z", [None, 0.9, 0.9, None]), ("Control+y", [None, None, 0.9, None])):
        page.keyboard.press(keys)
        saved(page)
        assert values_of(file)[1] == row
    page.get_by_role("button", name="Clear to 0").click()
    page.get_by_label("3 patches").check()
    page.locator("#value").fill("1")
    paint(page, (0, 0))                                           # a large brush at the border
    saved(page)
    assert values_of(file) == [[1, 1, 0, 0], [1, 1, 0, 0], [0] * 4, [0] * 4]
    page.get_by_role("button", name="Reset").click()
    saved(page)
    assert not file.exists()
    expect(page.get_by_role("button", name="Reset")).to_be_disabled()
    page.keyboard.press("Control+z")
    saved(page)
    assert values_of(file)[0] == [1, 1, 0, 0]


def test_the_keyboard_is_enough(page, folder):
    page.locator("#board").focus()
    for key in ("ArrowDown", "ArrowRight", "3", "Space", "ArrowRight", "+", "Space", "ArrowRight", "0", "Space", "ArrowLeft",
                "Delete", "]", "7", "ArrowDown", "ArrowLeft", "Enter"):
        page.keyboard.press(key)
    saved(page)
    assert values_of(folder / "train/0.png.json") == [[None] * 4, [None, 0.3, None, 0], [None, 0.7, 0.7, None],
                                                      [None, 0.7, 0.7, None]]
    expect(page.locator("#announcement")).to_contain_text("row 3, column 2")
    page.keyboard.press("m")
    expect(page.get_by_label("softmax weight")).to_be_checked()
    expect(page.locator("#legend-title")).to_have_text("softmax weight")
    for key, number in (("n", "2"), ("PageDown", "3"), ("p", "2"), ("PageUp", "1")):
        page.keyboard.press(key)
        expect(page.locator("#jump")).to_have_value(number)
        expect(page.locator("#name")).to_have_text(f"train/{int(number) - 1}.png")
    page.keyboard.press("p")
    expect(page.get_by_role("alert")).to_have_text("No earlier image.")
    page.keyboard.press("?")
    expect(page.get_by_role("dialog")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.get_by_role("dialog")).to_be_hidden()


def test_moving_filters_and_reload(page, folder):
    paint(page, (0, 0))
    page.get_by_role("button", name="Next").click()
    expect(page.locator("#name")).to_have_text("train/1.png")
    expect(page.locator("#undo")).to_be_disabled()
    page.get_by_label("Image", exact=True).fill("6")
    page.keyboard.press("Enter")
    expect(page.locator("#name")).to_have_text("train/5.png")
    page.reload()
    expect(page.locator("#name")).to_have_text("train/5.png")
    expect(page.locator("#counts")).to_have_text("1 edited, 3 misclassified")
    page.get_by_label("Show").select_option("misclassified")
    expect(page.locator("#name")).to_have_text("train/7.png")
    expect(page.locator("#place")).to_have_text("2 of 3")
    expect(page.locator("#before")).to_contain_text("wrong")
    page.keyboard.press("Escape")
    page.get_by_role("button", name="Previous").click()
    expect(page.locator("#name")).to_have_text("train/3.png")
    page.reload()
    expect(page.locator("#place")).to_have_text("1 of 3")
    page.get_by_label("Show").select_option("edited")
    expect(page.locator("#name")).to_have_text("train/0.png")
    page.mouse.move(*middle(page, 0, 0))
    expect(page.locator("#readout")).to_contain_text("→ 0.9 (edited)")
    page.get_by_role("button", name="Next").click()
    expect(page.get_by_role("alert")).to_have_text("No later image is edited.")
    page.get_by_label("Image", exact=True).fill("99")
    page.keyboard.press("Enter")
    expect(page.get_by_role("alert")).to_contain_text("There is no image 99")


def test_a_killed_server_and_a_closed_tab_lose_nothing(context, program):
    """Painting continues while the server is away. The page sends everything when the server is back; so does the next tab."""
    process, folder = program
    port = int(process.stdout.readline())
    page = opened(context, port)
    page.mouse.move(*middle(page, 0, 0))
    page.mouse.down()
    page.mouse.move(*middle(page, 0, 1))
    process.kill()                                                     # within a stroke
    process.wait()
    page.mouse.move(*middle(page, 0, 3))
    page.mouse.up()
    expect(page.locator("#saved")).to_contain_text("not saved: the server does not answer; trying again")
    paint(page, (3, 0))
    with serving(Session(gallery(), folder), port):
        saved(page)
        assert values_of(folder / "train/0.png.json") == [[0.9] * 4, [None] * 4, [None] * 4, [0.9] + [None] * 3]
    paint(page, (3, 3))
    expect(page.locator("#saved")).to_contain_text("not saved")
    page.close()
    with serving(Session(gallery(), folder), port):
        page = opened(context, port, "#5")                             # of another image: the edit is brought all the same
        saved(page)
        expect(page.locator("#counts")).to_contain_text("1 edited")
        assert values_of(folder / "train/0.png.json")[3] == [0.9, None, None, 0.9]


def test_a_lost_answer_is_no_conflict(page, folder):
    """The server has saved the edit, but the page does not know it: the page sends it again, with what was painted meanwhile."""
    lost = []

    def lose(route):
        if len(lost) < 2:
            route.fetch()
            lost.append(route.request.post_data)
            route.abort()
        else:
            route.continue_()

    page.route("**/edit", lose)
    paint(page, (0, 0))
    expect(page.locator("#saved")).to_contain_text("not saved")
    paint(page, (1, 1))
    saved(page)
    assert values_of(folder / "train/0.png.json")[:2] == [[0.9] + [None] * 3, [None, 0.9, None, None]]
    expect(page.get_by_role("alert")).to_be_hidden()
    assert len(lost) == 2


def test_an_edit_replaced_by_another_tab_is_kept_until_the_person_has_chosen(context, folder):
    """Also at the next image: the notice stays, the values survive a reload, and the person can apply or discard them."""
    file = folder / "train/2.png.json"
    with serving(Session(gallery(), folder)) as port:
        first, second = opened(context, port, "#3"), opened(context, port, "#3")
        paint(first, (0, 0))
        saved(first)
        paint(second, (3, 3))
        second.keyboard.press("n")
        expect(second.locator("#name")).to_have_text("train/3.png")
        notice = second.get_by_role("alert")
        expect(notice).to_contain_text("Image 3 was edited elsewhere")
        second.keyboard.press("n")
        expect(second.locator("#name")).to_have_text("train/4.png")
        expect(notice).to_contain_text("Image 3 was edited elsewhere")
        assert values_of(file) == [[0.9] + [None] * 3] + [[None] * 4] * 3
        second.reload()
        second.get_by_role("button", name="Open image 3").click()
        expect(second.locator("#name")).to_have_text("train/2.png")
        second.reload()
        second.get_by_role("button", name="Take mine").click()
        expect(notice).to_be_hidden()
        saved(second)
        assert values_of(file) == [[None] * 4] * 3 + [[None] * 3 + [0.9]]
        assert second.evaluate("localStorage.length") == 0
        second.get_by_role("button", name="Undo").click()
        saved(second)
        assert values_of(file)[0] == [0.9] + [None] * 3
        paint(second, (2, 2))
        saved(second)
        first.bring_to_front()
        notice = first.get_by_role("alert")
        first.route("**/edit", lambda route: route.abort())           # its answer comes when it shows the next image
        paint(first, (1, 1))
        first.keyboard.press("n")
        expect(first.locator("#name")).to_have_text("train/3.png")
        first.unroute("**/edit")
        first.get_by_role("button", name="Dismiss").click()
        expect(notice).to_be_hidden()
        first.keyboard.press("p")
        expect(first.locator("#name")).to_have_text("train/2.png")
        first.get_by_role("button", name="Keep that edit").click()
        expect(notice).to_be_hidden()
        saved(first)
        assert first.evaluate("localStorage.length") == 0
        assert values_of(file)[1:3] == [[None] * 4, [None, None, 0.9, None]]


def test_damaged_edits_and_unreadable_images_are_reported(context, folder):
    path = folder / "train/1.png.json"
    path.parent.mkdir(parents=True)
    path.write_text("{")
    with serving(Session(gallery(unreadable=(2,)), folder)) as port:
        page = opened(context, port, "#2")
        expect(page.get_by_role("alert")).to_contain_text("cannot be used")
        assert path.read_text() == "{"
        paint(page, (0, 0))
        saved(page)
        assert values_of(path)[0] == [0.9] + [None] * 3 and Path(f"{path}.damaged").read_text() == "{"
        expect(page.get_by_role("alert")).to_be_hidden()
        page.keyboard.press("n")
        expect(page.get_by_role("alert")).to_contain_text("cut off")
        expect(page.locator("#readout")).to_have_text("There is no picture to paint on.")
        expect(page.locator(".scale")).to_be_hidden()
        paint(page, (0, 0))
        assert not (folder / "train/2.png.json").exists()
        page.keyboard.press("n")
        expect(page.locator("#name")).to_have_text("train/3.png")
        expect(page.get_by_role("alert")).to_be_hidden()


def test_a_disk_that_refuses_is_shown_and_tried_again(context, folder):
    folder.mkdir()
    (folder / "train").write_text("in the way")
    with serving(Session(gallery(), folder)) as port:
        page = opened(context, port)
        paint(page, (0, 0))
        expect(page.locator("#saved")).to_contain_text("not saved: ")
        expect(page.locator("#saved")).to_contain_text("trying again")
        now = page.locator("#top td:last-child")                       # the model has not seen this edit yet
        assert page.locator("#now").inner_text() == "…" and set(now.all_inner_texts()) == {"…"}
        page.get_by_label("softmax weight").check()
        page.mouse.move(*middle(page, 0, 0))
        expect(page.locator("#readout")).to_contain_text("→ …")
        (folder / "train").unlink()
        saved(page)
        assert values_of(folder / "train/0.png.json")[0][0] == 0.9
        expect(page.locator("#now")).to_contain_text("%")
        expect(now.first).to_contain_text("%")


def test_a_picture_that_was_replaced_gets_no_edit_unseen(context, folder):
    """Strokes on the old picture are kept, and saved once the person continues on the new one."""
    images, checksums = gallery(), ["sha256:" + "0" * 64]
    images = dataclasses.replace(images, checksum=lambda index: checksums[-1])
    with serving(Session(images, folder)) as port:
        page = opened(context, port)
        checksums.append("sha256:" + "1" * 64)
        paint(page, (0, 0))
        for _ in range(2):
            expect(page.locator("#saved")).to_contain_text("not saved: image 1: the picture was replaced")
            assert not (folder / "train/0.png.json").exists()
            page.reload()
            expect(page.locator("#name")).to_have_text("train/0.png")
        paint(page, (1, 1))
        saved(page)
        assert [row.count(0.9) for row in values_of(folder / "train/0.png.json")] == [1, 1, 0, 0]


def test_narrow_windows_touch_and_other_grids(browser, tmp_path):
    """Images of two sizes in one browser window."""
    context = browser.new_context(viewport={"width": 360, "height": 640}, has_touch=True, color_scheme="dark")
    complaints, _ = watch(context)
    for grid in ((3, 5), (32, 32)):
        folder = tmp_path / str(grid[0])
        with serving(Session(gallery(grid, 4), folder)) as port:
            page = opened(context, port)
            row, column = grid[0] - 1, grid[1] // 2
            page.touchscreen.tap(*middle(page, row, column, grid))
            saved(page)
            values = values_of(folder / "train/0.png.json")
            assert [(y, x) for y in range(grid[0]) for x in range(grid[1]) if values[y][x] is not None] == [(row, column)]
            assert page.evaluate("document.documentElement.scrollWidth") <= 360
            tops = [page.locator(f"#{name}").bounding_box()["y"] for name in ("board", "brush", "top")]
            assert tops == sorted(tops), "the brush comes before the prediction"
            box = page.locator("#board").bounding_box()
            assert box["width"] * grid[0] == pytest.approx(box["height"] * grid[1])        # patches are squares
            page.close()
    context.close()
    assert not complaints, complaints
