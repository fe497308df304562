"""predict.py: every kind of input, the same rows on any number of processes, agreement with evaluation, and bad input."""

import csv
import io
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from building import write_checkpoint
from miniatures import png
from PIL import Image
from prepared_sets import make as prepare
from prepared_sets import smooth_pictures
from rig import files_no_larger_than
from runs import FOLDER

import predict
import train
from models import create_model, save_timm
from utils.data import datasets
from utils.files import read_csv_table
from utils.report import summary

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def run(tmp_path, monkeypatch, capfd):
    """Return run("output/r", "p", ...) -> (exit code, rows by column, standard error), in an empty folder, on the CPU."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("NPROC", raising=False)

    def call(*argv) -> tuple[int, list[dict], str]:
        capfd.readouterr()
        code = predict.main(["--device", "cpu", *map(str, argv)])
        printed = capfd.readouterr()
        header, *rows = read_csv_table(printed.out) or [[]]
        return code, [dict(zip(header, row)) for row in rows], printed.err

    return call


def photographs(folder: Path, count: int = 7) -> Path:
    folder.mkdir(parents=True)
    draw = np.random.default_rng(0)
    for number in range(count):
        pixels = draw.integers(0, 256, (4, 5, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((40, 30 + number), Image.BICUBIC).save(folder / f"{number}.jpg")
    return folder


# ------------------------------------------------------------------------------------------- compared with evaluation


def csv_set(root: Path) -> list[str]:
    smooth_pictures(root)
    for part in ("train", "val", "test"):
        rows = [f"{path.relative_to(root)},{path.parent.name}" for path in sorted((root / part).rglob("*.*g"))]
        (root / f"{part}.csv").write_text("\n".join(["path,label", *rows]) + "\n")
    return ["--dataset", "csv", "--data_dir", "tree", *FOLDER[4:]]


def folder_set(root: Path) -> list[str]:
    smooth_pictures(root)
    return FOLDER


def prepared_set(root: Path) -> list[str]:
    smooth_pictures(Path("files"))
    prepare(Path("files"), root)
    return FOLDER


@pytest.mark.parametrize("data", [folder_set, csv_set, prepared_set, None], ids=["folder", "csv", "prepared", "digits"])
def test_predictions_are_those_that_evaluation_counts(data, run, monkeypatch):
    """To the last image, on 1, 2 and 4 processes, in batches that do not divide the split. The mean loss is the same too."""
    monkeypatch.setitem(datasets.DATASETS, "digits", lambda place, digits=datasets.digits: few(digits(place)))
    flags = data(Path("tree")) if data else []
    precision = "fp32" if data else "bf16"
    made = write_checkpoint(Path("r/best.pt"), *flags, "--eval_batch_size", 4, "--precision", precision)
    kept = []
    monkeypatch.setattr(summary, "print_evaluation", lambda name, metrics, *_: kept.append((name, metrics)))
    monkeypatch.setattr(summary, "print_confusion", lambda *_: None)
    assert train.main(["--device", "cpu", "--eval_only", "--resume_path", "r", "--confusion_matrix"]) == 0
    (name, metrics), classes = kept[-1], list(made.found.splits.classes)
    before = None
    for processes in (1, 2, 4):
        code, rows, printed = run("r", "--split", name, "--nproc", processes)
        assert code == 0 and len(rows) == metrics.images and f"; {precision} (the run's own), " in printed, printed
        confusion = np.zeros((len(classes), len(classes)), int)
        np.add.at(confusion, ([classes.index(row["true"]) for row in rows], [classes.index(row["predicted"]) for row in rows]), 1)
        assert confusion.tolist() == metrics.confusion.tolist()
        assert np.mean([float(row["loss"]) for row in rows]) == pytest.approx(metrics.loss, abs=1e-5)
        split = made.found.splits.held_out[name]
        assert [row["path"] for row in rows] == [split.name(index) for index in range(len(split))]
        labels = [(row["path"], row["predicted"]) for row in rows]
        assert before in (None, labels)
        before = labels
    code, rows, _ = run("r", "--split", name, "--sort", "loss", "--top_k", 2)
    losses = [float(row["loss"]) for row in rows]
    assert losses == sorted(losses, reverse=True) and sorted(labels) == sorted((row["path"], row["predicted"]) for row in rows)
    assert list(rows[0]) == ["path", "true", "predicted", "probability", "top2", "probability2", "loss", "error"]


def few(splits):
    from utils.data.splits import Subset

    return splits.replace(val=Subset(splits.val, range(30)), test=Subset(splits.test, range(30)))


def test_a_run_s_own_precision_and_mirror_images_count_with_its_own_data(run):
    Path("p.png").write_bytes(png())
    write_checkpoint(Path("r/best.pt"), "--precision", "bf16", "--tta", "flip", "--eval_batch_size", 128)
    _, own, printed = run("r", "--split", "val")
    assert "; bf16 (the run's own), with mirror images, 1 process" in printed
    _, exact, printed = run("r", "--split", "val", "--precision", "fp32", "--tta", "none", "--batch_size", 7)
    assert "; fp32, 1 process" in printed and len(own) == len(exact) == 200
    assert "; auto: " in (chosen := run("r", "p.png", "--precision", "auto")[2]) and "auto: auto" not in chosen
    assert [row["probability"] for row in own] != [row["probability"] for row in exact]


# --------------------------------------------------------------------------------------------------- sources, formats


def test_every_source_gives_the_same_rows(run, monkeypatch):
    """A folder, files, a list, a csv and standard input; a run or its checkpoint; every output format."""
    write_checkpoint(Path("r/best.pt"))
    photographs(Path("p"))
    Path("p/4.jpg").write_bytes(b"no image")
    for other in ("p/notes.txt", "p/a.avif", "p/.hidden"):
        Path(other).touch()
    code, rows, printed = run("r", "p")
    assert code == 0 and list(rows[0]) == ["path", "label", "probability", "top2", "probability2", "error"]
    assert [row["path"] for row in rows] == [f"p/{number}.jpg" for number in range(7)]
    assert list(rows[4].values())[1:5] == [""] * 4 and rows[4]["error"].startswith("cannot be read as an image (none of")
    assert all(row["error"] == "" and 0 < float(row["probability2"]) <= float(row["probability"]) and len(row["probability"]) == 8
               for row in rows if row is not rows[4])
    warning, last = printed.splitlines()[-2:]
    assert last.startswith("7 images, ") and (" images/s; skipped, not images by their extension: 1 .txt; 1 cannot be read "
                                              "(column error), such as p/4.jpg: cannot be") in last
    assert warning.startswith("warning: skipped because of their extension: 1 .avif (supported: .jpg, ")
    assert printed.startswith("model: ViT (width 16, 1 block, patch 2) on digits, run r, step 0; fp32, 1 process\n")
    names = [f"p/{number}.jpg" for number in range(7)]
    Path("all.txt").write_text("\n".join(names))
    Path("all.csv").write_text("\n".join(["image,label", *(f"{name},x" for name in names)]))
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("\n".join(names).encode())))
    for inputs in (names, ["all.txt"], ["all.csv"], ["-"], ["p/0.jpg", "p/1.jpg", "all.txt"]):
        more = rows[:2] if inputs[-1] == "all.txt" and len(inputs) > 1 else []
        assert run("r/best.pt", *inputs)[1] == more + rows, inputs
    monkeypatch.setenv("NPROC", "2")
    assert run("r", "p", "--batch_size", 2)[1] == rows
    assert run("r", "p", "--output", "x/y.csv")[1] == [] and os.listdir("x") == ["y.csv"]
    assert [dict(row) for row in csv.DictReader(io.StringIO(Path("x/y.csv").read_text()))] == rows
    assert run("r", "p", "--format", "json", "--output", "y.json", "--batch_size", 3)[0] == 0
    assert run("r", "p", "--format", "jsonl", "--output", "y.jsonl")[0] == 0
    objects = json.loads(Path("y.json").read_text())
    assert objects == [json.loads(line) for line in Path("y.jsonl").read_text().splitlines()]
    assert [each["label"] or "" for each in objects] == [row["label"] for row in rows] and objects[0]["error"] is None


def test_numbers_are_those_of_the_model_in_python(run):
    from models import load_model

    write_checkpoint(Path("r/best.pt"), "--tta", "flip")
    photographs(Path("p"), 3)
    _, rows, _ = run("r", "p", "--top_k", 10)
    for row, found in zip(rows, load_model("r").predict([row["path"] for row in rows], top_k=10)):
        assert [row["label"], *(row[f"top{number}"] for number in range(2, 11))] == [label for label, _ in found.top]
        assert float(row["probability10"]) == pytest.approx(found.top[9][1], abs=2e-6)


def test_a_file_of_another_program_predicts(run):
    photographs(Path("p"), 2)
    model = create_model("ViT-Nano_2", 3)
    torch.nn.init.normal_(model.head.weight)
    save_timm(model, "x.pth")
    _, rows, printed = run("x.pth", "p", "--num_heads", 4, "--interpolation", "bicubic", "--eval_crop", 0.5)
    assert len(rows) == 2 and rows[0]["label"].startswith("class ")
    assert "the file does not name its classes, which are numbered" in printed


def test_a_published_name_is_opened_with_its_publishers_preprocessing(run):
    """A small file replaces the published one."""
    photographs(Path("p"), 2)
    model = create_model("ViT-Nano_2", 3, 16)
    torch.nn.init.normal_(model.head.weight)
    Path("checkpoint/deit").mkdir(parents=True)
    save_timm(model, "checkpoint/deit/deit_tiny_patch16_224-a1311bcf.pth")
    code, rows, printed = run("deit/deit_tiny_patch16_224", "p", "--num_heads", 4)
    assert code == 0 and printed.startswith("model: ViT-Nano_2, deit/deit_tiny_patch16_224; fp32, 1 process; the file does not ")
    shutil.copy("checkpoint/deit/deit_tiny_patch16_224-a1311bcf.pth", "x.pth")               # without a publisher
    assert rows == run("x.pth", "p", "--num_heads", 4, "--interpolation", "bicubic", "--eval_crop", 0.875)[1]
    assert rows != run("x.pth", "p", "--num_heads", 4)[1]


def test_every_kind_of_photograph_is_read(run):
    """Images with one channel, 16 bits, an alpha channel or an EXIF rotation give the row of the same picture in plain RGB. A
    truncated image gives the reason."""
    write_checkpoint(Path("r/best.pt"))
    Path("p").mkdir()
    levels = np.add.outer(np.arange(30) * 4, np.arange(40) * 3).astype(np.uint8)
    gray, turned = Image.fromarray(levels), Image.Exif()
    turned[0x0112] = 6
    gray.convert("RGB").save("p/0.png")
    gray.save("p/1.png")
    Image.fromarray(levels.astype(np.uint16) * 257).save("p/2.png")
    gray.convert("RGBA").save("p/3.png")
    gray.convert("RGB").transpose(Image.Transpose.ROTATE_90).save("p/4.png", exif=turned)
    gray.resize((80, 60)).save("whole.jpg")
    Path("p/5.jpg").write_bytes(Path("whole.jpg").read_bytes()[:-200])
    code, (first, *others, cut), printed = run("r", "p")
    assert code == 0 and [list(row.values())[1:] for row in others] == [list(first.values())[1:]] * 4 and first["label"]
    assert cut["label"] == "" and "truncated" in cut["error"] and "6 images, " in printed and "warning" not in printed
    Image.fromarray(levels.astype(np.uint16) * 16).save("p/6.png")
    assert run("r", "p")[2].startswith("warning: 1 of 2 decoded 16-bit images become nearly one color (p/6.png: ")


@pytest.mark.parametrize(("on_terminal", "shown"), [("stderr", True), ("", False)])
def test_a_progress_bar_is_only_shown_on_a_terminal(on_terminal, shown, run, monkeypatch):
    write_checkpoint(Path("r/best.pt"))
    photographs(Path("p"), 5)
    if on_terminal:
        monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    code, rows, printed = run("r", "p", "--batch_size", 2)
    assert code == 0 and len(rows) == 5 and ("5image [" in printed) == shown


# ---------------------------------------------------------------------------------------------------------- bad input


def test_bad_input_is_reported_in_one_line_and_leaves_no_files(run, monkeypatch):
    write_checkpoint(Path("r/best.pt"))
    photographs(Path("p"), 1)
    Path("empty").mkdir()
    Path("no_run").mkdir()
    Path("s/final").mkdir(parents=True)
    for file in ("there.csv", "s/sweep.json"):
        Path(file).touch()
    Path("gone.txt").write_text("a.jpg\nb.jpg\n")
    model = create_model("ViT-Nano_2", 3)
    save_timm(model, "x.pth")
    state = torch.load("x.pth", weights_only=True)
    torch.save({name: value for name, value in state.items() if not name.startswith("head")}, "headless.pth")
    for argv, words in (
            (["r"], "INPUT is missing: give images, a folder, a list or - (paths from standard input), or add --split val"),
            (["r", "p", "--split", "val"], "INPUT and --split exclude each other. Omit one"),
            (["r", "p", "--sort", "loss"], "--sort loss only has an effect with --split"),
            (["r", "p", "--path_column", "x"], "--path_column only has an effect with a list as INPUT"),
            (["r", "--split", "val", "--image_dir", "p"], "--image_dir only has an effect with a list as INPUT"),
            (["r", "-", "-"], "INPUT has - more than once"),
            (["r", "photos"], "photos: no such file or folder"),
            (["r", "empty"], "empty: no images (.jpg"),
            (["output/rr", "p"], "MODEL output/rr: no such file or folder"),
            (["no_run", "p"], "no_run holds no intact checkpoint"),
            (["no_run", "p", "r"], ": no_run holds no intact checkpoint; MODEL comes first, then the images: r no_run\n"),
            (["p/0.jpg", "r"], "error: MODEL: p/0.jpg: an image, not weights; MODEL comes first, then the images: r p/0.jpg\n"),
            (["p/0.jpg", "p"], "error: MODEL: p/0.jpg: an image, not weights\n"),
            (["s", "p"], "error: MODEL: s is a sweep: give its final run, s/final\n"),
            (["r", "p", "--output", "there.csv"], "--output there.csv exists, and is not overwritten"),
            (["r", "p", "--output", "empty"], "--output empty is a folder"),
            (["r", "p", "--top_k", "11"], "--top_k must be at most 10, the model's number of classes, got 11"),
            (["r", "p", "--topk", "2"], "unrecognized arguments: --topk"),
            (["r", "p", "--img_size", "16"], "only have an effect with a MODEL that is not one of your"),
            (["x.pth", "--num_heads", "4", "--split", "val"], "--split val needs a run as MODEL, which names its data set"),
            (["headless.pth", "p", "--num_heads", "4"], "MODEL headless.pth has no head, and so no classes. Fine-tune it first"),
            (["r", "gone.txt"], "2 images, ")):
        code, rows, printed = run(*argv)
        assert code == 2 and words in printed, (argv, printed)
        assert words == "2 images, " or (printed.count("\n") == 1 and printed.startswith("predict.py: error: ") and not rows)
    assert "2 cannot be read (column error), such as a.jpg: " in printed
    assert "\nnote: gone.txt is read as a list of 2 paths, one a line, and no such files exist\n" in printed
    monkeypatch.setenv("NPROC", "two")
    assert run("r", "p")[2] == "predict.py: error: NPROC must be a whole number, 1 or more, got 'two'\n"
    assert sorted(os.listdir()) == ["empty", "gone.txt", "headless.pth", "no_run", "p", "r", "s", "there.csv", "x.pth"]
    monkeypatch.delenv("NPROC")
    assert predict.parse(["r", "p", "--output", "-"]).output is None, "standard output"
    with files_no_larger_than(8000):                  # a batch in shared memory fits
        code, _, printed = run("r", *["p/0.jpg"] * 300, "--output", "new.csv", "--batch_size", 8)
    assert code == 2 and ": new.csv: File too large; the rows so far are in new.csv.partial, and each is complete\n" in printed
    header, *rows = read_csv_table(Path("new.csv.partial").read_text())
    assert len(header) == len(rows[0]) and rows == rows[:1] * len(rows) and not Path("new.csv").exists()


def test_an_error_late_in_a_job_keeps_the_rows_before_it(run):
    write_checkpoint(Path("r/best.pt"))
    photographs(Path("p"), 1)
    Path("all.txt").write_bytes(b"p/0.jpg\n" * 300 + b"p/\0.jpg\n")
    for more in ((), ("--nproc", 2)):
        code, _, printed = run("r", "all.txt", "--output", "new/x.csv", *more)
        assert code == 2 and ("predict.py: error: all.txt:301: NUL bytes: a list has one path a line; the rows so far are in "
                              "new/x.csv.partial, and each is complete\n" in printed), printed
        assert len(read_csv_table(Path("new/x.csv.partial").read_text())) == 301 and os.listdir("new") == ["x.csv.partial"]
    assert run("r", "p", "--output", "/dev/null")[0] == 0


def test_missing_data_of_a_run_are_reported(run):
    smooth_pictures(Path("tree"))
    write_checkpoint(Path("r/best.pt"), *FOLDER)
    Path("tree").rename("moved")
    code, _, printed = run("r", "--split", "val")
    assert code == 2 and "no such folder: tree" in printed
    Path("moved").rename("tree")
    Path("r/best.pt").rename("r/step-00000000.pt")
    code, _, printed = run("r", "--split", "test")
    assert code == 0 and "run r, step 0 (its newest checkpoint: it has no best.pt); " in printed


# ------------------------------------------------------------------------------------- as a process: pipes and signals


@pytest.mark.slow
def test_a_closed_pipe_and_ctrl_c_leave_whole_rows(tmp_path):
    write_checkpoint(tmp_path / "r/best.pt")
    (tmp_path / "a.png").write_bytes(png())
    command = [sys.executable, str(ROOT / "predict.py"), "r", "-", "--batch_size", "8", "--device", "cpu", "--nproc", "2"]
    paths, errors = b"a.png\n" * 4000, subprocess.PIPE
    with subprocess.Popen(command, cwd=tmp_path, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors) as stopped:
        stopped.stdin.write(paths)
        stopped.stdin.flush()
        rows = [stopped.stdout.readline() for _ in range(30)]
        stopped.send_signal(signal.SIGINT)
        left, printed = stopped.stdout.read(), stopped.stderr.read()
    assert stopped.returncode == 143 and b"SIGINT: stopped: the rows so far are written, and each is complete" in printed
    assert rows[0].startswith(b"path,label,") and set(rows[1:]) == {rows[1]} and rows[1].endswith(b",\n")
    assert left == rows[1] * (len(left) // len(rows[1]))
    with subprocess.Popen(["head", "-n", "5"], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as head:
        done = subprocess.run(command, cwd=tmp_path, input=paths, stdout=head.stdin, stderr=errors, timeout=300)
        head.stdin.close()
        assert head.stdout.read().count(b"\n") == 5
    assert done.returncode == 0 and b"Traceback" not in done.stderr and b" images/s" in done.stderr
