"""Whole runs of train.py: what they write, what only a whole run can show, and bad input."""

import functools
import gzip
import importlib.util
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from runs import FOLDER, differences, events_of, load_state, make_tree, state_of

import train
from models import create_model, save_npz
from utils.data import loader
from utils.data.splits import ImageError
from utils.files import StorageError
from utils.report import plots
from utils.run import checkpoint
from utils.training import trainer

# ------------------------------------------------------------------------------------------------ what a run writes


def test_a_run_writes_the_files_that_the_readme_names(run_train, capsys):
    assert run_train("--num_steps", 5, "--eval_every", 2) == 0
    folder = Path("output/digits")
    files = sorted(path.name for path in folder.iterdir())
    assert files == [".lock", "batch.png", "best.pt", "config.json", "curves.png", "log.jsonl", "mistakes.csv",
                     "step-00000004.pt", "step-00000005.pt"]
    assert list(Path("logs/digits").iterdir())
    content = json.loads((folder / "config.json").read_text())
    assert content["config"]["num_steps"] == 5 and content["config"]["learning_rate"] == 1e-3
    assert content["architecture"]["hidden_size"] == 64 and content["versions"]["torch"] == torch.__version__
    events = events_of(kinds=("start", "train", "eval", "end"))
    assert [(event["event"], event["step"], event.get("split")) for event in events] == [
        ("start", 0, None), ("eval", 0, "test"), ("train", 1, None), ("train", 2, None), ("eval", 2, "val"),
        ("train", 3, None), ("train", 4, None), ("eval", 4, "val"), ("train", 5, None), ("eval", 5, "val"),
        ("eval", 5, "test"), ("end", 5, None)]
    assert events[1]["images"] == 60 and events[4]["images"] == 40
    printed = capsys.readouterr().out
    for words in ("test accuracy", "before", "after", "output/digits/step-00000005.pt", "output/digits/curves.png",
                  "--logdir logs\n", "Next:", "predict.py output/digits PHOTOS", "export.py output/digits --to folder"):
        assert words in printed, words


def test_where_and_how_often_a_run_writes(run_train):
    assert run_train("--output_dir", "a/b c", "--log_dir", "events") == 0
    assert run_train("--output_dir", "a/b c", "--log_dir", "events", "--num_steps", 7, "--eval_every", 3, "--save_every", 2,
                     "--keep_checkpoints", 3) == 0
    assert sorted(path.name for path in Path("a/b c").iterdir()) == ["digits", "digits-2"]        # each unnamed run has its own
    assert list(Path("events/digits-2").iterdir())
    assert [event["step"] for event in events_of("a/b c/digits-2") if event.get("split") == "val"] == [3, 6, 7]
    assert [path.name for path in checkpoint.step_files(Path("a/b c/digits-2"))] == [
        "step-00000007.pt", "step-00000006.pt", "step-00000004.pt"]


def test_best_is_the_best_evaluation(run_train):
    """best.pt has the lowest loss of the evaluations within one image of the highest accuracy."""
    assert run_train("--num_steps", 12, "--eval_every", 3, "--learning_rate", 0.01) == 0
    best = load_state(Path("output/digits/best.pt"))
    evaluations = [event for event in events_of() if event.get("split") == "val"]
    highest = max(event["accuracy"] for event in evaluations)
    chosen = min((event for event in evaluations if event["accuracy"] > highest - 1.5 / 40), key=lambda event: event["loss"])
    assert best.best == {"step": best.step, "accuracy": chosen["accuracy"]} and best.step == chosen["step"]
    assert state_of().best == best.best


