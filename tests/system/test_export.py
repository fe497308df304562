"""export.py through the command line: every format of every family, reading the export back as a checkpoint, bad input."""

import dataclasses
import json
import os
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from building import write_checkpoint
from families import CLASSES, FAMILIES, MECHANISMS, family_model, save_run
from filling import same_state
from PIL import Image

import export
import models
import train
import visualize
from models.__main__ import describe
from models.checkpoints.export import save_weights
from models.match import model_name
from utils import launch, process
from utils.build import open_model
from utils.data import datasets
from utils.data.splits import Subset
from utils.report import plots, views
from utils.run.log import read_log


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def run(*words) -> int:
    return export.main([str(word) for word in words])


READ = {"exif": "off", "intensity_range": (0, 4095), "alpha": "mask"}


def folder_of(family: str, own: dict | None = None, **settings) -> Path:
    """Export a run of that family to a folder and return the folder."""
    save_run(Path("output/r"), family, own, READ, **settings)
    assert run("output/r", "--to", "folder", "--output", "exported") == 0
    return Path("exported")


def photo(size: tuple[int, int] = (40, 30), mode: str = "RGB") -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def images_of(model, count: int = 2) -> torch.Tensor:
    return torch.randn(count, model.config.in_channels, *model.img_size, generator=torch.Generator().manual_seed(1))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# ---------------------------------------------------------------------------------------------- a folder is a checkpoint


@pytest.mark.parametrize("family", FAMILIES | MECHANISMS)
def test_an_exported_folder_is_the_run(family, capsys):
    """It has the same model, classes, preprocessing and way to read image files. An export of the folder is the same, byte for
    byte."""
    kind, _, size = (FAMILIES | MECHANISMS)[family]
    crop = {"eval_crop": 0.75 if isinstance(size, int) else 0.0}
    folder = folder_of(family, interpolation="bicubic", tta="flip" if family == "vit" else "none", **crop)
    assert sorted(os.listdir(folder)) == ["README.md", "config.json", "model.safetensors"]
    run_itself, opened = open_model("output/r"), open_model(folder)
    assert opened.title == f"{model_name(kind, opened.model.config)}, exported" and "(width 1" in opened.title
    assert ", with the sizes of the file)" in describe(str(folder))[1]
    assert same_state(run_itself.model, opened.model) and opened.model.load_report.resized == {}
    ours, theirs = run_itself.model.config.to_dict(), opened.model.config.to_dict()
    assert ours == theirs | {key: ours[key] for key in ("img_size", "channel_mean", "channel_std")}
    assert opened.model.img_size == run_itself.model.img_size
    assert (opened.classes, opened.named, opened.reading) == (tuple(CLASSES), True, run_itself.reading)
    assert {opened.settings[key] == run_itself.settings[key] for key in ("interpolation", "eval_crop", "tta")} == {True}
    image = photo()
    assert torch.equal(opened.transform(image), run_itself.transform(image))
    images = images_of(opened.model)
    assert torch.equal(opened.model(images), run_itself.model(images))
    assert run(folder, "--to", "folder", "--output", "again") == 0
    assert contents(folder) == contents(Path("again"))
    note = "timm's model has another eps (resnet_style): on images of noise"
    assert (note in capsys.readouterr().out) == (note[1:] in Path("again/README.md").read_text()) == (family == "hybrid")


