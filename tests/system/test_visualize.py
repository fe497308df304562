"""visualize.py through the command line: every picture of every family, every option, bad input."""

import csv
import itertools
import math
import os
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from families import CLASSES, FAMILIES, LAYERS, save_run
from PIL import Image

import models
import visualize
from utils import config, process
from utils.build import open_model
from utils.data.datasets import imagenet_names
from utils.data.transforms import eval_transform
from utils.report import plots, views


@pytest.fixture
def figures(tmp_path, monkeypatch):
    """Return the figures by path, in an empty folder. They are not drawn to files, which would take most of the time."""
    kept = {}

    def keep(figure, path):
        kept[str(path)] = figure
        Path(path).touch()

    monkeypatch.setattr(plots, "save", keep)
    monkeypatch.chdir(tmp_path)
    return kept


@pytest.fixture
def photo(tmp_path) -> str:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 30, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    return "photo.png"


def draw(figures, *argv):
    """Call visualize.py. Return its only figure."""
    figures.clear()
    assert visualize.main([str(word) for word in argv]) == 0
    figure, = figures.values()
    return figure


def titles(figure) -> list[str]:
    """Return the titles, each in one line, without the range of a small map."""
    found = [axes.get_title() for axes in figure.axes if axes.get_title()]
    return [" ".join(re.sub(r"\n(max )?-?[\d.e-]+( to \S+)?$", "", title).split()) for title in found]


def heat_of(figure, index=1) -> np.ndarray:
    return np.asarray(figure.axes[index].images[0].get_array())


def recorded(folder, photo):
    """Return the model, its attention maps and logits for the photo, computed without visualize.py's code."""
    model = models.load_model(folder / "best.pt")
    size, grey = model.img_size, model.config.in_channels == 1
    image = Image.open(photo).resize(size[::-1], Image.Resampling.BILINEAR).convert("L" if grey else "RGB")
    pixels = torch.from_numpy(np.array(image)).view(*size, -1).permute(2, 0, 1)[None].float()
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (model.config.mean, model.config.std))
    with torch.no_grad(), models.record_attention(model) as maps:
        logits = model((pixels / 255 - mean) / std)
    return model, maps, logits


# -------------------------------------------------------------------------------------------------- families


@pytest.mark.parametrize("family", FAMILIES)
def test_attention_of_every_family(family, figures, photo):
    folder = save_run(Path("output/r"), family)
    figure = draw(figures, "attention", "--checkpoint", folder, "--image", photo)
    assert list(figures) == ["output/r/attention-photo.png"]
    model, maps, logits = recorded(folder, photo)
    readers = {"mae": ["mean of all queries"], "gap": ["mean of all queries"], "distilled": ["cls token", "dist token"]}.get(
        family, ["cls token"])
    found = titles(figure)
    for reader in readers:
        assert f"layer {LAYERS[family]}, mean of the heads, {reader}" in found
    talking = ["layer 1*", "layer 2*"] if family == "cait" else ["layer 1", "layer 2"]
    assert all(found.count(name) == len(readers) for name in talking)
    heads = [f"head {number}{f', {reader}' * (len(readers) > 1)}" for reader in readers for number in (1, 2)]
    assert all(found.count(name) == 1 for name in heads)
    # The last layer, as in the paper: the row (or the mean of the rows) over the patches.
    (height, width), rows = model.grid, model.query_rows
    row = maps[-1][0].mean(dim=0)[rows, -height * width:]
    expected = (row if len(readers) == 2 else row.mean(dim=0, keepdim=True)).view(-1, height, width)
    for number, wanted in enumerate(expected):
        shown = heat_of(figure, 2 * number + 1)
        assert shown.shape[0] / shown.shape[1] == height / width
        times = shown.shape[0] // height                     # a coarse grid is shown patch by patch
        np.testing.assert_allclose(shown, wanted.repeat_interleave(times, 0).repeat_interleave(times, 1), atol=1e-6)
    words, best = figure.axes[0].get_xlabel(), logits.softmax(-1)[0].topk(3)
    assert words.startswith("predicted:\n")
    for index, value in zip(best.indices.tolist(), best.values.tolist()):
        assert re.search(rf"^{index}: {100 * value:.0f}", words, re.MULTILINE) or f"{index}: {value:.1%}" in words
    image = np.asarray(figure.axes[0].images[0].get_array())
    assert image.shape == (*model.img_size, 3) and (family != "grey" or (image[..., 0] == image[..., 2]).all())
    note = " ".join(text.get_text() for text in figure.findobj(lambda artist: hasattr(artist, "get_text")))
    assert ("Talking heads" in note) == (family == "cait") and ("mean of the patches" in note) == (family in ("mae", "gap"))
    assert "run r, step 7" in note and "photo.png" in note