def test_eval_only_repeats_the_evaluation_and_writes_nothing(run_train, capsys, tmp_path):
    """For the run itself and for its model exported to Google's layout, whose head is kept. The interval is that of 60 images."""
    assert run_train("--num_steps", 8, "--learning_rate", 0.01) == 0
    before = {path: path.read_bytes() for path in Path("output").rglob("*") if path.is_file()}
    expected = [event for event in events_of() if event.get("split") == "test"][-1]
    model = create_model("ViT-Nano_2", 10)
    model.load_state_dict(state_of().model)
    save_npz(model, tmp_path / "model.npz")
    for start in (["--resume_path", "output/digits", "--num_steps", 99], ["--pretrained_dir", tmp_path / "model.npz"]):
        capsys.readouterr()
        assert run_train("--eval_only", *start) == 0
        printed = capsys.readouterr().out
        assert f"test accuracy {expected['accuracy']:.2%}" in printed and "step 9" not in printed
        assert "(60 images, one is 1.7%; 95% interval " in printed and "was chosen on" not in printed
    assert before == {path: path.read_bytes() for path in Path("output").rglob("*") if path.is_file()}


def test_an_image_and_its_mirror_image_are_evaluated_together(run_train, capsys):
    """During and after training, unless a flag says otherwise."""
    assert run_train("--num_steps", 8, "--learning_rate", 0.01, "--tta", "flip") == 0
    expected = [event for event in events_of() if event.get("split") == "test"][-1]
    printed = []
    for flags in ([], ["--tta", "none", "--override"]):
        capsys.readouterr()
        assert run_train("--eval_only", "--resume_path", "output/digits", *flags) == 0
        printed.append(f"loss {expected['loss']:.4f}" in capsys.readouterr().out)
    assert printed == [True, False]


def test_tables_by_class_and_the_training_accuracy_are_written(run_train, capsys):
    """--confusion_matrix and --eval_train, during a run and with --eval_only."""
    assert run_train("--confusion_matrix", "--eval_train") == 0
    rows = [line.split(",") for line in Path("output/digits/confusion.csv").read_text().splitlines()]
    assert rows[0][1:] == list("0123456789") and sum(int(cell) for row in rows[1:] for cell in row[1:]) == 60
    assert len(Path("output/digits/per_class.csv").read_text().splitlines()) == 11
    event, = (event for event in events_of() if event.get("split") == "train")
    assert (event["step"], event["images"]) == (4, 1097)
    capsys.readouterr()
    assert run_train("--eval_only", "--eval_train", "--resume_path", "output/digits") == 0
    assert f"train accuracy {event['accuracy']:.2%}" in capsys.readouterr().out


def test_eval_only_does_not_repeat_flags_of_the_run(run_train, tmp_path, capsys):
    """The tables that the run wrote at its end stay. Those of the evaluation are named after the checkpoint."""
    assert run_train("--confusion_matrix", "--eval_train", "--eval_every", 2, "--learning_rate", 0.1) == 0
    model = create_model("ViT-Nano_2", 10)
    model.load_state_dict(state_of().model)
    save_npz(model, tmp_path / "other.npz")
    Path("confusion.csv").write_text("mine")
    before = {path: path.read_bytes() for path in Path(".").rglob("*.csv")}
    capsys.readouterr()
    assert run_train("--eval_only", "--resume_path", "output/digits/best.pt") == 0
    printed = capsys.readouterr().out
    best = load_state("output/digits/best.pt").step
    assert printed.startswith(f"evaluating output/digits/best.pt (step {best})\n") and "resuming" not in printed
    assert "train accuracy" not in printed and "wrote" not in printed and "changed:" not in printed
    for start, folder, name in ((["--resume_path", "output/digits/best.pt"], "output/digits", "best"),
                                (["--resume_path", "output/digits"], "output/digits", "step-00000004"),
                                (["--pretrained_dir", "output/digits"], "output/digits", "best"),
                                (["--pretrained_dir", tmp_path / "other.npz"], "output", "other")):
        assert run_train("--eval_only", *start, "--confusion_matrix") == 0
        printed = capsys.readouterr().out
        assert printed.startswith("evaluating ") and printed.endswith(
            f"  wrote {folder}/confusion-{name}.csv\n  wrote {folder}/per_class-{name}.csv\n")
    assert before == {path: path.read_bytes() for path in before} and len(list(Path(".").rglob("*.csv"))) == len(before) + 6


