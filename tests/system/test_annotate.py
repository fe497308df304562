"""annotate.py: which models and images it opens, what it prints, and the predictions and attention that it shows."""

import json
import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch
from miniatures import GOOD_TREE, csv_files, cub, png, tree
from PIL import Image
from runs import load_state

import annotate
import configs
import export
import models
from utils import config, launch
from utils.attention import edits
from utils.attention.editor import session as editing
from utils.build import open_model
from utils.data import datasets, splits, transforms
from utils.run import checkpoint

pytest.importorskip("starlette", reason="needs requirements-annotate.txt")
pytest.importorskip("uvicorn", reason="needs requirements-annotate.txt")


def write_run(folder: Path, classes=tuple("0123456789"), img_size=8, sigmoid="", **settings) -> Path:
    """Write a run of a random model. Return the path of its best.pt."""
    torch.manual_seed(0)
    given = {"dataset": "digits", "pretrained_dir": "none"} | settings
    facts = config.Facts(1097, len(classes), start_head_classes=len(classes))
    run = config.resolve(given | {"img_size": img_size}, facts).to_dict()
    model = models.create_model(configs.MODELS["ViT-Nano_2"], len(classes), img_size)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    if sigmoid:
        models.use_sigmoid_attention(model, sigmoid)
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint.save(folder / "best.pt", checkpoint.RunState(
        1, 1, 0, model.state_dict(), {}, {}, {"step": 1, "accuracy": 0.5}, {}, run, model.config.to_dict(), list(classes), 1097,
        1.0))
    return folder / "best.pt"


@pytest.fixture
def run(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return write_run(tmp_path / "output/nano")


def gallery(*flags) -> editing.Gallery:
    args = annotate.parse([str(flag) for flag in flags])
    return annotate.open_gallery(args, open_model(args.checkpoint or annotate.newest_run()))


# -------------------------------------------------------------------------------------------------- what it shows


def test_the_newest_run_and_its_data_are_the_default(run, capsys):
    shown = gallery()
    assert (len(shown.labels), shown.grid, shown.title, list(shown.classes)) == (1097, (4, 4), "nano", list("0123456789"))
    printed = capsys.readouterr().out
    assert shown.name(3) == "train/3" and "last layer, 4" in printed and "--sigmoid_attention all" in printed
    with np.load(Path(annotate.__file__).parent / "assets/digits.npz") as file:
        assert (shown.labels == file["labels"][:1097]).all()
        np.testing.assert_array_equal(np.asarray(shown.picture(3))[..., 0], np.round(file["images"][3] * (255 / 16)))
    assert shown.facts[2:] == ["the model sees 8 x 8 px; edits act in layer 4; values are means over heads"]
    newer = write_run(run.parent.parent / "other", sigmoid="all", tta="flip")
    assert annotate.newest_run() == newer.parent.relative_to(Path.cwd())
    fact = gallery("--split", "test").facts[2]
    assert "layers 1, 2, 3, 4, of which 4 is shown;" in fact and fact.endswith("the run also averages its mirror image")
    assert not capsys.readouterr().out
    checkpoint.save(newer.with_name("step-00000001.pt"), load_state(newer))
    newer.unlink()
    assert gallery("--checkpoint", newer.parent).title == "other"


def test_a_file_of_another_program_is_shown_with_a_folder_of_images(run, tmp_path, capsys):
    """The file names no data set, so --data is required."""
    models.save_timm(models.load_model(run), tmp_path / "x.pth")
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    shown = gallery("--checkpoint", tmp_path / "x.pth", "--data", tmp_path)
    assert len(shown.labels) == 1 and list(shown.classes) == [f"class {number}" for number in range(10)]
    assert "ViT-Nano_2, " in shown.facts[0] and shown.title == "x.pth" and shown.predict([0])[0] in range(10)
    assert annotate.main(["--checkpoint", str(tmp_path / "x.pth")]) == 2
    assert "is not one of your runs, which name their data set. Add --data, a folder of images" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["run folder", "step file", "exported folder", "other program", "published name"])
