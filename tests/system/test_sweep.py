"""The sweep: what it passes on, what it refuses, how it chooses, and that an interrupted one resumes."""

import csv
import json
import os
import re
import signal
import types
from pathlib import Path

import pytest
from miniatures import tree
from runs import TINY, make_tree, mark

import sweep
from utils.config import ConfigError


@pytest.fixture(autouse=True)
def called_from_here(monkeypatch):
    """A sweep sets it for its runs; other tests must not see it."""
    monkeypatch.setenv("VIT_CALLED_FROM", os.getcwd())


def error_line(capsys, *argv: str) -> str:
    """The one line that a refused command gets."""
    assert sweep.main(list(argv)) == 2
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1 and printed.startswith("sweep.py: error: ")
    return printed


def test_flags_and_the_variables_of_train_sh_are_read(monkeypatch):
    assert sweep.parse(["--learning_rates", "0.3,0.1,0.3", "--seed", "5"]) == ("learning_rate", [0.1, 0.3], ["--seed", "5"])
    for text in ("0.1 0.3", "0.3,0.1,", " 0.1;\t0.3 ", "0.1, 0.3", "1e-1,0.3"):
        assert sweep.parse([f"--learning-rates={text}"]) == ("learning_rate", [0.1, 0.3], [])
    assert sweep.without(["--split-seed", "3", "--eval_train", "--name=a"], "split_seed", "name") == ["--eval_train"]
    assert sweep.parse([]) == ("learning_rate", [], []), "by default the recipe decides"
    monkeypatch.setenv("DATASET", "cifar10")
    monkeypatch.setenv("NAME", "c10")
    assert sweep.flags_of_script(["--num_steps", "5"]) == {"dataset": "cifar10", "name": "c10", "num_steps": 5}


def test_a_rate_that_is_there_twice_is_told(capsys):
    assert sweep.parse(["--learning_rates", "0.01,1e-2,0.1"])[1] == [0.01, 0.1]
    assert capsys.readouterr().out == "sweep: --learning_rates has 0.01 several times; it is tried once\n"
    sweep.parse(["--learning_rates", "0.01,0.1"])
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(("name", "value", "words"), [
    ("LEARNING_RATE", "0.1", "--learning_rate"), ("RESUME_PATH", "output/r", "--resume_path"), ("NAME", "../up", "--name"),
    ("DRY_RUN", "1", "a sweep has no dry run")])
def test_variables_that_cannot_be(monkeypatch, capsys, name, value, words):
    monkeypatch.setenv(name, value)
    assert words in error_line(capsys)


@pytest.mark.parametrize(("argv", "words"), [
    (["--learning_rates", "0.1,high"], "--learning_rates"),
    (["--learning_rates=-1"], "--learning_rates -1: each must be more than 0, finite and below 1e30, not -1."),
    (["--attention_loss_weights", "-1"], "--attention_loss_weights -1"), (["--learning_rates", " , "], "holds no number"),
    (["--lr", "0.1"], "--learning_rate: a sweep sets it itself"), (["--dataset", "CIFAR10"], "Did you mean cifar10?"),
    (["--pretrained_dir", "vit_base_patch_16"], "Did you mean imagenet21k/ViT-B_16?"),
    (["--attention_loss_weights", "1", "--learning_rates", "1"], "one of them"),
    (["--attention_loss_weights", "1", "--attention_loss_weight", "2"], "--attention_loss_weight: a sweep sets it itself"),
    (["--attention_loss_weights", "1"], "only has an effect with --attention_edits"),
    (["--test", "once"], "--test: a sweep sets"),
    (["--dataset", "folder", "--data_dir", "no/such"], "no/such"),
    (["--dataset", "folder", "--data_dir", "{tree}", "--val_fraction", "0.2"], "no test set. Add --test_fraction 0.2")])
def test_bad_input_is_one_line(capsys, tmp_path, tmp_path_factory, argv, words):
    tree = make_tree(tmp_path_factory.mktemp("data"), splits=("train",))
    argv = [word.format(tree=tree) for word in argv]
    assert words in error_line(capsys, "--output_dir", str(tmp_path), *argv)
    assert list(tmp_path.iterdir()) == []