@pytest.mark.parametrize("family", FAMILIES)
def test_other_pictures_of_every_family(family, figures, photo):
    folder = save_run(Path("output/r"), family)
    subject = ["--checkpoint", folder, "--image", photo]
    for verb in ("rollout", "grad-rollout"):
        figure = draw(figures, verb, *subject)
        assert len(figure.axes) == (7 if family == "distilled" else 4) and heat_of(figure).max() > 0
    distance = draw(figures, "distance", *subject)
    dots = [line for line in distance.axes[0].get_lines() if line.get_marker() == "o"]
    assert len(dots) == 2 and len(dots[0].get_xdata()) == 2           # for CaiT the talking-heads layers
    positions = draw(figures, "position", "--checkpoint", folder)
    assert positions.axes[0].images[0].get_clim() == (-1, 1)
    code = visualize.main(["filters", "--checkpoint", str(folder)])
    assert code == (2 if family == "hybrid" else 0)
    code = visualize.main(["class-attention", *map(str, subject)])
    assert code == (0 if family == "cait" else 2)
    if family == "cait":
        assert titles(figures["output/r/class-attention-photo.png"])[1] == "layer 3, class attention, mean of the heads"


# --------------------------------------------------------------------------------------------------- options


def test_layer_and_head_select_the_map(figures, photo):
    folder = save_run(Path("output/r"))
    shown = {words: draw(figures, "attention", "--checkpoint", folder, "--image", photo, *words.split())
             for words in ("--layer 2", "--layer 1", "--layer 1 --head 2", "--head 1")}
    assert "layer 1, head 2, cls token" in titles(shown["--layer 1 --head 2"])
    maps = [heat_of(figure) for figure in shown.values()]
    assert len({part.tobytes() for part in maps}) == 4
    _, recording, _ = recorded(folder, photo)
    assert maps[2].max() == pytest.approx(recording[0][0, 1, 0, 1:].max().item(), abs=1e-2)


@pytest.mark.parametrize("verb", ["rollout", "grad-rollout"])
def test_options_of_rollout_change_the_picture(figures, photo, verb):
    folder = save_run(Path("output/r"))
    best = recorded(folder, photo)[2].argmax().item()
    subject = [verb, "--checkpoint", folder, "--image", photo]
    options = {"rollout": ["", "--fusion max", "--fusion min", "--drop 0.6"],
               "grad-rollout": ["", f"--target {(best + 1) % 10}", "--drop 0.9"]}[verb]
    shown = {words: heat_of(draw(figures, *subject, *words.split())) for words in options}
    assert len({heat.tobytes() for heat in shown.values()}) == len(options)
    assert verb == "rollout" or np.array_equal(shown[""], heat_of(draw(figures, *subject, "--target", best)))


def test_test_images_are_the_default(figures):
    folder = save_run(Path("output/r"))
    assert visualize.main(["rollout", "--checkpoint", str(folder), "--images", "2"]) == 0
    assert list(figures) == ["output/r/rollout-test-0.png", "output/r/rollout-test-250.png"]
    assert "true: " in next(iter(figures.values())).axes[0].get_xlabel()
    figure = draw(figures, "rollout", "--checkpoint", folder, "--images", "1", "--split", "val")
    assert list(figures) == ["output/r/rollout-val-0.png"] and figure.axes
    figure = draw(figures, "distance", "--checkpoint", folder, "--images", "3", "--split", "train")
    assert "3 images" in figure.get_suptitle()
    draw(figures, "rollout", "--checkpoint", save_run(Path("output/untested"), test="never"), "--images", 1)
    assert list(figures) == ["output/untested/rollout-val-0.png"]