def test_every_kind_of_checkpoint_is_opened(run, monkeypatch, capsys, kind):
    """The same kinds as in visualize.py. Without a run the edits are saved in output/edits, not next to the file."""
    from utils.attention.editor import server

    what, folder, served, heads = run.parent, "output/edits", [], []
    if kind == "run folder":
        folder = run.parent / "edits"
    elif kind == "step file":
        what = run.rename(run.with_name("step-00000001.pt"))
        folder = run.parent / "edits"
    elif kind == "exported folder":
        assert export.main(["output/nano", "--to", "folder", "--output", "exported"]) == 0
        what = "exported"
    elif kind == "other program":
        what = "elsewhere.pth"
        models.save_timm(models.load_model(run), what)
    else:
        what, heads = "deit/deit_tiny_patch16_224", ["--num_heads", "4"]                  # a small file instead
        Path("checkpoint/deit").mkdir(parents=True)
        models.save_timm(models.load_model(run), "checkpoint/deit/deit_tiny_patch16_224-a1311bcf.pth")
    Path("photos").mkdir()
    Image.new("RGB", (30, 20), (200, 0, 0)).save("photos/a.png")
    monkeypatch.setattr(server, "serve", lambda session, *_: served.append(session))
    assert annotate.main(["--port", "0", "--checkpoint", str(what), "--data", "photos", *heads]) == 0, capsys.readouterr().err
    assert served[0].folder == Path(folder) and served[0].image(0)["now"]
    assert f"1 image; 0 of them edited, in {folder}. Stop with Ctrl-C" in capsys.readouterr().out
    assert served[0].gallery.title == ("nano" if "nano" in str(folder) else Path(what).name)


def test_a_picture_has_the_pixels_of_its_image(run, tmp_path):
    """Only the part that the model sees is shown. Large images are reduced, small ones keep their size."""
    write_run(tmp_path / "output/crop", eval_crop=0.5)
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 256, (200, 300, 3), np.uint8))
    Path("photos").mkdir()
    photo.save("photos/a.png")
    Image.new("RGB", (3000, 2000)).save("photos/b.png")
    whole, middle = gallery("--checkpoint", run, "--data", "photos"), gallery("--checkpoint", "output/crop", "--data", "photos")
    np.testing.assert_array_equal(np.asarray(whole.picture(0)), np.asarray(photo))
    assert whole.picture(1).size == (1024, 683)
    # Of 24 x 16 px, of which the model sees the middle 8 x 8.
    np.testing.assert_array_equal(np.asarray(middle.picture(0)), np.asarray(photo.crop((100, 50, 200, 150))))
    assert middle.picture(1).size == (1000, 1000)


def test_predictions_and_maps_are_those_of_the_model(run):
    """Compared with a plain forward pass and the definition: logits l of the class token, sigmoid(l), softmax(l) of the edit."""
    shown = gallery("--checkpoint", run)
    model = models.load_model(run)
    pixels = torch.from_numpy(np.array(shown.picture(5))).movedim(-1, 0)[None]
    images = transforms.normalize(pixels, model.config.mean, model.config.std)
    captured = []
    handle = model.blocks[-1].attn.attend.register_forward_pre_hook(lambda _, inputs: captured.append(inputs[:2]))
    with torch.no_grad():
        plain = model(images)[0].softmax(-1).numpy()
    handle.remove()
    q, k = captured[0]
    logits = (q[0, :, :1] @ k[0].transpose(-2, -1) / q.shape[-1] ** 0.5)[:, 0].double()       # (H, 1 + h * w)
    own = shown.predict_with_attention(5)
    np.testing.assert_allclose(own.probabilities, plain, atol=1e-5)
    np.testing.assert_allclose(own.sigmoid.ravel(), logits[:, 1:].sigmoid().mean(0), atol=1e-5)
    np.testing.assert_allclose(own.weights.ravel(), logits.softmax(-1)[:, 1:].mean(0), atol=1e-5)
    values, edited = np.full((4, 4), 0.9, np.float32), np.zeros((4, 4), bool)
    edited[1, 2] = True
    logits[:, 1 + 6] = np.log(0.9 / 0.1)
    now = shown.predict_with_attention(5, values, edited)
    np.testing.assert_allclose(now.weights.ravel(), logits.softmax(-1)[:, 1:].mean(0), atol=1e-5)
    np.testing.assert_allclose(now.sigmoid, own.sigmoid, atol=1e-6)
    assert not np.allclose(now.probabilities, own.probabilities)
    assert (shown.predict_with_attention(5).weights == own.weights).all()
    assert shown.predict([5, 6]) == [plain.argmax(), shown.predict_with_attention(6).probabilities.argmax()]