def test_settings_that_do_not_follow_from_shapes_are_kept():
    """How the model computes, its number of heads, and a grid with as many patches as a square one."""
    own = {"num_heads": 6, "gelu": "erf", "norm_eps": 1e-5, "position_resize": "bicubic", "mean": (0.4, 0.5, 0.6),
           "img_size": (16, 64)}
    save_run(Path("output/r"), "vit", {key: own[key] for key in own if key != "img_size"})
    model = models.create_model("ViT-Ti_16", 3, (16, 64), patch_size=4, hidden_size=12, mlp_dim=17, num_heads=2, num_layers=1)
    assert run("output/r", "--to", "folder", "--output", "a") == 0
    config = open_model("a").model.config
    assert all(config[key] == own[key] for key in own if key != "img_size")
    arguments = json.loads(Path("a/config.json").read_text())
    assert arguments["architecture"] == "vit_base_patch16_clip_224" and arguments["model_args"]["pre_norm"] is False
    save_weights(model, Path("a/model.safetensors"))
    arguments["model_args"] |= {"img_size": [16, 64], "num_heads": 2}
    arguments |= {"label_names": ["a", "b", "c"]}
    Path("a/config.json").write_text(json.dumps(arguments))
    assert same_state(open_model("a").model, model)


def test_averaged_weights_are_exported():
    """And the folder exports to the same file as the run."""
    folder = folder_of("gap", ema_decay=0.9)
    assert run("output/r", "--to", "npz", "--output", "a.npz") == run(folder, "--to", "npz", "--output", "b.npz") == 0
    averaged = torch.load("output/r/best.pt", weights_only=True)["ema"]
    for path in (folder, "a.npz"):
        assert all(torch.equal(value, averaged[name]) for name, value in open_model(path).model.state_dict().items())
    assert Path("a.npz").read_bytes() == Path("b.npz").read_bytes()


def test_a_run_without_best_is_exported_from_its_newest_checkpoint_with_a_note(capsys):
    save_run(Path("output/r"), "gap")
    for step in (5, 7):
        shutil.copy("output/r/best.pt", f"output/r/step-{step:08d}.pt")
    Path("output/r/best.pt").unlink()
    assert run("output/r", "--to", "folder", "--output", "a") == 0
    assert "run r, step 7 (its newest checkpoint: it has no best.pt): 10 classes" in capsys.readouterr().out
    assert same_state(open_model("a").model, open_model("output/r/step-00000007.pt").model)


def test_evaluating_and_fine_tuning_the_folder_gives_the_run_s_figures(capfd, monkeypatch):
    """train.py --eval_only prints the same lines for the run and its exported folder. Fine-tuning from either logs the same
    values and ends with the same weights."""
    monkeypatch.setattr(plots, "save", lambda figure, path: Path(path).touch())
    digits = datasets.digits("")
    monkeypatch.setitem(datasets.DATASETS, "digits", lambda _: dataclasses.replace(digits, val=Subset(digits.val, range(60))))
    folder_of("vit", interpolation="bicubic", precision="fp32", tta="flip")
    figures, trained = [], []
    for start in ("--resume_path output/r/best.pt", "--dataset digits --pretrained_dir exported --head keep --precision fp32"):
        assert train.main([*start.split(), "--eval_only", "--device", "cpu"]) == 0
        figures.append([line for line in capfd.readouterr().out.splitlines() if "accuracy" in line])
    assert figures[0] == figures[1] != []
    write_checkpoint(Path("output/tiny/best.pt"), "--classifier", "patch_mean", "--img_size", 12)
    assert run("output/tiny", "--to", "folder", "--output", "tiny") == 0
    for name, start in (("a", "output/tiny"), ("b", "tiny")):
        assert train.main(f"--dataset digits --pretrained_dir {start} --name {name} --num_steps 2 --eval_every 2 "
                          "--train_batch_size 16 --device cpu".split()) == 0
        events = [{key: value for key, value in event.items() if key in ("step", "split", "loss", "lr", "accuracy")}
                  for event in read_log(Path("output", name))]
        trained.append((events, torch.load(f"output/{name}/step-00000002.pt", weights_only=True)["model"]))
    assert trained[0][0] == trained[1][0] and trained[0][1].keys() == trained[1][1].keys()
    assert all(torch.equal(value, trained[1][1][name]) for name, value in trained[0][1].items())