def test_the_embedded_checkpoint_is_the_default(figures):
    assert visualize.main(["attention"]) == 0
    assert len(figures) == 4 and all(name.startswith("output/pictures/attention-test-") for name in figures)
    words = next(iter(figures.values())).axes[0].get_xlabel()
    assert re.search("^[A-Z]: ", words, re.MULTILINE) and "true: 0" in words


def test_a_file_of_another_program_is_drawn(figures, photo, tmp_path):
    torch.manual_seed(0)
    model = models.create_model("ViT-Nano_2", 1000)
    torch.nn.init.normal_(model.head.weight)
    models.save_timm(model, tmp_path / "some.safetensors")
    subject = ["rollout", "--checkpoint", "some.safetensors", "--image", photo]
    assert len(draw(figures, *subject).axes) > 0                       # the model is recognized from the file
    figures.clear()
    subject += ["--model_type", "ViT-Nano_2"]
    figure = draw(figures, *subject, "--img_size", "8x12")
    assert list(figures) == ["output/pictures/rollout-photo.png"]
    assert np.asarray(figure.axes[0].images[0].get_array()).shape == (8, 12, 3)
    first = figure.axes[0].get_xlabel().splitlines()[1].rpartition(":")[0]
    assert any(plots.plain(name, 30) == first for name in imagenet_names())
    resized = draw(figures, *subject, "--img_size", "8", "--interpolation", "bicubic", "--eval_crop", "0.875")
    expected = eval_transform((8, 8), crop=0.875, interpolation="bicubic")(Image.open(photo)).permute(1, 2, 0)
    np.testing.assert_array_equal(resized.axes[0].images[0].get_array(), expected)


def test_a_photograph_of_a_phone_is_shown_as_the_run_read_its_images(figures, tmp_path):
    """Upright. For a run that was started before EXIF orientations were followed, as it is stored."""
    exif = Image.Exif()
    exif[0x0112] = 6
    pixels = np.zeros((40, 30, 3), np.uint8)
    pixels[:10] = 255                                          # its top, which turns to the right
    Image.fromarray(pixels).save(tmp_path / "phone.jpg", exif=exif, quality=95)
    for number, exif_of_run in enumerate(("follow", "off")):
        folder = save_run(Path(f"output/{number}"), dataset="folder", exif=exif_of_run, intensity_range=(0, 65535), alpha="white",
                          eval_crop=0.0)
        shown = np.asarray(draw(figures, "rollout", "--checkpoint", folder, "--image", "phone.jpg").axes[0].images[0].get_array())
        bright = shown[..., 0] > 128
        assert bright[:, -1].all() == (exif_of_run == "follow") and bright[0].all() == (exif_of_run == "off")
    shown = np.asarray(draw(figures, "rollout", "--image", "phone.jpg").axes[0].images[0].get_array())
    assert (shown[:, -1, 0] > 128).all(), "a model that is not a run shows it upright"


def test_images_that_the_model_sees_nearly_black_are_reported(figures, capsys):
    """Images of 12 bits are nearly black for a run on images of 16 bits, and not for a run on images of 12 bits."""
    Image.fromarray(np.arange(0, 4096, 8, dtype=np.uint16).reshape(16, 32)).save("deep.png")
    for high in (65535, 4095):
        folder = save_run(Path(f"output/{high}"), dataset="folder", exif="off", intensity_range=(0, high), alpha="white")
        draw(figures, "rollout", "--checkpoint", folder, "--image", "deep.png")
        assert capsys.readouterr().err == ("warning: 1 of 1 decoded 16-bit images become nearly one color (deep.png: 8 to "
                                           "4,080); the model reads 0 to 65,535 as black to white\n") * (high == 65535)