def test_another_sweep_in_the_same_folder_is_refused(capsys, tmp_path):
    settings = {"learning_rates": [0.1], "img_size": (8, 10), "seed": 1}
    sweep.claim(tmp_path / "s", settings)
    sweep.claim(tmp_path / "s", settings)
    sweep.claim(tmp_path / "s", settings | {"seed": 2})               # nothing has run yet
    (tmp_path / "s" / "lr-0.1").mkdir()
    (tmp_path / "s" / "lr-0.1" / "log.jsonl").touch()
    file = tmp_path / "s" / "sweep.json"
    older = json.loads(file.read_text()) | {"fp16": False, "float32_matmul": "highest"}              # flags that are gone
    file.write_text(json.dumps(older))
    sweep.claim(tmp_path / "s", settings | {"seed": 2})
    with pytest.raises(ConfigError, match=r"with seed 2, not 1\. Choose another NAME, or add --seed 2 to continue it"):
        sweep.claim(tmp_path / "s", settings)


@pytest.mark.parametrize(("before", "words"), [
    ({"attention_loss_weights": [0.1], "seed": 1}, r"attention_loss_weights \[0.1\], not None"),
    ({"learning_rates": [0.1], "seed": 1, "gone": 3}, "gone 3, not None"), ([], r"learning_rates None, not \[0.1\]")])
def test_sweep_with_other_names_of_settings_is_refused(tmp_path, before, words):
    (tmp_path / "lr-0.1").mkdir()
    (tmp_path / "lr-0.1/log.jsonl").touch()
    (tmp_path / "sweep.json").write_text(json.dumps(before))
    with pytest.raises(ConfigError, match=f"with {words}. Choose another NAME"):
        sweep.claim(tmp_path, {"learning_rates": [0.1], "seed": 1})


# ------------------------------------------------------------------ whole sweeps, of runs that only write what runs write

TRAIN_SH = """
add learning_rate "$LEARNING_RATE"
add name "$NAME"
add val_fraction "$VAL_FRACTION"
if [ "${DRY_RUN:-}" = 1 ]; then printf '%q ' train.py "$@"; echo; exit; fi
exec "$PYTHON" stub.py "$@"
"""
# Takes the place of train.py: accuracy falls with the rate, 10 has no loss, 1e25 diverges, and 12 ends by a signal.
STUB = """
import json, os, pathlib, signal, sys

with open("calls.jsonl", "a") as stream:
    stream.write(json.dumps({"argv": sys.argv[1:], "env": dict(os.environ)}) + "\\n")
words = sys.argv[1:]
given = {word: words[at + 1] for at, word in enumerate(words[:-1]) if word.startswith("--")}
resumed = os.environ.get("RESUME_PATH", "")
folder = pathlib.Path(resumed or os.path.join(given["--output_dir"], given["--name"]))
folder.mkdir(parents=True, exist_ok=True)

def log(event, **more):
    with open(folder / "log.jsonl", "a") as stream:
        stream.write(json.dumps({"event": event, "step": 6, **more}) + "\\n")

log("resume" if resumed else "start")
log("eval", step=3, split="val", images=6, loss=9.0, accuracy=0.0, top5=0.0)
(folder / "step-00000006.pt").touch()
rate = float(given.get("--learning_rate") or given.get("--attention_loss_weight") or 1)
if rate == 12:
    os.kill(os.getppid(), signal.SIGTERM)
    signal.pause()
if rate == 1e25:
    log("diverged")
    sys.exit(4)
if os.path.exists("kill-" + folder.name):
    sys.exit(9)
split = "val" if float(given.get("--val_fraction", 0)) else "test"
if not os.path.exists("lose-" + folder.name):
    log("eval", split=split, images=6, loss="nan" if rate == 10 else rate, accuracy=1 / (1 + rate), top5=1.0)
log("eval", split="train", images=20, loss=rate, accuracy=0.0, top5=0.0)
log("end")
"""


