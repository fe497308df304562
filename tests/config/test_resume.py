"""Which settings a resumed run may change, and the changes that it prints."""

import pytest
from flag_values import other

from configs import MODELS
from utils.config import FLAGS, ConfigError, Facts, Saved, changes, choose, resolve
from utils.config.flags import FIXED, FREE, MODEL_KEYS, OVERRIDE

FACTS = Facts(1000, 10, native_bf16=True)
RUN = resolve({"name": "r", "precision": "fp16", "num_steps": 100}, FACTS).to_dict()
CHANGED = {"override": True, "resume_path": "output/r"}


def resume(flags: dict, config: dict = RUN, facts: Facts = FACTS, step=20, images=1000, ranks=1):
    return resolve({"resume_path": "output/r"} | flags, facts, Saved(config, step, images, ranks, "output/r/step-20.pt"))


def message(*arguments, **more) -> str:
    with pytest.raises(ConfigError) as caught:
        resume(*arguments, **more)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def rows(rule: str) -> list[str]:
    return [row.name for row in FLAGS.values() if row.on_resume == rule and row.alias_of is None]


def test_without_flags_a_resumed_run_keeps_its_settings():
    config = resume({})
    own = RUN | {"dataset": "folder", "data_dir": "pets"}
    places = {dataset: choose({"eval_only": True, "dataset": dataset}, own).data_dir for dataset in ("folder", "csv", "mnist")}
    assert places == {"folder": "pets", "csv": "pets", "mnist": "data"}           # published: not in the run's folder
    assert config.to_dict() == RUN | {"resume_path": "output/r"} and config.source("seed") == "checkpoint"


def test_fixed_settings_are_refused():
    for name in rows(FIXED):
        kept = MODELS[RUN["model_type"]][name] if RUN[name] is None and name in MODEL_KEYS else RUN[name]
        flags = {name: other(name, kept)}
        for also in ({}, {"override": True}):
            text = message(flags | also)
            assert text.startswith(f"--{name} {flags[name]}: the checkpoint was made with {kept}, and a resumed run keeps it")
            assert "--override" not in text
        if kept is not None:
            assert resume({name: kept}).to_dict() == RUN | {"resume_path": "output/r", name: kept}    # repeated, not changed
        with pytest.raises(ConfigError, match=f"--{name} "):
            choose(flags, RUN)                                     # before anything is opened


def test_override_allows_other_settings_to_change():
    lit = RUN | {"distillation": "soft", "teacher": "t", "attention_edits": None, "bad_images": "skip", "optimizer": "sgd",
                 "weight_decay": 0.1, "randaugment_ops": 1, "mixup_alpha": 0.5, "cutmix_alpha": 0.5, "decay_type": "step",
                 "decay_milestones": (7,), "augmentation": "crop", "dataset": "folder"}
    required = {"crop_padding": {"augmentation": "pad"}, "min_learning_rate": {"learning_rate": 1.0},
              "train_batch_size": {"gradient_accumulation_steps": 1}}
    for name in set(rows(OVERRIDE)) - {"warmup_epochs", "attention_loss_weight", "loss_scale", "decay_type", "class_weights",
                                      "path_column", "label_column"}:
        value = 32 if name == "train_batch_size" else "bf16" if name == "precision" else other(name, lit[name])
        text = message({name: value}, lit)
        assert f"--{name} " in text and "Omit" in text and "add --override" in text, text
        config = resume({name: value, "override": True} | required.get(name, {}), lit)
        assert getattr(config, name) == value and config.source(name) == "flag"
    assert resume({"warmup_epochs": 0.128, "override": True}, images=1000).warmup_steps == 2
    assert resume({"attention_loss_weight": 2.0, "override": True}, RUN | {"attention_edits": "e"}).attention_loss_weight == 2.0
    assert "only has an effect" in message({"crop_padding": 2, "override": True})
    assert "has 2 numbers" in message({"class_weights": "1,2", "override": True})


def test_free_settings_may_change():
    special = {"teacher": {"distillation": "hard", "teacher": "t"}, "attention_edits": {"attention_edits": "e"}}
    for name in set(rows(FREE)) - {"resume_path", "num_epochs"}:
        config = RUN | special.get(name, {})
        value = other(name, config[name]) if name != "num_steps" else 200
        assert resume({name: value}, config).to_dict() == config | {"resume_path": "output/r", name: value}, name


def test_settings_of_one_session_are_not_kept():
    config = resume({}, RUN | {"compile": True, "profile": True, "override": True})
    assert not (config.compile or config.profile or config.override)
    assert "--compile" in message({"compile": True}, RUN | {"attention_edits": "e", "sigmoid_attention": "last"})


def test_an_evaluation_does_not_repeat_flags_of_the_runs_end():
    asked = RUN | {"eval_train": True, "confusion_matrix": True}
    for flags in ({}, {"eval_train": True}, {"confusion_matrix": True}):
        config = resume({"eval_only": True} | flags, asked)
        assert [config.eval_train, config.confusion_matrix] == [name in flags for name in ("eval_train", "confusion_matrix")]
        assert changes(config, Saved(asked, 20, 1000, 1, "p"), 1) == []
    assert resume({}, asked).eval_train and resume({}, asked).confusion_matrix


def test_a_new_precision_replaces_its_settings_too():
    config = resume({"override": True, "precision": "fp32"}, RUN | {"loss_scale": 1024.0, "fp16_opt_level": "O1"})
    assert (config.precision, config.loss_scale, config.fp16_opt_level) == ("fp32", 0.0, "O2")
    assert resume({"precision": "auto"}).precision == "fp16"                      # another processor must not change the run
    assert resume({}, RUN | {"precision": "auto"}).precision == "bf16"
    assert "the checkpoint was made with fp16" in message({"precision": "bf16"})