def test_a_folder_gives_a_picture_for_each_image(figures, tmp_path):
    for name in ("a.png", "a.jpg", "sub/b.png", "._a.png", ".ipynb_checkpoints/a-checkpoint.png"):
        (tmp_path / "pics" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (9, 9), (10, 200, 30)).save(tmp_path / "pics" / name)
    assert visualize.main(["rollout", "--image", "pics", "pics/a.png", "--output", "there"]) == 0
    assert set(figures) == {f"there/rollout-{name}.png" for name in ("a", "a-2", "a-3", "sub-b")}


@pytest.mark.parametrize("verb", ["rollout", "distance"])
def test_an_unreadable_image_does_not_stop_the_others(verb, figures, tmp_path, capsys):
    for name in ("a.png", "b.png", "c.png"):
        (tmp_path / "pics" / "folder.png").mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (9, 9)).save(tmp_path / "pics" / name)
    (tmp_path / "pics/b.png").write_text("no picture")
    assert visualize.main([verb, "--image", "pics"]) == 0
    printed = capsys.readouterr()
    assert printed.err.startswith("warning: pics/b.png: cannot be read") and printed.err.count("\n") == 1
    names = ["rollout-a", "rollout-c"] if verb == "rollout" else ["distance"]
    assert list(figures) == [f"output/pictures/{name}.png" for name in names]
    assert verb == "rollout" or "2 images" in figures["output/pictures/distance.png"].get_suptitle()
    assert visualize.main([verb, "--image", "pics/b.png", "pics/b.png"]) == 2
    *warnings, last = capsys.readouterr().err.splitlines()
    assert [line[:19] for line in warnings] == ["warning: pics/b.png"] * 2 and last == "visualize.py: error: " + (
        "no picture could be made: the warnings above say why" if verb == "rollout" else
        "distance: none of the images could be read, so there are no distances to draw")


@pytest.mark.filterwarnings("error")
def test_names_of_files_can_be_any_bytes_of_any_length(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = [b"a\xff.png", "犬🐕.png".encode(), b"l" * 251 + b".png"]
    Path("pics").mkdir()
    for name in names:
        Image.new("RGB", (9, 9)).save(str(tmp_path / "pics") + "/" + os.fsdecode(name), format="PNG")
    monkeypatch.setattr(sys, "stdout", process.ResilientStream(sys.stdout))          # as in process.run
    assert visualize.main(["rollout", "--image", "pics", "--output", "there"]) == 0
    printed = capsys.readouterr()
    assert printed.err.startswith("warning: ") and "File name too long" in printed.err and printed.err.count("\n") == 1
    assert {os.fsencode(path.name) for path in Path("there").iterdir()} == {b"rollout-" + name for name in names[:2]}


def test_an_unwritable_output_is_reported_before_any_work(figures, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(views, "draw_confusion", lambda *_: pytest.fail("it was evaluated"))
    run = save_run(Path("output/r"))
    (tmp_path / "text").write_text("")
    (tmp_path / "there/confusion.png").mkdir(parents=True)
    for place, words in (("text/below", "--output text/below: text is a file"), ("there", "cannot write there/confusion.png: "),
                         ("/proc/none/a.png", "--output /proc/none: /proc cannot be written")):
        assert visualize.main(["confusion", "--checkpoint", str(run), "--output", place]) == 2
        printed = capsys.readouterr().err
        assert printed.startswith(f"visualize.py: error: {words}") and printed.count("\n") == 1


def test_the_image_is_shown_as_the_model_sees_it(figures, photo):
    folder = save_run(Path("output/r"), eval_crop=0.5)
    figure = draw(figures, "rollout", "--checkpoint", folder, "--image", photo)
    expected = eval_transform((16, 24), crop=0.5)(Image.open(photo)).permute(1, 2, 0).numpy()
    np.testing.assert_array_equal(figure.axes[0].images[0].get_array(), expected)


# --------------------------------------------------------------------------------------- pictures of a run


def test_curves_of_one_run_and_of_several(figures):
    first, second = save_run(Path("output/a")), save_run(Path("output/b"))
    loss = draw(figures, "curves", "--checkpoint", first / "best.pt").axes[0]
    assert list(figures) == ["output/a/curves.png"] and loss.get_lines()[0].get_ydata().tolist() == [2, 1, 2 / 3]
    figure = draw(figures, "curves", "--checkpoint", first, second)
    assert list(figures) == ["output/curves.png"]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [" a: no evaluation", " b: no evaluation"]


def test_curves_of_a_run_have_the_title_of_its_own_picture(run_train, figures):
    """A folder without config.json gives its name."""
    assert run_train("--name", "r", "--num_steps", 1) == 0
    own = figures["output/r/curves.png"].get_suptitle()
    assert draw(figures, "curves", "--checkpoint", "output/r").get_suptitle() == own and own.startswith("r: ViT")
    Path("output/r/config.json").write_text('{"config": 1}')
    assert draw(figures, "curves", "--checkpoint", "output/r").get_suptitle() == "r"


def test_images_that_best_was_chosen_on_are_not_called_test(tmp_path, monkeypatch):
    """A fraction of train is held out, and there is no test set."""
    monkeypatch.chdir(tmp_path)
    for number, name in enumerate(CLASSES * 2):
        (tmp_path / "data/train" / name).mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), 10 * number).save(tmp_path / "data/train" / name / f"{number}.png")
    subject = open_model(save_run(Path("output/run"), dataset="folder", data_dir="data", val_fraction=0.5))
    assert [len(visualize.split_of(subject, name)[1]) for name in ("train", "val")] == [10, 10]
    assert visualize.split_of(subject)[0] == "val"
    with pytest.raises(config.ConfigError, match=r"no test set, .* --split val"):
        visualize.split_of(subject, "test")