@pytest.fixture
def stub(tmp_path, monkeypatch):
    """stub() -> the flags of every run so far, by its folder; the sweeps of the test start stubs in tmp_path"""
    (tmp_path / "train.sh").write_text("add() { :; }\n" + TRAIN_SH)
    (tmp_path / "stub.py").write_text(STUB)
    mark(tmp_path / "edits", range(3))
    monkeypatch.setattr(sweep, "ROOT", tmp_path)
    monkeypatch.chdir(tmp_path)
    for name in ("NAME", "OUTPUT_DIR"):
        monkeypatch.delenv(name, raising=False)
    calls = tmp_path / "calls.jsonl"

    def runs() -> list[dict]:
        return [json.loads(line) for line in calls.read_text().splitlines()]

    return runs


def rows_of(folder: str) -> list[dict]:
    return list(csv.DictReader(Path(folder, "sweep.csv").read_text().splitlines()))


def test_the_folder_of_a_run_is_refused(stub, capsys, tmp_path):
    """In train.sh's words, before anything is written."""
    for file in ("step-00000006.pt", "best.pt"):
        (tmp_path / "output" / file / file).parent.mkdir(parents=True)
        (tmp_path / "output" / file / file).touch()
        before = sorted(tmp_path.rglob("*"))
        assert f"output/{file} already holds a run. Resume it (" in error_line(capsys, "--name", file, "--learning_rates", "0.1")
        assert sorted(tmp_path.rglob("*")) == before


def test_a_sweep_that_was_interrupted_resumes(stub, capsys, monkeypatch):
    """A part is held out, a rate that diverges is noted, and test is looked at once, at the end."""
    data = tree(Path("data"), {"train/ant": 4, "train/bee": 4, "val/ant": 2, "val/bee": 2})
    argv = ["--learning_rates", "0.003,1e25", "--name", "s", "--dataset", "folder", "--data_dir", data, "--split_seed", "3",
            "--val_fraction", "0.25", "--eval_train"]
    Path("kill-final").touch()
    assert sweep.main(argv) == 9
    assert "a run ended with exit code 9" in capsys.readouterr().err
    Path("kill-final").unlink()
    before = {path: path.stat().st_mtime_ns for path in Path("output/s").glob("lr-*/log.jsonl")}
    for name, value in (("LEARNING_RATE", "0.5"), ("GPUS", "0,1")):
        monkeypatch.setenv(name, value)                    # the run that is resumed has its settings
    assert sweep.main(argv) == 0
    printed = capsys.readouterr().out
    assert "resuming final" in printed and "running" not in printed and "sweep: learning rate 0.003, chosen on" in printed
    assert before == {path: path.stat().st_mtime_ns for path in Path("output/s").glob("lr-*/log.jsonl")}
    rows = rows_of("output/s")
    assert [row["run"] for row in rows] == ["lr-0.003", "lr-1e+25", "final"]
    assert [row["split"] for row in rows] == ["val", "", "test"] and rows[1]["status"].startswith("diverged")
    assert Path("output/s/sweep.png").stat().st_size > 5000
    *trials, final, resumed = stub()
    for call, rate in zip([*trials, final], ("0.003", "1e+25", "0.003")):
        given = {word: call["argv"][at + 1] for at, word in enumerate(call["argv"][:-1]) if word.startswith("--")}
        wanted = {"--learning_rate": rate, "--test": "once", "--val_fraction": "0"} if call is final else {
            "--learning_rate": rate, "--test": "never", "--val_fraction": "0.25", "--split_seed": "3"}
        assert wanted.items() <= given.items() and "--eval_train" in call["argv"]
        assert (call is final) == ("--split_seed" not in given)
    assert resumed["argv"] == [] and resumed["env"]["RESUME_PATH"] == "output/s/final"
    assert resumed["env"]["GPUS"] == "0,1" and "LEARNING_RATE" not in resumed["env"]
    assert sweep.main(argv) == 0 and len(stub()) == len(trials) + 2, "a run that has ended was started again"


def test_a_sweep_over_attention_weights(stub, capsys):
    """Every trial starts from step 1 with its weight; the table and the picture name what was tried."""
    Path("one.pt").touch()
    assert sweep.main(["--attention_loss_weights", "10,0", "--name", "w", "--pretrained_dir", "one.pt", "--attention_edits",
                       "edits"]) == 0
    rows = rows_of("output/w")
    assert [row["run"] for row in rows] == ["weight-0.0", "weight-10.0", "final"]
    assert [row["attention_loss_weight"] for row in rows] == ["0.0", "10.0", "0.0"]
    assert [call["argv"][call["argv"].index("--attention_loss_weight") + 1] for call in stub()] == ["0.0", "10.0", "0.0"]
    assert all({"one.pt", "edits"} <= set(call["argv"]) for call in stub())
    printed = capsys.readouterr().out
    assert "choice   attention loss weight 0, chosen on" in printed and Path("output/w/sweep.png").exists()