def test_pictures_of_the_folder_are_those_of_the_run():
    """The model's input, prediction and attention."""
    folder = folder_of("cait")
    photo().save("p.png")
    run_itself, exported = (
        views.predict_with_attention(subject, visualize.examples(subject, ["p.png"])[0])
        for subject in map(visualize.load, ("output/r", str(folder))))
    assert (run_itself.pixels == exported.pixels).all() and (run_itself.probabilities == exported.probabilities).all()
    assert run_itself.caption == exported.caption and len(run_itself.maps) == len(exported.maps) == 4
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(run_itself.maps, exported.maps))


def test_predictions_of_the_folder_are_those_of_the_run():
    """For a run that evaluated with mirror images, as most runs do whose data may be mirrored."""
    folder, image = folder_of("vit", tta="flip"), photo()
    save_run(Path("output/s"), "vit", tta="flip")                # a run that does not store how it read its images
    assert run("output/s", "--to", "folder", "--output", "unread") == run("unread", "--to", "folder", "--output", "again") == 0
    assert contents(Path("unread")) == contents(Path("again"))
    expected, *found = (models.load_model(path).predict(image, top_k=10) for path in ("output/r", folder, "unread"))
    assert found == [expected] * 2
    own = json.loads((folder / "config.json").read_text())
    del own["vit_run"]["tta"]
    (folder / "config.json").write_text(json.dumps(own))
    assert models.load_model(folder).predict(image, top_k=10) != expected


def test_the_model_card_has_what_the_config_cannot_hold(capsys):
    save_run(Path("output/r"), "vit", interpolation="bicubic", tta="flip", recipe="digits")
    events = [{"event": "eval", "split": "val", "step": 7, "accuracy": 0.5, "top5": 1.0, "loss": 1.25, "images": 200},
              {"event": "eval", "split": "val", "step": 3, "accuracy": 0.9, "loss": 9.0, "images": 200}]
    Path("output/r/log.jsonl").write_text("".join(f"{json.dumps(event)}\n" for event in events))
    assert run("output/r", "--to", "folder", "--output", "a") == 0
    assert "note: the run was evaluated with the mean over each image and its mirror image" in capsys.readouterr().out
    card = Path("a/README.md").read_text()
    for words in ("# r\n", "A ViT (width 12, 2 blocks, patch 4) for 10 classes, on images of 16 x 24 pixels",
                  "| data set | digits |",
                  "| val accuracy | 0.5 |", "| val top5 | 1 |", "| step of these weights | 7 |", "(--tta flip)", "TimmWrapper",
                  "Size 16 x 24, bicubic: the whole image", "none: trained from scratch"):
        assert words in card, words
    assert "0.9" not in card and "9.0" not in card


def test_a_checkpoint_without_training_state_is_exported():
    """People remove the optimizer's state and the counters before they share a checkpoint."""
    save_run(Path("output/r"), "vit", class_weights=",".join(["1.5"] * 10))
    content = torch.load("output/r/best.pt", weights_only=True)
    torch.save({key: content[key] for key in ("format", "model", "architecture", "classes", "config")}, "passed-on.pt")
    assert run("passed-on.pt", "--to", "folder", "--output", "a") == run("a", "--to", "folder", "--output", "b") == 0
    assert contents(Path("a")) == contents(Path("b")) and "| classes | 10 |" in Path("a/README.md").read_text()


# ---------------------------------------------------------------------------------------------------- other formats


def averaged_model() -> "models.ImageTransformer":
    """Return the model of output/r with its averaged weights."""
    model, averaged = models.load_model("output/r/best.pt"), torch.load("output/r/best.pt", weights_only=True)["ema"]
    model.load_state_dict(averaged)
    return model


def test_class_names_are_added_to_a_model_without_names():
    models.save_timm(models.create_model("ViT-Nano_2", 3), "nameless.pth")
    Path("names.txt").write_text("ant\nbee\n\u00e7\n", encoding="utf-8")
    assert run("nameless.pth", "--to", "folder", "--output", "a", "--class_names", "names.txt") == 0
    assert open_model("a").classes == ("ant", "bee", "\u00e7") and not open_model("a").has_data
    assert run("a", "--to", "folder", "--output", "b") == 0 and contents(Path("a")) == contents(Path("b"))


