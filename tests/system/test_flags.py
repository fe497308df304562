"""docs/promises.md: every flag and every variable goes through train.sh and torchrun to train.py as it was typed."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from runs import VARIABLES, flag_of, flags_of, make_tree
from torch.distributed.run import get_args_parser

from utils.config import FLAGS, parse, types

ROOT = Path(__file__).resolve().parents[2]
parse_args = get_args_parser().parse_args
PROMISE = ("P24", "every flag and every variable reaches the program as it was typed")
# Text values that a shell, argparse or the launcher might misread.
ODD = ["a b", "it's", 'say "no"', "$HOME `id` $(id) *", "Größe 画像 🙂", "back\\slash\\", "a;b&c|d>e", "line\nbreak", "tab\t",
       " ends ", "#no comment", "~/x", "{a,b}", "!!", "%s%n", "=x=", ""]
DASHED = ["-d", "-my data", "--no", "--nproc_per_node", "-1e-3", "--max_restarts=3"]
# Values for each type that is not text.
TYPED = {
    types.channel_values: ["0.485,0.456,0.406"], types.channel_widths: ["0.229,0.224,0.225"],
    types.run_name: ["Run_1.2+x-3", "0"], types.image_size: ["224", "224x160"], types.increasing_steps: ["200,300,400"],
    types.trained_layers: ["head", "2"], types.sigmoid_layers: ["last", "3,7"], types.class_weights: ["1,2.5,1"],
    types.fraction: ["0.25", "1e-3"], types.unit_interval: ["1"], types.magnitude: ["10"], types.positive_int: ["7"],
    types.non_negative_int: ["0"], types.image_channels: ["1"], types.intensity_range: ["0,1023"],
    types.positive_float: ["2.5e-1"], types.non_negative_float: ["3e-2"], types.center_fraction: ["0", "0.875"],
    types.padding: ["4"], types.auto_or_positive_int: ["auto", "4"]}


def spellings(name: str) -> list[tuple[list[str], object]]:
    """Return the ways to type the flag, each with the value that train.py has to read."""
    kind = FLAGS[name].type
    if kind is None:
        return [([f"--{name}"], True)]
    texts = (str, types.user_path)
    values = kind if isinstance(kind, tuple) else TYPED[kind] if kind not in texts else ODD
    read = (lambda text: text) if isinstance(kind, tuple) else kind
    found = [(words, read(value)) for value in values for words in ([f"--{name}", value], [f"--{name}={value}"])]
    return found + [([f"--{name}={value}"], value) for value in DASHED if kind in texts]


@pytest.mark.contract(*PROMISE)
def test_the_launcher_takes_no_flag_for_its_own(figure):
    """One flag at a time, in every spelling: argparse searches all words for options before it passes the rest on."""
    nodes = ["--nnodes", "2", "--rdzv_backend", "nodes", "--rdzv_endpoint", "a:29500", "--rdzv_conf", "rank=1",
             "--max_restarts", "3"]
    tried = 0
    aliases = [["-" * min(2, len(alias)) + alias, "1"] for row in FLAGS.values() for alias in row.aliases]
    assert all(parse_args(["--standalone", "train.py", *words]).training_script_args == words for words in aliases)
    for name in FLAGS:
        for words, value in spellings(name):
            for launcher in (["--standalone"], nodes):
                read = parse_args([*launcher, "--nproc_per_node", "2", "train.py", *words])
                assert (read.training_script, read.training_script_args) == ("train.py", words)
                assert (read.nproc_per_node, read.standalone) == ("2", launcher != nodes)
            assert parse(words) == ({"precision": "fp16"} if name == "fp16" else {name: value})
            tried += 1
    figure(f"spellings of {len(FLAGS)} flags read by torchrun", tried)


# Replaces train.py, and Python where no launcher is needed.
NOTE = """
import json, os, sys
if "VIT_CHECK" in os.environ:           # train.sh checks the flags before it starts torchrun
    sys.exit()
with open(os.path.join(os.environ["NOTES"], os.environ.get("RANK", "script")), "a") as stream:
    stream.write(json.dumps({"argv": sys.argv[1:], "folder": os.getcwd(), "env": dict(os.environ)}) + "\\n")