def test_a_start_that_has_seen_what_the_sweep_chooses_on_is_refused(stub, capsys, run_train):
    """The weights of step 1 are compared on its training images otherwise; with the same images held out the sweep runs."""
    data = tree(Path("data"), {"train/ant": 10, "train/bee": 10, "val/ant": 2, "val/bee": 2})
    images = ["--dataset", "folder", "--data_dir", data]
    for name, held_out in (("whole", []), ("part", ["--val_fraction", "0.1"])):
        assert run_train(*images, *held_out, "--model_type", "ViT-Nano_2", "--num_steps", 1, "--name", name) == 0
    argv = ["--attention_loss_weights", "0,1", *images, "--attention_edits", "edits", "--name", "w", "--pretrained_dir"]
    assert error_line(capsys, *argv, "output/whole").endswith(
        "--pretrained_dir output/whole: that run was trained on 2 of the 2 images that the sweep chooses on: their accuracy "
        "means little. Train that run again, with the same images held out: --val_fraction 0.1 --split_seed 0\n")
    assert error_line(capsys, *argv, "output/part", "--val-fraction", "0.3").endswith(
        "on 4 of the 6 images that the sweep chooses on: their accuracy means little. Hold out the same images as that run: "
        "--val_fraction 0.1 --split_seed 0\n")
    assert not Path("output/w").exists()
    assert sweep.main([*argv, "output/part"]) == 0 and len(stub()) == 3
    capsys.readouterr()
    Path("output/old/weight-0.0").mkdir(parents=True)                     # begun by a version that did not look
    Path("output/old/weight-0.0/log.jsonl").touch()
    argv[argv.index("w")] = "old"
    sweep.main([*argv, "output/whole"])
    assert capsys.readouterr().out.startswith("warning: --pretrained_dir output/whole: that run was trained on 2 of the 2 images")


def test_a_run_is_started_with_each_flag_once(stub, monkeypatch):
    """Whether its name and folder came as flags or as variables of train.sh. The trials leave what comes next to the sweep."""
    monkeypatch.setenv("NAME", "other")
    monkeypatch.setenv("VAL_FRACTION", "0.5")
    data = tree(Path("data"), {"train/ant": 4, "train/bee": 4, "val/ant": 2, "val/bee": 2})
    monkeypatch.setattr(sweep, "pinned", lambda trial, typed: ["--train_batch_size", "32"] * (trial.name == "lr-0.003"))
    assert sweep.main(["--learning_rates", "0.003", "--name=s", "--output-dir", "here", "--log_dir", "there", "--val_fraction",
                       "0.25", "--dataset", "folder", "--data_dir", data]) == 0
    trial, final = stub()
    assert "--train_batch_size" not in trial["argv"] and "--train_batch_size 32" in " ".join(final["argv"])
    for call, name in ((trial, "lr-0.003"), (final, "final")):
        flags = [word.partition("=")[0].replace("-", "_") for word in call["argv"] if word.startswith("--")]
        assert sorted(flags) == sorted(set(flags)) and call["argv"][-4:].count(name) == 1, call["argv"]
        assert not {"NAME", "VAL_FRACTION", "OUTPUT_DIR"} & call["env"].keys()
        assert call["env"]["VIT_TRIAL"] == ("final" if name == "final" else "1")
    assert Path("here/s/final/log.jsonl").exists()


def test_the_final_run_has_batch_and_augmentation_of_its_trial(tmp_path):
    """For which its rate was chosen, though a recipe may take others for more images."""
    assert sweep.pinned(tmp_path, {}) == []
    (tmp_path / "config.json").write_text('{"config": {"train_batch_size": 48, "randaugment_ops": 1}}')
    assert sweep.pinned(tmp_path, {}) == ["--train_batch_size", "48", "--randaugment_ops", "1"]
    assert sweep.pinned(tmp_path, {"train_batch_size": 32}) == ["--randaugment_ops", "1"]