@pytest.mark.slow
def test_a_program_of_torch_runs_without_this_project(capsys):
    """In another folder, in a Python that cannot import the project, with any batch size. It contains the class names."""
    save_run(Path("output/r"), "cait", {"sigmoid_attention": "last"}, ema_decay=0.9)
    assert run("output/r", "--to", "torch", "--output", "model.pt2") == 0
    assert "verified with torch.export.load, batches of 1 and 5: logits differ by" in capsys.readouterr().out
    model = averaged_model()
    images = images_of(model, 3)
    torch.save(images, "images.pth")
    code = """
import json, sys, torch
extra = {"classes.json": "", "preprocessing.json": ""}
program = torch.export.load("model.pt2", extra_files=extra).module()
torch.save(program(torch.load("images.pth")), "logits.pth")
assert json.loads(extra["classes.json"])[9] == "9" and json.loads(extra["preprocessing.json"])["size"] == [16, 24]
assert not {"models", "utils", "configs"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-I", "-c", code], check=True, capture_output=True, timeout=120)
    assert (torch.load("logits.pth") - model(images)).abs().max() < 1e-5
    assert str(Path(export.__file__).parent).encode() not in Path("model.pt2").read_bytes()


def test_google_s_layout_warns_of_what_it_cannot_hold(capsys):
    """It only holds square models."""
    save_run(Path("output/gap"), "gap")
    save_run(Path("output/erf"), "gap", {"gelu": "erf"})
    assert run("output/gap", "--to", "npz", "--output", "a.npz") == run("output/erf", "--to", "npz", "--output", "b.npz") == 0
    out = capsys.readouterr().out
    assert "warning: nor what this model computes differently from Google's programs: gelu erf\n" in out
    assert out.count("warning") == 1 and out.count("holds neither the names of the classes") == 2
    assert same_state(open_model("a.npz").model, family_model("gap"))


@pytest.mark.reference
@pytest.mark.parametrize("family", [*FAMILIES, "sigmoid", "DINOv3", "PE", "AIMv2"])
def test_onnx_of_every_family(family, capsys):
    """With any batch size, class names and preprocessing as metadata, no path of this machine in the file, and another opset."""
    onnxruntime, own = pytest.importorskip("onnxruntime"), {"sigmoid_attention": "last"} if family == "sigmoid" else {}
    own["num_layers"] = 1                                   # the exporter takes seconds a layer
    pytest.importorskip("onnxscript")
    save_run(Path("output/r"), "distilled" if family == "sigmoid" else family, own, READ, ema_decay=0.9)
    assert run("output/r", "--to", "onnx", "--output", "a.onnx", *(["--opset", 18] if family == "vit" else [])) == 0
    out = capsys.readouterr().out
    assert f"verified with onnxruntime {onnxruntime.__version__}, batches of 1 and 5: logits differ by" in out
    assert "opset 18;" in out or family != "vit"
    session, model = onnxruntime.InferenceSession("a.onnx"), averaged_model()
    for count in (1, 4):
        images = images_of(model, count)
        found, = session.run(None, {"images": images.numpy()})
        assert np.abs(found - model(images).detach().numpy()).max() < 1e-5
    notes = session.get_modelmeta().custom_metadata_map
    seen = json.loads(notes["preprocessing"])
    assert json.loads(notes["classes"]) == CLASSES and seen["size"] == list(model.img_size) and seen["exif"] == "off"
    assert seen["tta"] == "none"
    assert (seen["mean"], seen["channels"]) == (list(model.config.mean), model.config.in_channels)
    assert str(Path(export.__file__).parent).encode() not in Path("a.onnx").read_bytes()
    if family in ("vit", "PE"):                  # the same model gives the same bytes
        assert run("output/r", "--to", "onnx", "--output", "b.onnx", *(["--opset", 18] if family == "vit" else [])) == 0
        assert Path("a.onnx").read_bytes() == Path("b.onnx").read_bytes()


def test_missing_onnx_is_reported_with_the_command_that_installs_it(monkeypatch, capsys):
    save_run(Path("output/r"))
    monkeypatch.setitem(sys.modules, "onnx", None)
    assert run("output/r", "--to", "onnx", "--output", "a.onnx") == 2
    assert capsys.readouterr().err == ("export.py: error: --to onnx needs the package onnx. Install it: "
                                       f"{launch.command_to_install('requirements-export.txt')}\n")
    assert os.listdir() == ["output"]


# ------------------------------------------------------------------------------------------- timm and transformers


@pytest.mark.reference
@pytest.mark.parametrize("family", [*FAMILIES, "cropped", *MECHANISMS])
@torch.inference_mode()
def test_timm_and_transformers_open_the_folder(family):
    """They compute the same logits, have the same classes, and turn a photo into the same pixels."""
    timm, transformers = pytest.importorskip("timm"), pytest.importorskip("transformers")
    settings = {"interpolation": "bicubic", "eval_crop": 0.8} if family in ("cropped", "hybrid", "SigLIP") else {"eval_crop": 0}
    folder = folder_of("gap" if family == "cropped" else family, **settings)
    ours = open_model("output/r")
    # timm's table of angles has rounding errors of float32, which the norm behind the attention of EVA-02 makes larger.
    limit = {"hybrid": 1e-3, "EVA-02": 1e-4}.get(family, 1e-5)
    theirs = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    images = images_of(ours.model, 3)
    assert (theirs(images) - ours.model(images)).abs().max() < limit
    picture = photo(mode="L" if family == "grey" else "RGB")
    transform = timm.data.create_transform(**timm.data.resolve_data_config(model=theirs))
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (ours.model.config.mean, ours.model.config.std))
    expected = (ours.transform(picture.convert("RGB")).float() / 255 - mean) / std
    assert (transform(picture) - expected).abs().max() < 1e-6
    assert list(theirs.pretrained_cfg["label_names"]) == CLASSES
    model = transformers.AutoModelForImageClassification.from_pretrained(str(folder)).eval()
    assert (model(images).logits - ours.model(images)).abs().max() < limit
    assert list(model.config.id2label.values()) == CLASSES
    if family == "grey":
        return                                  # its processor makes three channels of every image: the model card says so
    pixels = transformers.AutoImageProcessor.from_pretrained(str(folder))(picture, return_tensors="pt")["pixel_values"][0]
    assert (pixels - expected).abs().max() < 1e-6
    best = transformers.pipeline("image-classification", model=str(folder), device="cpu")(picture, top_k=3)
    probabilities = ours.model(expected[None]).softmax(-1)[0]
    assert [entry["label"] for entry in best] == [CLASSES[number] for number in probabilities.topk(3).indices]
    assert best[0]["score"] == pytest.approx(probabilities.max().item(), abs=limit)


# --------------------------------------------------------------------------------------------------------- bad input


def test_bad_input_is_reported_in_one_line_and_leaves_no_files(capsys):
    """Errors in the model, the output and the flags."""
    save_run(Path("output/r"))
    save_run(Path("output/sigmoid"), own={"sigmoid_attention": "last"})
    save_run(Path("output/crop"), eval_crop=0.5)
    Path("output/empty").mkdir()
    model = models.create_model("ViT-Nano_2", 3)
    models.save_timm(model, "nameless.pth")
    torch.save({name: value for name, value in model.state_dict().items() if "head" not in name}, "headless.pth")
    Path("two.txt").write_text("a\nb\n")
    Path("file").touch()
    before = sorted(os.listdir())
    for words, message in (
            ("", "MODEL, --to and --output are missing"),
            ("output/r --to zip --output a", "--to must be folder, onnx, torch or npz, got 'zip'"),
            ("output/r --to folder --output a --opset 18", "--opset only has an effect with --to onnx"),
            ("output/r --to onnx --output a --opset 0", "--opset must be 1 or more"),
            ("output/none --to folder --output a", "MODEL output/none: no such file or folder"),
            ("output/empty --to folder --output a", "MODEL: .*output/empty"),
            ("output/r --to folder --output output", "--output output exists, and is not overwritten"),
            ("output/r --to folder --output file/a", "--output file: file is a file, not a folder"),
            ("output/crop --to folder --output no/where/a", "--to folder: eval_crop 0.5"),
            ("output/r --to folder --output a --num_heads 2", "only have an effect with a MODEL that is not one of your"),
            ("output/r --to folder --output a --class_names two.txt", "has names of its classes"),
            ("output/sigmoid --to folder --output a", "--to folder: sigmoid_attention 'last': timm has no attention"),
            ("output/sigmoid --to npz --output a", "--to npz: sigmoid_attention 'last': Google's layout"),
            ("output/crop --to folder --output a", "--to folder: eval_crop 0.5 at 16 x 24 pixels: timm resizes"),
            ("output/r --to npz --output a", "--to npz: .*position table has 4 x 6 patches"),
            ("nameless.pth --to torch --output a", "nameless.pth does not name its 3 classes. Add --class_names FILE"),
            ("nameless.pth --to torch --output a --class_names two.txt", "two.txt: expected 3 different names, .* got 2 lines"),
            ("nameless.pth --to torch --output a --class_names no.txt", "no.txt: no such file"),
            ("nameless.pth --to torch --output a --model_type ViT-X", "unknown|ViT-X"),
            ("headless.pth --to folder --output a", "headless.pth has no head, and so no classes")):
        assert run(*words.split()) == 2, words
        error = capsys.readouterr().err
        assert error.startswith("export.py: error: ") and error.count("\n") == 1, error
        assert re.search(message, error), error
        assert sorted(os.listdir()) == before, words


@pytest.mark.parametrize("to", ["folder", "npz", pytest.param("torch", marks=pytest.mark.slow),
                                pytest.param("onnx", marks=pytest.mark.reference)])
def test_a_write_that_fails_leaves_no_file(to, capsys):
    """In the middle of the file: it grows above a limit, as on a full disk."""
    if to == "onnx":
        pytest.importorskip("onnxscript")
    save_run(Path("output/r"), "gap")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        assert run("output/r", "--to", to, "--output", "a") == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    error = capsys.readouterr().err
    assert "--output: cannot write a (File too large)" in error and error.count("\n") == 1
    assert os.listdir() == ["output"]


@pytest.mark.parametrize("to", ["folder", "npz"])
def test_a_full_disk_leaves_no_file(to, monkeypatch, capsys):
    save_run(Path("output/r"), "gap")

    def full(*arguments, **more):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    monkeypatch.setattr(os, "rename", full)
    assert run("output/r", "--to", to, "--output", "a") == 2
    error = capsys.readouterr().err
    assert "--output: cannot write a (No space left on device)" in error and error.count("\n") == 1
    assert os.listdir() == ["output"]


def test_an_unwritable_folder_is_reported_before_the_model_is_read(monkeypatch, capsys):
    def forbidden(*arguments, **more):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("tempfile.mkdtemp", forbidden)
    assert run("ViT-B_16", "--to", "folder", "--output", "a") == 2
    assert "export.py: error: --output .: . cannot be written (Permission denied)" in capsys.readouterr().err


def test_a_stop_during_the_write_leaves_no_file(monkeypatch, capsys):
    save_run(Path("output/r"), "gap")
    monkeypatch.setattr("utils.build.export.save_folder", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    assert run("output/r", "--to", "folder", "--output", "a") == process.EXIT_PREEMPTED
    assert capsys.readouterr().err == "export.py: error: stopped: nothing was written\n" and os.listdir() == ["output"]