def test_confusion_counts_what_the_run_evaluates(run_train, figures):
    """With its mirror images and its precision. The worst mistakes are the first rows of mistakes.csv."""
    assert run_train("--name", "r", "--num_steps", 6, "--confusion_matrix", "--tta", "flip", "--precision", "bf16") == 0
    written = np.loadtxt("output/r/confusion.csv", delimiter=",", skiprows=1, usecols=range(1, 11), dtype=int)
    figure = draw(figures, "confusion", "--checkpoint", sorted(Path("output/r").glob("step-*.pt"))[-1])
    assert list(figures) == ["output/r/confusion.png"]
    table = figure.axes[0]
    counts = {(text.get_position()[1], text.get_position()[0]): int(text.get_text()) for text in table.texts}
    assert counts == {(row, column): written[row, column] for row, column in np.argwhere(written)}
    assert f"test: {written.trace() / 60:.2%} of 60 images right, with mirror images\n" in figure.get_suptitle()
    figure = draw(figures, "confusion", "--checkpoint", "output/r", "--split", "val")
    mistakes = csv.DictReader(Path("output/r/mistakes.csv").read_text().splitlines())
    assert [(axes.get_title(), axes.get_xlabel()) for axes in figure.axes if "\ntrue " in axes.get_title()] == [
        (f"{row['predicted']}: {float(row['probability']):.1%}\ntrue {row['true']}: {math.exp(-float(row['loss'])):.1%}",
         row["path"]) for row in itertools.islice(mistakes, 18)]
    figure = draw(figures, "confusion", "--checkpoint", "output/r", "--images", 10, "--split", "val")
    assert "val: " in figure.get_suptitle() and "of 10 images" in figure.get_suptitle()
    figure = draw(figures, "rollout", "--checkpoint", "output/r", "--images", 1)
    assert "\nprobabilities of this image only; the run also averages its mirror image" in figure.get_suptitle()


# ------------------------------------------------------------------------------------------------- bad input