def test_a_resumed_run_may_get_another_length():
    assert resume({"num_epochs": 32.0}).num_steps == 500                          # batches of 64
    assert "contradict" in message({"num_epochs": 2.0, "num_steps": 50})
    assert "10 warm-up steps" in message({"num_steps": 9})
    assert "--num_steps 15: output/r/step-20.pt is already at step 20" in message({"num_steps": 15})
    assert resume({"warmup_epochs": 0.64}).warmup_steps == 10 and "--warmup_steps 8" in message({"warmup_epochs": 0.5})
    assert resume({"warmup_epochs": 0.0}, RUN | {"warmup_steps": 0, "warmup_epochs": 0.0}).warmup_steps == 0
    assert resume({"num_steps": 15, "eval_only": True}).eval_only


def test_a_teacher_or_edits_may_move_but_not_appear():
    assert "--teacher: the checkpoint's run has none" in message({"teacher": "t"})
    assert "--attention_edits: the checkpoint's run has none" in message({"attention_edits": "e"})
    assert resume({"recipe": "auto"}).recipe == "digits"


def test_an_older_checkpoint_is_read():
    """Missing settings get their old value, lists become tuples, and the recipe may no longer exist."""
    older = {name: value for name, value in RUN.items() if name not in ("confusion_matrix", "keep_checkpoints", "exact")}
    config = resume({"exact": False}, older | {"an older flag": 3})
    assert (config.keep_checkpoints, config.confusion_matrix, config.exact) == (2, False, False)
    assert set(config.to_dict()) == set(RUN)
    assert resume({"img_size": (8, 10)}, RUN | {"img_size": [8, 10]}).img_size == (8, 10)
    assert "--img_size" in message({"img_size": (10, 8)}, RUN | {"img_size": [8, 10]})
    assert resume({}, RUN | {"recipe": "a name of an older version"}).recipe == "a name of an older version"


def test_retired_settings_that_had_no_effect_are_dropped():
    assert resume({}, RUN | {"float32_matmul": "high", "precision": "fp32"}).precision == "tf32"
    for value in ("high", "medium"):
        assert resume({}, RUN | {"float32_matmul": value, "precision": "bf16"}).precision == "bf16"
    assert "--float32_matmul medium" in message({}, RUN | {"float32_matmul": "medium", "precision": "fp32"})


def test_a_script_may_name_a_folder_for_embedded_data():
    assert resume({"override": True, "data_dir": "elsewhere"}, RUN | {"dataset": "digits"}).data_dir == "elsewhere"


def test_another_number_of_processes_keeps_the_micro_batches():
    four = RUN | {"gradient_accumulation_steps": 2}
    assert resume({}, four, Facts(1000, 10, ranks=1), ranks=2).gradient_accumulation_steps == 4
    assert resume({}, four, Facts(1000, 10, ranks=4), ranks=2).gradient_accumulation_steps == 1
    arguments = {"gradient_accumulation_steps": "auto"}, four, Facts(1000, 10, ranks=1, memory=1)
    assert resume(*arguments, ranks=2).gradient_accumulation_steps == 4
    assert resume({"gradient_accumulation_steps": 1}, four, Facts(1000, 10, ranks=2), ranks=2).gradient_accumulation_steps == 1
    assert "change --gradient_accumulation_steps (GRAD_STEPS) or the number of processes" in message(
        {}, four, Facts(1000, 10, ranks=3), ranks=2)
    assert "--exact: the run has 4 micro-batches a step, and 2 processes x 4 micro-steps make 8" in message(
        {"gradient_accumulation_steps": 4}, four | {"exact": True}, Facts(1000, 10, ranks=2), ranks=2)


def test_sources_of_a_resumed_runs_settings():
    sources = choose({"data_dir": "moved", "num_epochs": 3.0}, RUN | {"dataset": "folder", "pretrained_dir": "w.npz"})
    assert (sources.dataset, sources.data_dir, sources.start) == ("folder", "moved", "none")
    assert "val or test, are also the test set" in message({"test": "never"}, facts=Facts(1000, 10, test_is_val=True))


def test_changes_are_listed():
    def listed(flags: dict, ranks=1, **more):
        config = resume(flags, facts=Facts(1000, 10, ranks=ranks), **more)
        return changes(config, Saved(more.get("config", RUN), more.get("step", 20), 1000, 1, "p"), ranks)

    assert listed({}) == listed({"num_workers": None, "name": "r", "eval_only": True}) == []
    assert listed({"num_epochs": 32.0, "log_dir": "board"}) == [
        "changed: --log_dir board (was logs)",
        "changed: --num_steps 500 (was 100); the learning-rate schedule is recomputed for the new length"]
    assert listed({"num_steps": 110}, config=RUN | {"decay_type": "step", "decay_milestones": (5,)}) == [
        "changed: --num_steps 110 (was 100); the milestones of the learning rate stay"]
    assert listed({"pretrained_dir": "x"}) == ["--pretrained_dir is not used, since --resume_path is given"]
    assert listed({"override": True, "seed": 1}) == ["changed: --seed 1 (was 42)"]
    assert listed({"resume_path": "auto", "name": "other"}) == []
    assert listed({}, ranks=2, config=RUN | {"gradient_accumulation_steps": 2}) == [
        "changed: 2 processes (were 1), 1 micro-steps each (were 2)"]
    assert listed({}, step=100) == ["nothing is left to train. To train longer, resume with a larger --num_steps (NUM_STEPS)"]