TINY = {"patch_size": 4, "hidden_size": 12, "mlp_dim": 16, "num_heads": 3, "num_layers": 2}


@pytest.mark.parametrize("layers", ["last", "all", "2"])
@pytest.mark.parametrize("row", [{"distilled": True}, {"classifier": "patch_mean"}, {"classifier": "gap"}, {"in_channels": 1},
                                 {"class_layers": 2, "layer_scale": 0.1}, {"classifier": "token_mean", "registers": 2},
                                 {"classifier": "attention", "pool_heads": 1, "class_token": False, "rope": "dinov3"}], ids=str)
def test_edits_act_in_every_family_and_on_a_grid_that_is_not_square(row, layers):
    """The result equals that of the whole model, although only its last part runs after an edit."""
    torch.manual_seed(0)
    row = ({"gelu": "erf"} if row.keys() & {"distilled", "class_layers"} else {}) | row
    model = models.create_model(configs.architecture(**TINY, **row), 3, (12, 20)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    models.use_sigmoid_attention(model, "4" if row.get("class_layers") and layers == "2" else layers)
    transform = transforms.eval_transform(model.img_size, channels=model.config.in_channels)
    images = splits.ArrayImages(np.random.default_rng(0).integers(0, 256, (2, 9, 11, 3), np.uint8), np.array([0, 1]))
    viewer = annotate.Viewer(model, images, transform, lambda size: edits.WHOLE)
    own, edited = viewer.predict_with_attention(1), np.zeros((3, 5), bool)
    edited[2, 4] = True
    values = np.full((3, 5), 0.999, np.float32)
    now = viewer.predict_with_attention(1, values, edited)
    batch = viewer._input([viewer.seen(1)[0]])
    with torch.no_grad(), models.edit_attention(model, torch.from_numpy(values)[None], torch.from_numpy(edited)[None]):
        with models.record_attention(model) as maps:
            np.testing.assert_allclose(now.probabilities, model(batch)[0].softmax(-1).numpy(), atol=1e-6)
        whole = maps[model.sigmoid_layers[-1] - 1][0, :, model.query_rows, -15:].mean((0, 1)).view(3, 5)
        np.testing.assert_allclose(now.weights, whole.numpy(), atol=1e-6)
    with torch.no_grad():
        np.testing.assert_allclose(own.probabilities, model(batch)[0].softmax(-1).numpy(), atol=1e-6)
    assert own.weights.shape == own.sigmoid.shape == (3, 5) and 0 < own.weights.sum() <= 1 + 1e-6
    assert now.weights[2, 4] > own.weights[2, 4]
    assert not np.allclose(now.probabilities, own.probabilities, atol=1e-7)
    assert np.asarray(viewer.picture(0)).shape == ((9, 11) if model.config.in_channels == 1 else (9, 11, 3))


def test_a_diverged_model_is_reported(run, monkeypatch):
    """Weights that are not finite (an older version of the program saved them) are reported when the checkpoint is opened,
    finite weights when the outputs overflow."""
    state = load_state(run)
    state.model["head.weight"][:] = 3e38
    checkpoint.save(run, state)
    with pytest.raises(splits.ImageError, match="diverged"):
        gallery().predict_with_attention(0)
    state.model["head.bias"][:] = float("nan")
    monkeypatch.setattr(checkpoint, "check_finite", lambda weights: None)
    checkpoint.save(run, state)
    with pytest.raises(config.ConfigError, match=r"numbers of head\.bias are not finite"):
        gallery()


# ---------------------------------------------------------------------------------------------------------- images


def test_every_layout_of_an_image_folder_is_read(run, tmp_path):
    """train/ and val/, class folders, and a folder of images without classes. Classes are matched by name."""
    write_run(tmp_path / "output/bees", ("bee", "cow", "ant"), (8, 8))
    flags = ("--checkpoint", tmp_path / "output/bees", "--data")
    divided = tree(tmp_path / "divided", GOOD_TREE)
    assert gallery(*flags, divided).labels.tolist() == [2, 2, 2, 0, 0]
    val = gallery(*flags, divided, "--split", "val")
    assert val.labels.tolist() == [2, 0, 0] and val.name(0) == "val/ant/0.png"
    classes = gallery(*flags, tree(tmp_path / "classes", {"dog": 1, "bee": 2}))
    assert classes.labels.tolist() == [0, 0, -1] and classes.name(2) == "dog/0.png"
    (tmp_path / "plain").mkdir()
    for name in ("b.png", "a.PNG", "cut.png", "._a.png"):
        (tmp_path / "plain" / name).write_bytes(png(cut=40 if name == "cut.png" else None))
    plain = gallery(*flags, tmp_path / "plain")
    assert [plain.name(index) for index in range(3)] == ["a.PNG", "b.png", "cut.png"] and plain.labels.tolist() == [-1] * 3
    assert plain.predict([0, 1, 2])[2] == editing.UNREADABLE
    with pytest.raises(splits.ImageError):
        plain.predict_with_attention(2)
    layout = {"in/Train/ant": 2, "in/Train/bee": 1, "in/Val/bee": 1}
    capital = gallery(*flags, tree(tmp_path / "capital", layout), "--split", "val")
    assert capital.labels.tolist() == [0] and capital.name(0) == "in/Val/bee/0.png"
    lists = csv_files(tmp_path / "csv", train="a.png,ant\nb.png,bee\n", val="c.png,ant\n")
    assert gallery(*flags, lists).labels.tolist() == [2, 0]


def test_held_out_cropped_and_moved_data_of_the_run_are_found(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = tree(tmp_path / "data", {f"{part}/{name}": 10 for part in ("train", "val") for name in ("ant", "bee")})
    write_run(tmp_path / "output/held", ("ant", "bee"), dataset="folder", data_dir=data, val_fraction=0.2, eval_crop=0.5,
              model_type="ViT-Nano_2", recipe="vit-paper")
    train, val = gallery(), gallery("--split", "val")
    assert (len(train.labels), len(val.labels)) == (16, 4)
    (tmp_path / "data").rename(tmp_path / "moved")
    moved = gallery("--data", tmp_path / "moved", "--split", "val")
    assert [moved.name(index) for index in range(4)] == [val.name(index) for index in range(4)]
    # Images of 12 x 10 are resized to 19 x 16, twice the model's 8 x 8 pixels, and the model sees the middle.
    assert moved.region(0) == pytest.approx((6 / 19, 0.25, 14 / 19, 0.75))
    write_run(tmp_path / "output/birds", [f"c{i}" for i in range(200)], dataset="cub200", model_type="ViT-Nano_2",
              recipe="vit-paper")
    assert gallery("--checkpoint", "output/birds", "--data", cub(tmp_path / "cub")).name(0).startswith("images/001.")


def test_a_turned_photograph_is_edited_upright(tmp_path, monkeypatch):
    """In every kind of folder. A run that ignores EXIF orientations shows it as it is stored."""
    monkeypatch.chdir(tmp_path)
    exif = Image.Exif()
    exif[0x0112] = 6
    for place in ("tree/train/a", "tree/train/b", "tree/val/a", "loose"):
        Path(place).mkdir(parents=True)
        pixels = np.zeros((40, 30, 3), np.uint8)
        pixels[:10] = 255                                      # its top, which turns to the right
        Image.fromarray(pixels).save(f"{place}/0.jpg", exif=exif, quality=95)
    for exif_of_run in ("follow", "off"):
        path = write_run(Path("output") / exif_of_run, ("a", "b"), dataset="folder", data_dir="tree", exif=exif_of_run,
                         intensity_range=(0, 65535), alpha="white")
        for flags in ((), ("--data", "loose"), ("--data", "tree/train")):
            bright = np.asarray(gallery("--checkpoint", path, *flags).picture(0).resize((8, 8)), np.uint8)[..., 0] > 128
            assert bright[:, -1].all() == (exif_of_run == "follow") and bright[0].all() == (exif_of_run == "off"), flags


def test_an_image_replaced_while_the_server_runs_is_read_again(run, tmp_path):
    """Pixels, predictions and checksum are those of the new file."""
    folder = tmp_path / "plain"
    folder.mkdir()
    (folder / "a.png").write_bytes(png())
    shown, nothing = gallery("--data", folder), np.zeros((4, 4), bool)
    values = nothing.astype(np.float32)
    before = (np.asarray(shown.picture(0)), shown.predict_with_attention(0), shown.predict_with_attention(0, values, nothing),
              shown.checksum(0))
    (folder / "a.png").write_bytes(png(side=21))
    fresh = gallery("--data", folder)
    assert (np.asarray(shown.picture(0)) == fresh.picture(0)).all() and shown.picture(0).size != before[0].shape[1::-1]
    for now in (shown.predict_with_attention(0), shown.predict_with_attention(0, values, nothing)):
        np.testing.assert_allclose(now.weights, fresh.predict_with_attention(0).weights, atol=1e-6)
        assert not np.allclose(now.weights, before[1].weights, atol=1e-4)
    assert shown.checksum(0) == fresh.checksum(0) != before[3]


def test_edits_that_training_would_not_find_cause_a_warning(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    data = tree(tmp_path / "data", {f"{part}/{name}": 2 for part in ("train", "val") for name in ("ant", "bee")})
    write_run(tmp_path / "output/ants", ("ant", "bee"), dataset="folder", data_dir=data, model_type="ViT-Nano_2",
              recipe="vit-paper")
    for fine in ([], ["--data", data], ["--data", data, "--split", "val"]):
        gallery(*fine)
        assert not capsys.readouterr().err, fine
    gallery("--data", tmp_path / "data/train")                             # the same images as ant/0.png
    warning = capsys.readouterr().err
    assert warning.count("\n") == 1 and "ant/0.png" in warning and "train/ant/0.png" in warning and "train.py" in warning
    (tmp_path / "data").rename(tmp_path / "moved")
    gallery("--data", tmp_path / "moved/train")
    assert not capsys.readouterr().err, "the names of the run's images can no longer be read"
    write_run(tmp_path / "output/cifar", [str(i) for i in range(10)], dataset="cifar10", data_dir=str(tmp_path / "nowhere"),
              model_type="ViT-Nano_2", recipe="vit-paper")
    monkeypatch.setattr(datasets, "open_splits", lambda *_, **__: pytest.fail("this would download"))
    gallery("--checkpoint", "output/cifar", "--data", tmp_path / "moved/train")
    assert not capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("flags, word", [
    ("--checkpoint nowhere", "nowhere"), ("--checkpoint empty", "no intact checkpoint"),
    ("--checkpoint {root}/assets/ViT-Nano_2-letters.npz", "Add --data, a folder of images"),
    ("--data nowhere", "no such folder"), ("--data classes --split val", "Omit --split"), ("--edits file", "file"),
    ("--port 70000", "0 to 65535"), ("--port {busy}", "port {busy}"), ("--host no.such.host.invalid", "no.such.host.invalid")])
def test_bad_input_is_reported_in_one_line(run, capsys, flags, word):
    Path("empty").mkdir()
    Path("file").touch()
    tree(Path("classes"), {"ant": 1, "bee": 1})
    with socket.create_server(("127.0.0.1", 0)) as busy:
        known = {"root": Path(annotate.__file__).parent, "busy": busy.getsockname()[1]}
        port = [] if "--port" in flags else ["--port", "0"]
        assert annotate.main([*port, *flags.format(**known).split()]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("annotate.py: error: ") and printed.count("\n") == 1 and word.format(**known) in printed


def test_missing_runs_and_packages_are_reported(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert annotate.main(["--port", "0"]) == 2 and "train first" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert annotate.main([]) == 2
    assert capsys.readouterr().err == ("annotate.py: error: the editor needs the package uvicorn. Install it: "
                                       f"{launch.command_to_install('requirements-annotate.txt')}\n")


def test_serving_other_hosts_causes_a_warning(run, monkeypatch, capsys):
    from utils.attention.editor import server

    served = []
    monkeypatch.setattr(server, "serve", lambda *arguments: served.append(arguments))
    assert annotate.main(["--host", "0.0.0.0", "--port", "0"]) == 0
    out, err = capsys.readouterr()
    assert "warning: --host 0.0.0.0" in err and served[0][2] == "0.0.0.0"
    assert f"or http://{socket.gethostname()}:" in out and "0.0.0.0" not in out
    assert annotate.main(["--port", "0", "--who", "Ada", "--edits", "elsewhere/deep"]) == 0
    out, err = capsys.readouterr()
    assert not err and "1,097 images; 0 of them edited, in elsewhere/deep. Stop with Ctrl-C" in out
    assert Path("elsewhere/deep").is_dir() and served[1][0].who == "Ada"


def test_a_second_round_starts_with_the_edits_of_the_first(run, monkeypatch, capsys):
    """In the folder that the run was trained on, if it still exists. The first line counts the files in it."""
    from utils.attention.editor import server

    served = []
    monkeypatch.setattr(server, "serve", lambda session, *_: served.append(session.folder))
    split = datasets.open_splits("digits", "")
    for index, of in ((3, split.train), (5, split.train), (0, split.val)):
        edit = edits.Edit(of.name(index), edits.checksum(of, index), np.zeros((4, 4), np.float32), np.ones((4, 4), bool))
        edits.write(edits.path_of("output/nano/edits", of.name(index)), edit)
    second = write_run(Path("output/second"), pretrained_dir="output/nano",
                       attention_edits="output/nano/edits", attention_loss_weight=1.0)
    assert annotate.main(["--port", "0", "--checkpoint", str(second)]) == 0
    assert "1,097 images; 2 of them edited, in output/nano/edits, which also has 1 of other images. " in capsys.readouterr().out
    edits.path_of("output/nano/edits", split.train.name(3)).rename("output/nano/edits/val/x.png.json")
    annotate.main(["--port", "0", "--checkpoint", str(second), "--edits", "output/nano/edits"])
    assert "1 of them edited, in output/nano/edits, which also has 2 of other images. Stop" in capsys.readouterr().out
    Path("output/nano").rename("output/gone")
    annotate.main(["--port", "0", "--checkpoint", str(second)])
    annotate.main(["--port", "0", "--checkpoint", str(second), "--edits", "own"])
    assert served == [Path("output/nano/edits")] * 2 + [Path("output/second/edits"), Path("own")]


@pytest.mark.slow
def test_the_program_serves_until_ctrl_c(run):
    process = subprocess.Popen(
        [sys.executable, annotate.__file__, "--checkpoint", run, "--port", "0"], text=True, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,       # a shell may have started the tests with Ctrl-C ignored, and children inherit that
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))
    try:
        assert process.stdout.readline().startswith("The model has softmax attention")
        address, facts = process.stdout.readline().split("  ")
        assert facts == f"1,097 images; 0 of them edited, in {run.parent / 'edits'}. Stop with Ctrl-C\n"
        edit = json.dumps({"image": "train/7", "revision": "", "values": [[0.5] + [None] * 3] * 4}).encode()
        urllib.request.urlopen(urllib.request.Request(
            f"{address.rstrip('/')}/api/images/7/edit", edit, {"Content-Type": "application/json"}, method="PUT"), timeout=120)
        # train.py --attention_edits searches there.
        assert list(edits.find(run.parent / "edits", datasets.open_splits("digits", "").train)) == [7]
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0 and errors == ""
    finally:
        process.kill()