def test_a_final_run_goes_on_with_the_rate_that_it_began_with(stub, monkeypatch, capsys):
    """An earlier version may have chosen another."""
    argv = ["--learning_rates", "0.003,0.1", "--name", "s"]
    Path("kill-final").touch()
    assert sweep.main(argv) == 9
    Path("kill-final").unlink()
    began = types.SimpleNamespace(header=types.SimpleNamespace(config={"learning_rate": 0.1}))
    with monkeypatch.context() as patched:
        patched.setattr("utils.run.checkpoint.open_newest", lambda folder, verify: began)
        assert sweep.main(argv) == 0
    assert [row["learning_rate"] for row in rows_of("output/s")] == ["0.003", "0.1", "0.1"]
    assert "the final run began with it" in capsys.readouterr().out


def test_all_diverged_is_one_line(stub, capsys):
    assert sweep.main(["--learning_rates", "1e25", "--name", "s"]) == 2
    assert "all runs of output/s diverged. Try lower learning rates" in capsys.readouterr().err


def test_lost_line_of_an_evaluation_is_written_again(stub, capsys):
    argv = ["--learning_rates", "0.003", "--name", "s"]
    Path("lose-lr-0.003").touch()
    assert sweep.main(argv) == 3 and "output/s/lr-0.003/log.jsonl has no evaluation" in capsys.readouterr().err
    Path("lose-lr-0.003").unlink()
    assert sweep.main(argv) == 0 and "resuming lr-0.003" in capsys.readouterr().out
    assert [row["run"] for row in rows_of("output/s")] == ["lr-0.003", "final"]


def test_picture_without_room_does_not_cost_the_table(stub, capsys):
    Path("output/s/sweep.png").mkdir(parents=True)
    assert sweep.main(["--learning_rates", "0.003", "--name", "s"]) == 3
    printed = capsys.readouterr()
    assert "final                        0.003  test " in printed.out and "cannot write output/s/sweep.png" in printed.err


def test_a_signal_ends_the_sweep_and_its_run(stub, capsys):
    """It is passed to the run, and the sweep can be resumed."""
    with pytest.raises(SystemExit) as end:
        sweep.main(["--learning_rates", "12", "--name", "s"])
    assert end.value.code == 128 + signal.SIGTERM and "the same command resumes it" in capsys.readouterr().err
    assert len(stub()) == 1


@pytest.mark.slow
def test_a_sweep_of_real_runs(run_script, tmp_path):
    """By sweep.sh, with names that the output cannot show: train.sh takes its flags, and its logs hold what the table needs."""
    data, output = make_tree(tmp_path / "b\xe4ume", ("\xfcnf", "\u72ac"), splits=("train", "val", "test")), tmp_path / "\xf6"
    given = {"dataset": "folder", "data_dir": data, "recipe": "digits", "model_type": "ViT-Nano_2", "pretrained_dir": "none",
             "num_steps": 1, "train_batch_size": 4, "output_dir": output, "name": "s", "device": "cpu"}
    done = run_script("sweep.sh", *(str(word) for name, value in given.items() for word in (f"--{name}", value)),
                      "--confusion_matrix", *map(str, TINY), NPROC="1", LEARNING_RATES="0.01", LC_ALL="C", PYTHONUTF8="0",
                      PYTHONCOERCECLOCALE="0")
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    assert re.search(r"run folder: \S+\\(xf6|udcc3\\udcb6)/s/lr-0.01", done.stdout), done.stdout
    rows = rows_of(output / "s")
    assert [(row["run"], row["split"], row["images"], row["status"]) for row in rows] == [
        ("lr-0.01", "val", "12", "done"), ("final", "test", "12", "done")]
    for row, test in zip(rows, ("never", "once")):
        config = json.loads((output / "s" / row["run"] / "config.json").read_text())["config"]
        assert (config["learning_rate"], config["test"], config["num_steps"]) == (0.01, test, 1)
    assert (output / "s/sweep.png").exists() and (output / "s/final/confusion.csv").exists()
