"""The command line: flags are parsed, and a configuration is written as flags that reproduce it."""

import shlex

import pytest
from flag_values import WITH, other, words

from utils import launch
from utils.config import FLAGS, ConfigError, Facts, as_command, parse, resolve
from utils.config.retired import RETIRED
from utils.config.spelling import ALIASES, ELSEWHERE

FACTS = Facts(1797, 10, start_head_classes=10)


def message(argv: list[str], **more) -> str:
    with pytest.raises(ConfigError) as caught:
        parse(argv, **more)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_every_flag_is_parsed_and_written_again():
    for name, row in FLAGS.items():
        value = other(name)
        target, meant = row.alias_of or (name, value)
        assert parse(words(name, value)) == {target: meant}
        flags = parse([*WITH.get(name, []), *words(name, value)])
        config = resolve(flags, FACTS)
        if name not in ("num_epochs", "warmup_epochs", "resume_path", "override"):      # a new run has none of these
            assert getattr(config, target) == meant and config.source(target) == "flag", name
        assert resolve(parse(shlex.split(as_command(config))), FACTS) == config, name


@pytest.mark.parametrize("flags", [
    {"dataset": "folder", "data_dir": "-my data", "intensity_range": (-1024, 3071)},
    {"dataset": "cifar10", "precision": "fp16", "fp16_opt_level": "O3", "img_size": (384, 256), "eval_only": True},
    {"recipe": "bit-hyperrule", "dataset": "cifar10", "mixup_alpha": 0.0, "weight_decay": 0.30000000000000004}], ids=str)
def test_a_command_gives_the_same_configuration(flags):
    facts = Facts(50_000, 10, start_head_classes=10)
    config = resolve(flags, facts)
    assert resolve(parse(shlex.split(as_command(config))), facts) == config


def test_flags_without_effect_are_not_written():
    text = as_command(resolve({}, FACTS))
    assert not {"--momentum", "--head", "--data_dir", "--mixup_alpha", "--fp16_opt_level"} & set(text.split())
    assert "--learning_rate 0.001" in text and "--num_steps 100" in text


LOOK_UP = f"({launch.command('train.py')} --help lists the flags)"


@pytest.mark.parametrize(("argv", "text"), [
    (["--nonsense"], f"unrecognized arguments: --nonsense {LOOK_UP}"), (["stray"], f"unrecognized arguments: stray {LOOK_UP}"),
    (["--seed"], f"--seed needs a value: N {LOOK_UP}"), (["--seed=-1"], "--seed must be 0 or more, got -1"),
    (["--fp16=1"], "--fp16 takes no value, got '1'"),
    (["--see", "1"], f"unrecognized arguments: --see 1. Did you mean --seed? {LOOK_UP}"),
    (["--device", "tpu"], "--device must be auto, cpu, cuda or mps, got 'tpu'"),
    (["--lr", "high"], "--learning_rate must be a number, got 'high'"),
    (["--recipe", "MAE"], "--recipe cannot be 'MAE'. Did you mean mae?"),
    (["--gpu_s", "1"], f"unrecognized arguments: --gpu_s 1 {LOOK_UP}")], ids=str)
def test_bad_flags_and_values_are_reported_with_what_to_type(argv, text):
    assert message(argv) == text


@pytest.mark.parametrize("argv", [["--fp16", "--precision", "bf16"], ["--precision", "auto", "--fp16"]], ids=str)
def test_an_alias_that_contradicts_its_flag_is_refused(argv):
    assert parse([]) == {} and "--fp16 and --precision" in message(argv) and "contradict" in message(argv)
    assert parse(["--fp16", "--precision", "fp16"]) == {"precision": "fp16"}


def test_flags_may_be_written_as_in_other_programs():
    """With hyphens, and under every alias. If a flag is given twice, the last one wins, as a flag after train.sh's variables."""
    for name, row in FLAGS.items():
        value = other(name)
        for alias in row.aliases:
            for typed in {alias, alias.replace("_", "-")}:
                flag, *rest = words(name, value)
                assert parse(["-" * min(2, len(alias)) + typed, *rest]) == {name: value}, typed
        flag, *rest = words(name, value)
        assert parse([flag.replace("_", "-"), *rest]) == parse([flag, *rest])
    assert parse(["--learning_rate=1", "--lr=2"]) == {"learning_rate": 2.0}
    assert parse(["--data-dir=-my--data"]) == {"data_dir": "-my--data"}


def test_flags_that_mean_something_else_elsewhere_are_explained():
    text = message(["--batch-size", "64"])
    assert text.startswith("--batch-size is the batch of each GPU elsewhere (timm") and "Here --train_batch_size" in text
    assert message(["-b=64"]).startswith("-b is the batch of each GPU")
    assert "divides --train_batch_size" in message(["--accum_iter", "4"]) and "--pretrained_dir" in message(["--pretrained"])
    assert "is not needed" in message(["--sched-on-updates"]) and "--augmentation" in message(["--hflip", "0.5"])
    for name, (flag, why) in ELSEWHERE.items():
        assert flag in FLAGS and name not in FLAGS and name not in ALIASES, name
        assert message(["-" * min(2, len(name)) + name, "1"]).endswith(why)


def test_no_alias_is_the_name_of_another_flag():
    aliases = [alias for row in FLAGS.values() for alias in row.aliases]
    assert len(aliases) == len(set(aliases)) and not set(aliases) & {*FLAGS, *RETIRED} and "-" not in "".join(aliases)


def test_a_program_may_take_some_flags_and_add_others():
    more = {"prog": "dataset.py prepare", "names": ("dataset",),
            "add_arguments": lambda parser: parser.add_argument("folder", metavar="FOLDER")}
    assert parse(["small", "--dataset", "csv"], **more) == {"folder": "small", "dataset": "csv"}
    assert parse(["small", "--data_set", "csv"], **more)["dataset"] == "csv"
    assert message(["small", "--batch-size", "1"], **more).startswith("unrecognized arguments: --batch-size 1 (")
    assert message(["small", "--seed", "1"], **more).endswith(f"({launch.command('dataset.py')} prepare --help lists the flags)")
    assert message([], **more).startswith("FOLDER is missing (")
    example = {"examples": [("dataset.py prepare small", "")]}
    assert f"FOLDER is missing. For example: {launch.command('dataset.py')} prepare small (" in message([], **more, **example)