BAD = {
    "another picture": ("portrait", "PICTURE must be attention"),
    "an option of another picture": ("position --layer 1", "--layer"),
    "no such checkpoint": ("attention --checkpoint nowhere", "--checkpoint nowhere: no such file or folder"),
    "an empty folder": ("attention --checkpoint empty", "no intact checkpoint"),
    "no image": ("attention --image nothing.png", "no such file or folder"),
    "a folder without images": ("attention --image empty", "no images"),
    "not an image": ("attention --image text.png", "cannot be read as an image"),
    "a layer too many": ("attention --layer 5 --images 1", "the model has 4 layers"),
    "a head too many": ("attention --head 5 --images 1", "the model has 4 heads"),
    "no such class": ("grad-rollout --target 26 --images 1", "Give a name (A, B, C, ...) or number (0 to 25)"),
    "no CaiT": ("class-attention --images 1", "CaiT"),
    "many pictures, one file": ("attention --output a.png", "give a folder"),
    "a split and images of one's own": ("attention --image text.png --split val", "--split"),
    "a file without its heads": ("attention --checkpoint some.pth --image text.png", "Add --num_heads"),
    "no data of its own": ("attention --checkpoint some.npz", "Add --image"),
    "a model type for the embedded one": ("attention --model_type ViT-B_16", "a run has its own"),
    "no log": ("curves --checkpoint empty", "no run with steps"),
    "curves of nothing": ("curves", "curves needs one run folder or several"),
    "resizing of a run": ("attention --eval_crop 0.5", "a run has its own"),
    "letters as digits": ("confusion", "--checkpoint is missing: confusion needs one of your runs, such as output/flowers"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_reported_in_one_line(case, figures, tmp_path, capsys):
    words, expected = BAD[case]
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.png").write_text("no picture")
    shutil.copy(Path(visualize.__file__).parent / "assets/ViT-Nano_2-letters.npz", "some.npz")
    torch.save(models.create_model("ViT-Nano_2", 3, hidden_size=40).state_dict(), tmp_path / "some.pth")
    before = sorted(tmp_path.rglob("*"))
    assert visualize.main(words.split()) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("visualize.py: error: ") and expected in printed.err, printed.err
    assert printed.err.count("\n") == 1 and sorted(tmp_path.rglob("*")) == before and not printed.out


STEP = '{"event": "train", "step": 1, "loss": 2, "lr": 0.1}'
FOREIGN = {
    '{"event": "eval", "step": 1, "split": "val", "loss": 1, "accuracy": 0.5}': 'event 2: an eval event without its "top5"',
    '{"event": "train", "step": 1, "loss": 1}': 'event 2: a train event without its "lr"',
    STEP.replace("2", '"abc"'): "\"loss\" is 'abc', not a number", STEP.replace("2", "null"): '"loss" is None, not a number',
    STEP.replace("0.1", "[1]"): '"lr" is [1], not a number', STEP.replace("2", "9" * 400): "999, not a number",
    STEP.replace("}", ', "attention_loss": null}'): '"attention_loss" is None'}


def test_a_log_of_another_program_is_reported_in_one_line(figures, capsys):
    Path("foreign").mkdir()
    for line, words in FOREIGN.items():
        Path("foreign/log.jsonl").write_text(f"{STEP}\n{line}\n")
        assert visualize.main(["curves", "--checkpoint", "foreign"]) == 2
        printed = capsys.readouterr().err
        assert printed.startswith("visualize.py: error: foreign/log.jsonl: ") and words in printed, printed
        assert printed.count("\n") == 1 and not figures


def test_a_picture_is_written_to_a_file(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert visualize.main(["rollout", "--images", "1", "--output", "one.pdf"]) == 0
    assert capsys.readouterr() == ("wrote one.pdf\n", "")
    assert Path("one.pdf").read_bytes().startswith(b"%PDF") and len(os.listdir()) == 1


def test_an_earlier_picture_is_replaced_and_no_other_file(tmp_path, monkeypatch, capsys):
    """Also if --output is a folder, where the name of a picture depends on that of the image."""
    monkeypatch.chdir(tmp_path)
    for name in ("new/a.png", "a.pdf", "a.svg"):
        for _ in range(2):
            assert visualize.main(["position", "--output", name]) == 0
    assert capsys.readouterr().out.count("wrote new/a.png") == 2
    Path("position.png").write_bytes(b"\x89PNG a photograph")
    for output in ("position.png", "."):
        assert visualize.main(["position", "--output", output]) == 2
        assert "--output position.png exists and was not drawn by this program" in capsys.readouterr().err
    assert Path("position.png").read_bytes() == b"\x89PNG a photograph"