def test_the_summary_is_printed_although_a_picture_cannot_be_written(run_train, monkeypatch, capsys):
    def no_room(figure, path):
        raise StorageError(f"cannot write {path} (No space left on device)")

    with monkeypatch.context() as patch:
        patch.setattr(plots, "save", no_room)
        assert run_train() == 3
    printed = capsys.readouterr()
    assert "Done: step 4 of 4" in printed.out and "Next:" in printed.out
    line, = (line for line in printed.err.splitlines() if "error" in line)
    assert "cannot write output/digits/curves.png" in line and line.endswith("--resume_path output/digits")
    assert run_train("--resume_path", "output/digits") == 0 and Path("output/digits/curves.png").exists()


def test_when_the_test_split_is_evaluated(run_train, capsys):
    expected = {"always": [(0, "test"), (4, "val"), (4, "test")], "once": [(0, "val"), (4, "val"), (4, "test")],
                "never": [(0, "val"), (4, "val")]}
    for choice, evaluations in expected.items():
        assert run_train("--test", choice, "--name", choice) == 0
        assert [(event["step"], event["split"]) for event in events_of(f"output/{choice}", ("eval",))] == evaluations
    expected = [event for event in events_of("output/never") if event.get("split") == "val"][-1]
    assert run_train("--test", "never", "--name", "still", "--eval_every", 2, "--learning_rate", 1e-12) == 0     # best: step 2
    for run, warns in (("still", True), ("never", False)):                # the last step was not chosen
        for of_run in (["--resume_path", f"output/{run}/best.pt"], ["--pretrained_dir", f"output/{run}", "--test", "never"]):
            capsys.readouterr()
            assert run_train("--eval_only", *of_run) == 0
            printed = capsys.readouterr().out
            warning = "best.pt was chosen on these images, so on new ones it is probably a little less accurate\n"
            assert (warning in printed) is warns
    assert f"val accuracy {expected['accuracy']:.2%}" in printed and "test accuracy" not in printed
    make_tree(Path("tree"))
    assert run_train(*FOLDER, "--test", "once", "--eval_every", 2, "--name", "folder") == 0
    assert [event["step"] for event in events_of("output/folder", ("eval",))] == [4]
    assert run_train("--resume_path", "output/folder", "--num_steps", 6) == 0
    assert [event["step"] for event in events_of("output/folder", ("eval",))] == [4, 6]


# ----------------------------------------------------------------------------------- what only a whole run can show


def test_the_averaged_weights_are_evaluated_and_loaded(run_train, capsys):
    """--ema_decay does not change the trained weights."""
    flags = ["--learning_rate", 0.01, "--num_steps", 8, "--eval_every", 4]
    assert run_train(*flags, "--name", "plain") == run_train(*flags, "--name", "averaged", "--ema_decay", 0.9) == 0
    plain, averaged = state_of("output/plain"), state_of("output/averaged")
    assert plain.ema == {} and not differences(plain.model, averaged.model) and differences(averaged.model, averaged.ema)
    losses = [events_of(f"output/{name}", ("eval",))[-1]["loss"] for name in ("plain", "averaged")]
    assert losses[0] != losses[1]
    for start in ("--resume_path", "output/averaged"), ("--pretrained_dir", "output/averaged/step-00000008.pt"):
        capsys.readouterr()
        assert run_train("--eval_only", *start) == 0
        assert f"loss {losses[1]:.4f}" in capsys.readouterr().out


def test_a_run_that_diverges_names_step_samples_and_the_last_good_checkpoint(run_train, capsys):
    diverging = ["--learning_rate", 1e25, "--optimizer", "sgd", "--warmup_steps", 0, "--max_grad_norm", 0]
    assert run_train("--name", "r", *diverging) == 4
    printed = capsys.readouterr().err
    assert " at learning rate " in printed and "; samples " in printed and "none yet" in printed and printed.count("\n") == 1
    event, = events_of("output/r", ("diverged",))
    assert len(event["samples"]) == 16 and f"step {event['step']}: " in printed
    assert [event["step"] for event in events_of("output/r", ("train",))] == list(range(1, event["step"]))
    assert run_train("--name", "r", "--num_steps", 2, "--optimizer", "sgd") == 0       # nothing to resume: the name is free
    capsys.readouterr()
    assert run_train("--resume_path", "output/r", "--num_steps", 6, "--override", *diverging[:2], *diverging[4:]) == 4
    assert "step-00000002.pt" in capsys.readouterr().err
    assert all(value.isfinite().all() for value in state_of("output/r").model.values())


