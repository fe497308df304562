"""The output of `--help`: examples, titled groups, short placeholders and the defaults that apply, in narrow windows too."""

import re

import pytest

from utils import launch
from utils.config import FLAGS, ConfigError, parse
from utils.config.help import flag_help, listed, overview, parse_command
from utils.config.retired import RETIRED

COMMANDS = (("check", "reads every image", "check --data_dir flowers"), ("prepare", "decodes every image", "prepare small"))


def printed_help(capsys, **more) -> str:
    with pytest.raises(SystemExit) as left:
        parse(["--help"], **more)
    assert left.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("columns", [80, 120, 300])
def test_help_has_groups_placeholders_and_lines_that_fit(columns, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", str(columns))
    text = printed_help(capsys)
    assert text.startswith("usage: train.py [FLAG ...]\n\nFine-tunes a Vision Transformer.")
    assert text.index("DATASET=folder DATA_DIR=flowers VAL_FRACTION=0.2") < text.index("--dataset")
    assert f"  {launch.command('train.py')} --eval_only" in text
    titles = [line[:-1] for line in text.splitlines() if re.fullmatch("[a-z].*:", line)]
    assert titles == ["examples", "options", *dict.fromkeys(row.group for row in FLAGS.values())]
    flags = text[text.index("\ndata:"):]
    assert set(re.findall(r"^  --(\w+)", flags, re.MULTILINE)) == set(FLAGS)
    longest = max(map(len, flags.splitlines()))
    assert min(columns, 120) - 15 < longest <= min(columns, 120) - 2
    assert "--learning_rate FLOAT" in text and "--seed N" in text and "--exif auto|follow|off" in text and "{" not in text
    assert not any(name in text for name in RETIRED) and "vit-\n" not in text


def test_each_flag_shows_its_default():
    """Also those of the recipes, and in words if the default depends on the model, the data or the machine."""
    texts = {name: flag_help(row) for name, row in FLAGS.items()}
    for name, row in FLAGS.items():
        assert texts[name].count("(default: ") == (row.type is not None), name
    assert "(default: the recipe's: 0.03 in vit-paper; 0.001 in digits; computed in photos) (also --lr)" in texts["learning_rate"]
    assert texts["label_smoothing"].endswith("(default: 0; 0.1 in deit, deit-384, cait, mae) (also --smoothing, "
                                             "--label_smoothing_factor)")
    assert "(default: 9; 5 in photos)" in texts["randaugment_magnitude"] and "(default: 42)" in texts["seed"]
    assert "(default: the model's, or the recipe's)" in texts["img_size"] and "quarter of the cores" in texts["num_workers"]


def test_choices_that_do_not_fit_into_the_placeholder_are_in_the_text(capsys):
    text = " ".join(printed_help(capsys).split())
    assert "--dataset NAME data set to train on; folder or csv for your own images. One of digits, cifar10," in text
    assert "--alpha NAME" in text and "One of auto, white" not in text                    # which the text explains one by one


def test_a_program_may_replace_the_text_of_a_flag(capsys):
    text = " ".join(printed_help(capsys, prog="dataset.py check", names={"output_dir": "folder of bad_images.txt", "seed": ""},
                                 description="Reads images.", examples=[("dataset.py check --seed 1", "with a seed")]).split())
    assert "--output_dir DIR folder of bad_images.txt (default: output) (also --output)" in text and "seed of init" in text
    assert f"Reads images. examples: {launch.command('dataset.py')} check --seed 1 with a seed options:" in text


def test_the_overview_names_every_command_with_an_example(capsys):
    text, python = overview("Checks data.", "commands", COMMANDS, "dataset.py"), launch.command("dataset.py")
    for name, does, example in COMMANDS:
        assert re.search(f"\n  {name} +{does}\n      {re.escape(python)} {example}\n", text)
    with pytest.raises(ConfigError, match=r"^COMMAND is missing\. Choose one of those above$"):
        parse_command([], "Checks data.", "commands", COMMANDS, "dataset.py")
    assert capsys.readouterr() == ("", f"{text}\n")
    with pytest.raises(ConfigError, match=r"^COMMAND must be check or prepare, got 'chekc'\. Did you mean check\?"):
        parse_command(["chekc"], "Checks data.", "commands", COMMANDS, "dataset.py")
    assert parse_command(["check", "x"], "", "commands", COMMANDS, "dataset.py") == "check" and not capsys.readouterr().err


def test_listed_joins_words():
    assert [listed("a"), listed("ab"), listed("abc", "and")] == ["a", "a or b", "a, b and c"]
