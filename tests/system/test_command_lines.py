"""Help and error messages of every program: a bad value of a flag is reported in one line, before PyTorch is loaded."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

import annotate
import dataset
import export
import predict
import sweep
import visualize
from models import __main__ as models_main
from utils import config
from utils.config.parser import OF_OTHERS, TITLE_OF_OTHERS

ROOT = Path(__file__).resolve().parents[2]
PARSERS = {"predict.py": predict.make_parser, "export.py": export.make_parser, "annotate.py": annotate.make_parser,
           **{f"visualize.py {name}": lambda name=name: visualize.make_parser(name) for name in visualize.PICTURES}}
PARSES = {"predict.py": predict.parse, "export.py": export.parse, "annotate.py": annotate.parse, "train.py": config.parse,
          "visualize.py": visualize.parse, "dataset.py": dataset.parse}


def refused(parse, argv: list[str]) -> str:
    with pytest.raises(config.ConfigError) as caught:
        parse(argv)
    assert caught.value.exit_code == 2
    return str(caught.value)


def check_refusal(text: str, flag: str, choices) -> None:
    """Assert one line about the flag in plain words, without names of Python types or functions."""
    words = re.sub(r"\(.* --help lists the flags\)|--\w+|'[^']*'", "", text)
    for choice in choices or ():
        words = words.replace(str(choice), "")
    assert text.startswith(f"{flag} ") and "\n" not in text, text
    assert re.search("must be|must consist|must increase|cannot be|needs a value|takes no value", text), text
    assert not re.search(r"[a-z]_[a-z]|invalid|argument|None|value:.*\bstr\b|<", words), text


def bad_values(flag: str, kind, choices, is_switch: bool) -> list[list[str]]:
    if is_switch:
        return [[f"{flag}=1"]]
    return [[flag], *([] if kind in (None, str) and not choices else [[flag, "x" * 5000]])]


@pytest.mark.parametrize("prog", PARSERS)
def test_each_flag_of_a_program_refuses_bad_values_in_plain_words(prog):
    program, *picture = prog.split()
    for action in PARSERS[prog]()._actions:
        if action.option_strings and action.dest != "help":
            for words in bad_values(action.option_strings[0], action.type, action.choices, action.nargs == 0):
                check_refusal(refused(PARSES[program], [*picture, *words]), action.option_strings[0], action.choices)


def test_each_flag_of_training_and_data_sets_refuses_bad_values_in_plain_words():
    for name, row in config.FLAGS.items():
        for words in bad_values(f"--{name}", row.type, row.type if isinstance(row.type, tuple) else None, row.type is None):
            choices = row.type if isinstance(row.type, tuple) else None
            check_refusal(refused(config.parse, words), f"--{name}", choices)
            for command, names in dataset.DATASET_FLAGS.items():
                if name in names:
                    check_refusal(refused(dataset.parse, [command, *words]), f"--{name}", choices)


@pytest.mark.parametrize("prog", [*PARSERS, "sweep.py", "dataset.py check", "dataset.py prepare"])
def test_help_begins_with_what_the_program_does_and_examples(prog, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    program, *words = prog.split()
    with pytest.raises(SystemExit):
        (PARSES | {"sweep.py": sweep.parse})[program]([*words, "--help"])
    usage, what, examples, *rest = capsys.readouterr().out.split("\n\n")
    assert usage.startswith(f"usage: {prog} ") and re.match(r"[A-Z]\w+s .*[.]$", what, re.DOTALL), what
    assert re.match(r"examples:\n  \S.*\n      \S", examples), examples
    text = "\n".join(rest)
    assert max(map(len, text.splitlines())) < 80 and "{" not in text
    for part in re.findall(r"^  --(?:.|\n(?!  --|\S|$))*", text, re.MULTILINE):              # a flag, its placeholder, its text
        flag, placeholder, *_ = part.split()
        assert "(default: " in " ".join(part.split()) or (prog, flag) in (("export.py", "--to"), ("export.py", "--output")), part
        assert placeholder.lower() != flag[2:], part


@pytest.mark.parametrize(("program", "names"), [(visualize, list(visualize.PICTURES)), (dataset, ["check", "prepare"])])
def test_a_program_without_arguments_lists_what_it_can_do(program, names, capsys):
    """The same text as --help, which exits with 0."""
    assert program.main([]) == 2
    listed = capsys.readouterr()
    assert program.main(["--help"]) == 0 and not listed.out
    assert listed.err.startswith(capsys.readouterr().out) and listed.err.count("error: ") == 1
    for name in names:
        assert re.search(rf"^  {name} +\w.*\n      .*{program.__name__}.py {name} \S", listed.err, re.MULTILINE), name


def test_every_program_has_the_same_flags_for_models_that_are_not_runs():
    for prog, make in PARSERS.items():
        of_others = {action.dest for group in make()._action_groups if group.title == TITLE_OF_OTHERS
                     for action in group._group_actions}
        pictures = prog.startswith("visualize.py")
        sees_images = not pictures or "image" in visualize.PICTURES[prog.split()[1]]
        expected = set() if prog == "visualize.py curves" else set(OF_OTHERS if sees_images else visualize.MODEL_OF_OTHERS)
        assert of_others == expected, prog


LATE = {
    "export.py": [("nowhere --to npz --output a.npz", "MODEL nowhere: no such file or folder"),
                  ("photos --to npz --output a.npz", "MODEL: photos holds no intact checkpoint"),
                  ("w.npz --to npz --output -", "--output must be a file or folder, and - would mean"),
                  ("w.npz --to npz --output file.txt", "--output file.txt exists, and is not overwritten"),
                  ("w.npz --to folder --output photos", "--output photos exists, and is not overwritten"),
                  ("w.npz --to npz --output photos", "--output photos is a folder. Give the name of a new file"),
                  ("w.npz --to npz --output file.txt/a.npz", "--output file.txt: file.txt is a file, not a folder"),
                  ("w.npz --to npz --output a.npz --class_names no.txt", "--class_names no.txt: no such file"),
                  ("w.npz --to onnx --output a.onnx", r"--to onnx needs the package onnx. Install it: \S+ -m pip install -r ")],
    "predict.py": [("w.npz photos --output file.txt", "--output file.txt exists, and is not overwritten"),
                   ("w.npz photos --output photos", "--output photos is a folder"),
                   ("w.npz photos --output file.txt/a.csv", "--output file.txt: file.txt is a file, not a folder"),
                   ("photos p.png", "MODEL: photos holds no intact checkpoint"),
                   ("w.npz", "INPUT is missing"), ("w.npz p.png --split val", "INPUT and --split exclude each other")],
    "visualize.py": [("rollout --image gone.png", "--image gone.png: no such file or folder"),
                     ("rollout --checkpoint photos", "--checkpoint: photos holds no intact checkpoint"),
                     ("rollout --image p.png --output p.png", "--output p.png exists and was not drawn by this program"),
                     ("rollout --output a.jpg", "--output a.jpg: a picture is written as .png, .pdf or .svg"),
                     ("rollout --output file.txt", "--output file.txt: a picture is written as .png, .pdf or .svg"),
                     ("rollout --output -", "--output must be"),
                     ("rollout --output file.txt/a.png", "--output file.txt: file.txt is a file, not a folder"),
                     ("curves", "--checkpoint is missing")],
    "annotate.py": [("", "--checkpoint is missing, and there is no run in output"),
                    ("--checkpoint w.npz --data gone", "--data gone: no such folder"),
                    ("--checkpoint photos", "--checkpoint: photos holds no intact checkpoint"),
                    ("--edits -", "--edits must be a file or folder, and - would mean standard output"),
                    ("--checkpoint w.npz --edits file.txt", "--edits file.txt: file.txt is a file, not a folder")],
    "dataset.py": [("prepare - --dataset folder --data_dir photos", "FOLDER must be a file or folder, and - would"),
                   ("check --output_dir -", "--output_dir must be a file or folder, and - would"),
                   ("check --dataset folder --data_dir photos --output_dir file.txt", "--output_dir file.txt: file.txt is a"),
                   ("prepare file.txt/a --dataset folder --data_dir photos", "FOLDER file.txt/a: file.txt is a file, not a"),
                   ("check --dataset photo", "--dataset cannot be 'photo'. For the images in photos: DATASET=folder DATA_DIR=phot"
                    r"os \(--dataset folder --data_dir\).$")],
}


@pytest.mark.parametrize("program", LATE)
def test_errors_in_the_command_line_are_reported_without_pytorch(program, tmp_path, monkeypatch):
    """`parse` of each program imports no PyTorch: the next test checks that in a process."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos/cat").mkdir(parents=True)
    (tmp_path / "file.txt").touch()
    (tmp_path / "w.npz").symlink_to(ROOT / "assets/ViT-Nano_2-letters.npz")
    (tmp_path / "p.png").write_bytes(b"\x89PNG a photograph")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnx" else object())
    for words, message in LATE[program]:
        text = refused(PARSES[program], words.split())
        assert re.match(message, text), text


def test_no_program_loads_pytorch_to_parse():
    code = "import sys, annotate, dataset, export, predict, sweep, visualize; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60).returncode == 0


def test_python_m_models_reports_a_missing_file(capsys):
    assert models_main.main([]) == 2
    assert capsys.readouterr().err.startswith("python -m models: error: FILE is missing. For example: python -m models output/")