@pytest.mark.parametrize(("function", "flags", "line"), [
    ("utils.build.model.create_model", [], "setting up: out of memory; what a run needs with any batch size (model, "),
    ("utils.build.trainer.warm_up", ["--compile"], "compiling for 16 images a micro-step: out of memory; lower --train_bat"),
    ("utils.run.run.evaluate", [], "evaluation on test after step 0: out of memory; lower --eval_batch_size"),
    ("utils.training.evaluation.evaluate", ["--eval_only", "--pretrained_dir", "model.npz"],
     "evaluation on test: out of memory; lower --eval_batch_size"),
    ("utils.run.saver.Saver.save", [], "saving step 4: out of memory; a checkpoint is copied before it is written"),
    ("utils.report.summary.print_summary", [], "after the last step: out of memory; the run is done and saved"),
    ("utils.training.trainer.Trainer._backward", [], "step 1: out of memory; lower --train_batch_size, or raise --gradient_")])
def test_an_out_of_memory_error_names_the_flag_to_lower(run_train, monkeypatch, capsys, function, flags, line):
    def fail(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("utils.build.model.compile_model", lambda model, device: None)
    save_npz(create_model("ViT-Nano_2", 10), "model.npz")
    monkeypatch.setattr(function, fail)
    assert run_train("--name", "r", *flags) == 6
    assert capsys.readouterr().err.startswith(f"train.py: error: {line}")


def test_unreadable_images_stop_the_run_or_are_skipped(run_train, capsys):
    image = make_tree(Path("tree")) / "train" / "bee" / "2.png"
    image.write_bytes(image.read_bytes()[:40])
    flags = [*FOLDER, "--num_epochs", 1, "--num_workers", 1]
    assert run_train("--name", "stop", *flags) == 2
    printed = capsys.readouterr().err
    assert "tree/train/bee/2.png" in printed and printed.count("\n") == 1
    assert run_train("--name", "few", *flags, "--bad_images", "skip") == 2
    printed = capsys.readouterr().err
    assert "1 of 12 training images" in printed and "bad_images.txt" in printed
    assert run_train("--name", "skip", *flags, "--bad_images", "skip", "--max_bad_images", 0.1) == 0
    printed = capsys.readouterr().out
    assert "warning: replaced by the next readable image: tree/train/bee/2.png" in printed
    assert "1 training image was replaced: output/skip/bad_images.txt" in printed
    listed, = Path("output/skip/bad_images.txt").read_text().splitlines()
    assert listed.startswith("tree/train/bee/2.png: ")


@pytest.mark.parametrize("late", [False, True])
def test_the_step_before_an_unreadable_image_is_logged(run_train, monkeypatch, late):
    """Also if its metrics are read one step later, as on a GPU."""
    make_tree(Path("tree"))
    real = loader.Loader.__iter__

    def fail_in_step_3(self):
        for number, batch in enumerate(real(self)):
            if number == 3 and batch.keys[0].step == 3:
                raise ImageError("cannot be read")
            yield batch

    monkeypatch.setattr(trainer.Trainer, "__init__", functools.partialmethod(trainer.Trainer.__init__, late=late))
    monkeypatch.setattr(loader.Loader, "__iter__", fail_in_step_3)
    assert run_train(*FOLDER, "--num_steps", 9, "--eval_every", 9, "--save_every", 9, "--name", "r") == 2
    assert [event["step"] for event in events_of("output/r", ("train",))] == [1, 2, 3]


def test_profile_writes_a_trace(run_train, capsys):
    assert run_train("--name", "r", "--profile") == 0 and "output/r/trace.json.gz" in capsys.readouterr().out
    with gzip.open("output/r/trace.json.gz") as stream:
        assert {"aten::addmm", "Optimizer.step#AdamW.step"} <= {event["name"] for event in json.load(stream)["traceEvents"]}


def test_one_size_is_compiled_for_training_and_one_for_evaluation(run_train, monkeypatch, capsys):
    """With a stand-in for the compiler. The next test compiles."""
    sizes = []

    def record(model, images):
        assert images.is_contiguous()              # another memory layout would be compiled separately
        sizes.append((model.training, len(images)))
        return model.forward(images)

    def stand_in(self, **options):
        assert options == {"dynamic": False}
        self._compiled_call_impl = lambda images: record(self, images)

    monkeypatch.setattr(torch.nn.Module, "compile", stand_in)
    monkeypatch.setattr(torch, "compile", lambda function: function)
    flags = ["--ema_decay", 0.5, "--train_batch_size", 16, "--gradient_accumulation_steps", 2, "--eval_batch_size", 30]
    assert run_train("--compile", "--mixup_alpha", 0.5, *flags) == 0
    printed = capsys.readouterr()
    for size in ("8 images a micro-step", "30 images an evaluation batch"):
        assert len(re.findall(f"compiled in .* for {size}", printed.out + printed.err)) == 1
    assert set(sizes) == {(True, 8), (False, 30)}                  # neither split is a multiple of 30 images
    monkeypatch.setattr(torch, "compile", lambda function: (_ for _ in ()).throw(RuntimeError("no compiler\nat all")))
    assert run_train("--compile") == 2
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1 and "(RuntimeError: no compiler)" in printed


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="PyTorch compiles with g++ on a CPU")
def test_a_compiled_run_learns_the_same(run_train, tries):
    if not tries(0, 1):
        pytest.skip("a minute of compiling: with --full")
    shared = ["--num_steps", 4, "--num_layers", 1, "--hidden_size", 32, "--mlp_dim", 32, "--num_heads", 2, "--precision", "fp32",
              "--dropout_rate", 0, "--test", "once", "--save_every", 2]
    assert run_train("--name", "plain", *shared) == run_train("--name", "compiled", "--compile", *shared) == 0
    plain, compiled = (torch.tensor([event["loss"] for event in events_of(f"output/{name}")])
                       for name in ("plain", "compiled"))
    torch.testing.assert_close(compiled, plain, rtol=1e-4, atol=0)


