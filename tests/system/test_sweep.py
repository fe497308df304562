"""The sweep: what it passes on, what it refuses, how it chooses, and that an interrupted one goes on."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import sweep
from utils.config import ConfigError

ROOT = Path(__file__).resolve().parents[2]


def told(capsys, *argv: str) -> str:
    """The one line that a refused command gets."""
    assert sweep.main(list(argv)) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and said.startswith("sweep.py: error: ")
    return said


def test_learning_rates_are_sorted_and_the_rest_is_handed_on():
    assert sweep.parse(["--learning_rates", "0.03,0.001,0.03", "--num_steps", "5"]) == (
        "learning_rate", [0.001, 0.03], ["--num_steps", "5"])
    assert sweep.parse([]) == ("learning_rate", [0.001, 0.003, 0.01, 0.03], [])
    assert sweep.parse(["--attention_loss_weights", "150,0"]) == ("attention_loss_weight", [0, 150], [])


def test_what_train_sh_makes_of_its_variables_counts(monkeypatch):
    monkeypatch.setenv("DATASET", "cifar10")
    monkeypatch.setenv("NAME", "c10")
    assert sweep.flags_of_script(["--num_steps", "5"]) == {"dataset": "cifar10", "name": "c10", "num_steps": 5}


@pytest.mark.parametrize(("name", "value"), [("LEARNING_RATE", "0.1"), ("RESUME_PATH", "output/r"), ("NAME", "../up")])
def test_variables_that_cannot_be(monkeypatch, capsys, name, value):
    monkeypatch.setenv(name, value)
    assert f"--{name.lower()}" in told(capsys)


@pytest.mark.slow
def test_a_signal_ends_the_sweep_and_its_run(tmp_path):
    """Nothing is left running, and the sweep can be gone on with."""
    import signal
    import time

    from runs import processes_naming

    environment = os.environ | {"PYTHON": sys.executable, "LEARNING_RATES": "0.001", "NAME": "s"}
    script = subprocess.Popen(["bash", "sweep.sh", "--num_steps", "100000", "--output_dir", str(tmp_path / "o"), "--log_dir",
                               str(tmp_path / "l"), "--eval_every", "5", "--train_batch_size", "16"], cwd=ROOT, env=environment,
                              stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    try:
        while not list((tmp_path / "o").glob("s/lr-0.001/step-*.pt")) and time.monotonic() < deadline:
            time.sleep(0.2)
        script.send_signal(signal.SIGTERM)
        assert "it goes on" in script.communicate(timeout=60)[1] and script.returncode == 128 + signal.SIGTERM
    finally:
        script.kill()
    assert processes_naming(str(tmp_path / "o")) == []


def test_a_flag_is_left_out_with_its_value():
    assert sweep.without(["--a", "1", "--split_seed", "3", "--b", "--split_seed=4"], "--split_seed") == ["--a", "1", "--b"]


def test_there_is_no_dry_run(monkeypatch, capsys):
    monkeypatch.setenv("DRY_RUN", "1")
    assert "no dry run" in told(capsys)


def test_a_trial_that_goes_on_keeps_its_settings(monkeypatch, tmp_path):
    """The variables that the sweep was started with are those of its first runs: the last one differs from them."""
    seen = {}

    class Finished:
        def __init__(self, words, env):
            seen.update(env)

        def wait(self):
            return 0

    monkeypatch.setattr(sweep.subprocess, "Popen", Finished)
    for name, value in (("VAL_FRACTION", "0.1"), ("NAME", "s"), ("GPUS", "0,1")):
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(ROOT)
    assert sweep.start(tmp_path) == 0
    assert seen["RESUME_PATH"] == str(tmp_path) and seen["GPUS"] == "0,1" and not {"VAL_FRACTION", "NAME"} & set(seen)


@pytest.mark.parametrize(("argv", "words"), [
    (["--learning_rates", "0.1,high"], "--learning_rates"), (["--learning_rates", "0"], "--learning_rates"),
    (["--attention_loss_weights", "-1"], "--attention_loss_weights -1"),
    (["--attention_loss_weights", "1", "--learning_rates", "1"], "one of them"),
    (["--attention_loss_weights", "1", "--attention_loss_weight", "2"], "--attention_loss_weight is what a sweep sets itself"),
    (["--attention_loss_weights", "1"], "only has an effect with --attention_edits"),
    (["--learning_rate", "0.1"], "--learning_rate is what a sweep sets itself"), (["--test", "once"], "--test is"),
    (["--resume_path", "x"], "--resume_path is"), (["--nonsense"], "--nonsense"),
    (["--dataset", "folder", "--data_dir", "no/such"], "no/such")])
def test_bad_input_is_one_line(capsys, tmp_path, argv, words):
    assert words in told(capsys, "--output_dir", str(tmp_path), *argv)
    assert list(tmp_path.iterdir()) == []


def test_another_sweep_in_the_same_folder_is_refused(capsys, tmp_path):
    settings = {"learning_rates": [0.1], "img_size": (8, 10), "seed": 1}
    sweep.claim(tmp_path / "s", settings)
    sweep.claim(tmp_path / "s", settings)
    sweep.claim(tmp_path / "s", settings | {"seed": 2})               # nothing has run yet: a mended mistake
    (tmp_path / "s" / "lr-0.1").mkdir()
    (tmp_path / "s" / "lr-0.1" / "log.jsonl").touch()
    sweep.claim(tmp_path / "s", settings | {"seed": 2})
    file = tmp_path / "s" / "sweep.json"
    older = json.loads(file.read_text()) | {"fp16": False, "float32_matmul": "highest"}              # flags that are gone
    file.write_text(json.dumps(older))
    sweep.claim(tmp_path / "s", settings | {"seed": 2})
    with pytest.raises(ConfigError, match="with seed 2, not 1: give another NAME"):
        sweep.claim(tmp_path / "s", settings)


def row(rate: float, accuracy: float, loss: float, status: str = "done") -> dict:
    return {"run": f"lr-{rate:g}", "learning_rate": rate, "accuracy": accuracy, "loss": loss, "status": status}


def test_the_best_is_chosen(tmp_path):
    rows = [row(0.001, 0.5, 1.0), row(0.01, 0.7, 0.9), row(0.1, 0.7, 0.8),
            {"run": "lr-1", "learning_rate": 1.0, "status": "diverged at step 3"}]
    assert sweep.choose(rows, tmp_path) is rows[2]
    with pytest.raises(ConfigError, match="all runs"):
        sweep.choose(rows[3:], tmp_path)


@pytest.mark.slow
def test_a_sweep_interrupted_and_gone_on_with_from_the_script(tmp_path, monkeypatch, capsys):
    """Images of a folder: a share is held out, a rate that diverges is noted, and test is looked at once, at the end.

    Its runs are forked from this process; the one that is gone on with is started by the scripts.
    """
    from miniatures import tree
    from runs import forked

    data = tree(tmp_path / "data", {"train/ant": 12, "train/bee": 12, "val/ant": 5, "val/bee": 5})
    variables = {name: value for name, value in os.environ.items() if name not in ("NAME", "CUDA_VISIBLE_DEVICES")}
    variables |= {"PYTHON": sys.executable, "LEARNING_RATES": "0.003,1e25", "NAME": "s", "DATASET": "folder",
                  "DATA_DIR": data, "MODEL_TYPE": "ViT-Nano_2", "PRETRAINED_DIR": "none", "OMP_NUM_THREADS": "1"}
    flags = ["--recipe", "digits", "--output_dir", str(tmp_path / "out"), "--log_dir", str(tmp_path / "logs"), "--num_steps",
             "6", "--train_batch_size", "8", "--val_fraction", "0.25", "--optimizer", "sgd", "--num_workers", "0", "--split_seed",
             "3", "--eval_train"]
    folder = tmp_path / "out" / "s"
    with monkeypatch.context() as patch:
        for name in ("PYTHON", "NAME", "DATASET", "DATA_DIR", "MODEL_TYPE", "PRETRAINED_DIR"):
            patch.setenv(name, variables[name])
        patch.setattr(sweep, "start", lambda resume, *given: forked(
            1, *given, "--dataset", "folder", "--data_dir", data, "--model_type", "ViT-Nano_2", "--pretrained_dir", "none")[0])
        patch.chdir(ROOT)
        assert sweep.main(["--learning_rates", variables["LEARNING_RATES"], *flags]) == 0
    assert "is the best" in capsys.readouterr().out
    rows = list(csv.DictReader((folder / "sweep.csv").read_text().splitlines()))
    assert [each["run"] for each in rows] == ["lr-0.003", "lr-1e+25", "final"]
    assert [each["split"] for each in rows] == ["val", "", "test"] and rows[1]["status"].startswith("diverged")
    assert [each["images"] for each in rows] == ["6", "", "10"]
    assert (folder / "sweep.png").stat().st_size > 5000
    config = json.loads((folder / "final" / "config.json").read_text())["config"]
    assert config["learning_rate"] == 0.003 and config["val_fraction"] == 0 and config["test"] == "once"
    events = [json.loads(line) for line in (folder / "final" / "log.jsonl").read_text().splitlines()]
    assert [event["split"] for event in events if event["event"] == "eval"] == ["test", "train"]
    for trial in folder.glob("lr-*"):
        assert '"split": "test"' not in (trial / "log.jsonl").read_text()

    # Killed in the last run, between its last checkpoint and its evaluation: only that one is gone on with.
    log = folder / "final" / "log.jsonl"
    log.write_text("".join(json.dumps(event) + "\n" for event in events if event["event"] not in ("eval", "end")))
    before = {path: path.stat().st_mtime_ns for path in folder.glob("lr-*/log.jsonl")}
    again = subprocess.run(["bash", "sweep.sh", *flags], cwd=ROOT, env=variables, capture_output=True, text=True, timeout=300)
    assert again.returncode == 0 and "going on with final" in again.stdout and "running" not in again.stdout, (
        again.stdout + again.stderr)
    assert before == {path: path.stat().st_mtime_ns for path in folder.glob("lr-*/log.jsonl")}
    assert list(csv.DictReader((folder / "sweep.csv").read_text().splitlines())) == rows


def test_a_sweep_over_attention_weights(run_train, monkeypatch, tmp_path, capsys):
    """Every trial starts from step 1, and is told its weight; the table and the picture name what was tried."""
    from runs import mark

    import train

    assert run_train("--name", "one") == 0
    mark(tmp_path / "edits", range(40))
    monkeypatch.setattr(sweep, "start", lambda resume, *flags: train.main(["--device", "cpu", *flags]))
    monkeypatch.setenv("PYTHON", sys.executable)
    assert sweep.main(["--attention_loss_weights", "10,0", "--name", "w", "--output_dir", str(tmp_path / "output"), "--log_dir",
                       str(tmp_path / "logs"), "--pretrained_dir", str(tmp_path / "output/one"), "--attention_edits",
                       str(tmp_path / "edits"), "--num_steps", "3", "--train_batch_size", "16"]) == 0
    rows = list(csv.DictReader((tmp_path / "output/w/sweep.csv").read_text().splitlines()))
    assert [row["run"] for row in rows] == ["weight-0.0", "weight-10.0", "final"]
    assert [row["split"] for row in rows] == ["val", "val", "test"] and rows[2]["attention_loss_weight"] in ("0.0", "10.0")
    config = json.loads((tmp_path / "output/w/weight-10.0/config.json").read_text())["config"]
    assert config["attention_loss_weight"] == 10 and config["head"] == "keep"
    said = capsys.readouterr().out
    assert "attention loss weight" in said and "is the best" in said and (tmp_path / "output/w/sweep.png").exists()