"""
STUB = """#!/usr/bin/env bash
[ "$1" != - ] || exec "$REAL_PYTHON" "$@"
exec "$REAL_PYTHON" -I "$NOTES/note.py" "$@"
"""


@pytest.fixture
def project(tmp_path):
    """Return a copy of the scripts, in a folder whose name needs quotes, with a train.py that records its arguments."""
    place = tmp_path / "my $pro 'ject ü"
    shutil.copytree(ROOT / "utils", place / "utils", ignore=shutil.ignore_patterns("__pycache__", "page"))
    for name in ("train.sh", "train_fp16.sh", "requirements.txt"):
        shutil.copy(ROOT / name, place / name)
    (place / "train.py").write_text(NOTE)
    (tmp_path / "note.py").write_text(NOTE)
    (tmp_path / "python").write_text(STUB)
    (tmp_path / "python").chmod(0o755)
    return place


def launch(project: Path, *flags: str, script: str = "train.sh", python: Path | None = None, **variables: str) -> list[dict]:
    """Start the script. Return what each process recorded."""
    notes = project.parent
    unset = ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "VIT_LAUNCH", *VARIABLES)
    environment = {name: value for name, value in os.environ.items() if name not in unset}
    environment |= {"PYTHON": str(python or notes / "python"), "REAL_PYTHON": sys.executable, "NOTES": str(notes), **variables}
    done = subprocess.run(["bash", str(project / script), *flags], cwd="/", env=environment, capture_output=True, text=True,
                          timeout=600, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr
    files = sorted(file for file in notes.iterdir() if re.fullmatch(r"script|\d+", file.name))
    found = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    for file in files:
        file.unlink()
    return found


@pytest.mark.contract(*PROMISE)
def test_every_flag_goes_through_the_script(project, figure):
    """train.sh and train_fp16.sh, with a Python that records its arguments."""
    given = [word for name in FLAGS for words, _ in spellings(name) for word in words]
    for script in ("train.sh", "train_fp16.sh"):
        noted, = launch(project, *given, script=script)
        assert noted["argv"][-len(given):] == given and noted["folder"] == str(project)
    figure("arguments passed on by train.sh and train_fp16.sh", 2 * len(given))


@pytest.mark.contract(*PROMISE)
def test_every_variable_goes_through_the_script(project, tries, figure):
    """All at once, the text variables with every odd value in turn. An empty variable counts as not set."""
    texts = [name for name in VARIABLES if FLAGS[flag_of(name)].type in (str, types.user_path)]
    values = [value for value in [*ODD, *DASHED] if value]
    for number in range(0, len(values), tries(8, 1)):
        odd = {name: values[(number + turn) % len(values)] for turn, name in enumerate(texts)}
        noted, = launch(project, **VARIABLES | odd)
        assert parse(noted["argv"][noted["argv"].index("train.py") + 1:]) == flags_of(VARIABLES | odd)
    figure("variables passed on by train.sh", len(values[::tries(8, 1)]) * len(VARIABLES))


@pytest.mark.slow
@pytest.mark.contract(*PROMISE)
def test_every_flag_and_variable_goes_through_torchrun(project, figure):
    """One launch of two processes with all of them, in a folder whose name needs quotes."""
    given = [word for name in FLAGS for words, _ in spellings(name) for word in words]
    launched = {"NPROC": "2", "MAX_RESTARTS": "2", "OMP_NUM_THREADS": "3", "WANDB_API_KEY": "a key"}
    found = launch(project, *given, python=Path(sys.executable), **launched, **VARIABLES)
    assert sorted(noted["env"]["RANK"] for noted in found) == ["0", "1"]
    for noted in found:
        assert noted["argv"][-len(given):] == given and noted["folder"] == str(project)
        assert parse(noted["argv"][:-len(given)]) == flags_of(VARIABLES)
        assert parse(noted["argv"])["learning_rate"] == 3e-2, "flags win over variables"
        assert {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "OMP_NUM_THREADS": "3", "WANDB_API_KEY": "a key",
                "TORCHELASTIC_MAX_RESTARTS": "2"}.items() <= noted["env"].items()
        assert noted["env"]["VIT_LAUNCH"] and not Path(noted["env"]["VIT_LAUNCH"]).exists()
    figure("arguments and variables through train.sh and torchrun, to each of two processes", len(given) + len(VARIABLES))


def test_folders_with_odd_names_are_used(run_train, tmp_path, monkeypatch):
    """The working folder, the data, the output and the resumed run."""
    home = tmp_path / "a b 'c' ü"
    home.mkdir()
    monkeypatch.chdir(home)
    make_tree(home / "-my data 画像")
    assert run_train("--dataset", "folder", "--model_type", "ViT-Nano_2", "--data_dir=-my data 画像", "--output_dir=-out put",
                     "--log_dir", "l g", "--name", "r") == 0
    assert run_train("--resume_path=-out put/r", "--num_steps", 5) == 0
    assert (home / "-out put/r/step-00000005.pt").exists() and list((home / "l g" / "r").iterdir())
    assert sorted(path.name for path in home.iterdir()) == ["-my data 画像", "-out put", "l g"]