def test_wandb_gets_the_metrics_and_its_key_reaches_no_file(run_train, monkeypatch, capsys):
    """With a stand-in for the package."""
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    Path("wandb.py").write_text(WANDB)
    monkeypatch.syspath_prepend(Path.cwd())
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    assert run_train("--wandb", "project") == 2 and "WANDB_API_KEY" in capsys.readouterr().err
    monkeypatch.setenv("WANDB_API_KEY", "a-secret-key")
    assert run_train("--wandb", "project", "--name", "r") == 0
    sent = [json.loads(line) for line in Path("sent.jsonl").read_text().splitlines()]
    assert sent[0]["project"] == "project" and sent[0]["name"] == "r" and sent[0]["config"]["num_steps"] == 4
    assert [figures["step"] for figures in sent if "train/loss" in figures] == [1, 2, 3, 4]
    assert any("val/accuracy" in figures for figures in sent) and sent[-1] == {"finished": True}
    assert run_train("--resume_path", "output/r", "--num_steps", 5) == 0
    again = [json.loads(line) for line in Path("sent.jsonl").read_text().splitlines()][len(sent):]
    assert again[0]["id"] == sent[0]["id"] and again[0]["resume"] == "allow"
    for path in (path for path in Path(".").rglob("*") if path.is_file()):
        assert b"a-secret-key" not in path.read_bytes(), path


WANDB = """
import json

def note(content):
    with open("sent.jsonl", "a") as stream:
        stream.write(json.dumps(content, default=str) + "\\n")

class Run:
    def log(self, figures, step):
        note(figures | {"step": step})

    def finish(self):
        note({"finished": True})

def init(**settings):
    note(settings)
    return Run()
"""


# ------------------------------------------------------------------ bad input: one line, exit code 2, no run folder

REFUSED = {
    "unknown flag": (["--learning_rat", 0.1], "--learning_rat"),
    "a page for a checkpoint": (["--pretrained_dir", "page.pt"], "page.pt"),
    "a file of other things": (["--pretrained_dir", "run.pt"], "not a Vision Transformer"),
    "weights of another model": (
        ["--pretrained_dir", "start.npz", "--model_type", "ViT-Ti_16", "--img_size", 16], "--model_type"),
    "wrong head": (["--pretrained_dir", "start.npz", "--eval_only"], "3 classes, the data 10"),
    "a head of other classes": (["--head", "keep", "--pretrained_dir", "start.npz"], "--head keep: the head of start.npz has 3"),
    "different classes": (["--dataset", "folder", "--data_dir", "differ"], "wasp"),
    "nothing to evaluate": ([*FOLDER, "--test", "never"], "--val_fraction"),
    "class weights of other classes": (["--class_weights", "1,2"], "--class_weights has 2"),
    "nothing to resume": (["--resume_path", "output/none"], "output/none"),
    "TensorBoard below a file": (["--log_dir", "page.pt"], "page.pt"),
    "output below a file": (["--output_dir", "page.pt/x"], "page.pt"),
    "no such layer": (["--sigmoid_attention", "5"], "the model has 4 layers"),
    "a pattern that fits nothing": (["--freeze", "pos_embed,block.*"], "'block.*'"),
}


def test_bad_input_is_reported_in_one_line_with_exit_code_2(run_train, capsys):
    Path("page.pt").write_bytes(b"<html>404</html>" * 100)
    save_npz(create_model("ViT-Nano_2", 3), "start.npz")
    torch.save({"weights": torch.zeros(3)}, "run.pt")
    make_tree(Path("tree"))
    make_tree(Path("differ"))
    Path("differ/val/bee").rename("differ/val/wasp")
    for case, (flags, words) in REFUSED.items():
        capsys.readouterr()
        assert run_train(*flags) == 2, case
        printed = capsys.readouterr().err
        assert printed.startswith("train.py: error: ") and printed.count("\n") == 1 and words in printed, (case, printed)
        assert not Path("output").exists() or not list(Path("output").rglob("*.pt")), case


def test_other_classes_are_refused(run_train, capsys):
    """For the head that is evaluated and for a teacher. Teachers that cannot be used are refused too."""
    assert run_train("--name", "r") == run_train("--name", "grey", "--in_channels", 1) == 0
    make_tree(Path("tree"), classes=tuple("abcdefghij"))
    Path("empty").mkdir()
    Path("page.pt").write_text("<html>404</html>" * 100)
    hard = ["--model_type", "ViT-Nano_2", "--distillation", "hard", "--teacher"]
    for flags, words in (([*FOLDER, "--eval_only", "--pretrained_dir", "output/r"], "not the same task"),
                         ([*hard, "output/r", "--dataset", "folder", "--data_dir", "tree"], "not the same task"),
                         ([*hard, "no/such"], "no/such"), ([*hard, "empty"], "no intact checkpoint"),
                         ([*hard, "page.pt"], "page.pt"), ([*hard, "output/grey"], "takes gray images")):
        capsys.readouterr()
        assert run_train(*flags, "--name", "s") == 2, flags
        printed = capsys.readouterr().err
        assert words in printed and printed.count("\n") == 1, printed
    assert not Path("output/s").exists()


EARLY = [        # flags, and words of the error
    (["--nonsense"], "unrecognized arguments: --nonsense"), (["--batch-size", "8"], "--batch"),
    (["--dataset", "CIFAR10"], "Did you mean cifar10?"), (["--model", "vit_base_patch_16"], "Did you mean ViT-B_16?"),
    (["--model_type", "beitv2_base_patch16_224"], "it has positions relative to each pair of patches"),
    (["--pretrained_dir", "mirror/vit-base-patch16-224"], "Did you mean imagenet21k/ViT-B_16?"),
    (["--recipe", "MAE"], "Did you mean mae?"), (["--recipe", "nosuch"], "--recipe must be auto"),
    (["--num_stepss", "3"], "unrecognized arguments: --num_stepss"),
    (["--dataset", "folder", "--data_dir", "no/such"], "--data_dir no/such: no such folder"),
    (["--pretrained_dir", "w.npz"], "--pretrained_dir w.npz: no such file or folder (searched in "),
    (["--pretrained_dir", "deit/deit_huge"], "--pretrained_dir deit/deit_huge: no such file or folder"),
    (["--distillation", "hard", "--teacher", "gone"], "--teacher gone: no such file or folder (searched in "),
    (["--output_dir", "train.sh/x"], "train.sh is a file, not a folder"),
    *([] if importlib.util.find_spec("timm") else [(["--optimizer", "lamb"], "--optimizer lamb needs timm")])]


def test_wrong_flags_and_names_are_refused_before_torch_is_loaded():
    code = (f"import sys, train; codes = {{train.main(words) for words in {[words for words, _ in EARLY]}}}; "
            "sys.exit(1 if {'torch', 'numpy'} & sys.modules.keys() else max(codes))")
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(train.__file__).parent, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    lines = done.stderr.splitlines()
    assert len(lines) == len(EARLY) and all(words in line for line, (_, words) in zip(lines, EARLY)), done.stderr


def test_a_run_as_a_start_sets_the_architecture(run_train, capsys):
    """Its sizes, number of heads and image size. Flags that contradict it are refused, also if the shapes are the same."""
    own = ["--patch_size", 4, "--hidden_size", 32, "--num_layers", 2, "--mlp_dim", 48, "--num_heads"]
    assert run_train("--name", "r", "--img_size", "8x12", *own, 8) == 0
    make_tree(Path("tree"))
    assert run_train("--dataset", "folder", "--data_dir", "tree", "--pretrained_dir", "output/r", "--name", "s") == 0
    assert state_of("output/s").config["num_heads"] == 8 and state_of("output/s").config["img_size"] == (8, 12)
    assert "arrays from output/r/best.pt; new: head; the file's head is not used" in capsys.readouterr().out
    assert run_train("--pretrained_dir", "output/r", "--model_type", "ViT-Nano_2", *own, 4) == 2
    assert "a run's checkpoint sets the architecture: omit --model_type (MODEL_TYPE), --num_heads" in capsys.readouterr().err
    assert run_train("--pretrained_dir", "output/r", "--model_type", "ViT-S_16", "--num_heads", 8) == 2
    assert "omit --model_type (MODEL_TYPE), --num_heads" in capsys.readouterr().err


def test_the_detected_layout_of_the_data_is_printed_and_used(run_train, capsys):
    make_tree(Path("tree/pets"), splits=("Train", "Testing"))
    Path("tree/pets/Train/ant/x.avif").touch()
    flags = [*FOLDER, "--num_steps", 2]
    assert run_train(*flags) == 0
    printed = capsys.readouterr().out
    assert "using: pets/Train/ to train on, pets/Testing/ to test on (in tree)\nbest.pt is chosen on the test set" in printed
    assert "warning: skipped because of their extension: 1 .avif" in printed
    Path("tree/pets/Train").rename("train_of_tree")
    assert run_train(*flags) == 2 and "contains Testing/ (2 folders) but no train/" in capsys.readouterr().err
    assert run_train("--eval_only", "--resume_path", "output/tree") == 0
    assert "data: tree, 2 classes, 12 test\nusing: pets/Testing/ to evaluate" in capsys.readouterr().out
    assert run_train(*flags, "--data_dir", "train_of_tree", "--val_fraction", 0.25, "--test", "never", "--name", "share") == 0
    assert "12 images to train on" not in (printed := capsys.readouterr().out) and "val accuracy" in printed
    assert [event["split"] for event in events_of("output/share", ("eval",))] == ["val", "val"]
