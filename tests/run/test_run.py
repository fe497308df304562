"""What a run evaluates, logs and saves, and when. The trainer only counts steps, and the results of evaluations are given."""

import types
from pathlib import Path
from unittest import mock

import pytest
import torch
from building import ALONE
from runs import events_of, load_state
from torch import nn

from configs import MODELS
from utils import launch
from utils.config import Facts, parse, resolve
from utils.data.sampler import StepSampler
from utils.files import StorageError
from utils.run import checkpoint, folder
from utils.run import run as run_module
from utils.run.run import Run
from utils.run.saver import Saver
from utils.training.evaluation import EvalMetrics
from utils.training.step import Progress, StepMetrics

VAL, TEST, TRAIN = (types.SimpleNamespace(name=name, images=name) for name in ("val", "test", "train"))
CONSTANT = {"architecture": MODELS["ViT-Nano_2"].to_dict(), "classes": ["a", "b"], "train_images": 8, "rules": checkpoint.RULES}


class CountingTrainer:
    """Only counts steps."""

    def __init__(self, step: int):
        self.progress, self.module, self.ema, self.finish = Progress(step, step), nn.Linear(1, 1), None, list
        self.eval_model = self.normalize = self.precision = None
        self.optimizer, self.scaler = torch.optim.SGD(self.module.parameters()), types.SimpleNamespace(state_dict=dict)

    step = property(lambda self: self.progress.step)

    def train_step(self) -> list[StepMetrics]:
        self.progress = Progress(self.step + 1, self.step + 1)
        return [StepMetrics(self.step, 1.0, 0.5, 0.1, 1.0, None, False, 2, 1.0, 0.0)]


class Session:
    """The loop of train.train. `evaluated` and `saved` list (step, what). `stop_in` is the evaluation that a stop interrupts.

    `accuracies` (of 4 images) and `losses` are the results of evaluations, by default 0.5 and 1.
    """

    def __init__(self, *flags, parts=(TEST, VAL, TEST), accuracies=None, losses=None, stop_in=None, resume=False):
        self.evaluated, self.saved, self.accuracies, self.stop_in = [], [], accuracies or {}, stop_in
        self.losses = losses or {}
        config = resolve(parse(["--num_steps", "4", "--eval_every", "2", "--pretrained_dir", "none", *flags]), Facts(8, 2))
        source = checkpoint.open_newest(Path("r")) if resume else None
        state, best = source and source.state(), folder.resume(source, None, None)[1] if resume else {}
        if not resume:
            folder.create(".", "r", "r")
            folder.write_config(Path("r"), config.to_dict(), {}, 1)
        stop = types.SimpleNamespace(saves=False, requested=lambda: self.stop_in in self.evaluated)
        run, trainer = Run(config, state, source, ALONE, stop), CountingTrainer(state.step if state else 0)
        self.run, self.trainer, run.history.best = run, trainer, best
        data = types.SimpleNamespace(evaluated_before=parts[0], watched=parts[1], final=parts[2], train=TRAIN,
                                     splits=types.SimpleNamespace(classes=("a", "b")),
                                     eval_loader=lambda images: images, on_compiled=None)
        sampler, constant = StepSampler(8, 2, 1, 0, 1, 0, trainer.step, 4), CONSTANT | {"config": config.to_dict()}
        save = Saver.save

        def note(saver, paths, state):
            self.saved.append((state.step, [path.stem for path in paths]))
            save(saver, paths, state)

        with mock.patch.object(run_module, "evaluate", self.evaluate), mock.patch.object(Saver, "save", note), run.opened(
                Path("r"), Path("logs"), constant, trainer, sampler, "settings:"):
            while True:
                run.evaluate_if_due(trainer, data)
                run.save_if_due(trainer)
                if trainer.step == run.config.num_steps or run.stop_requested:
                    break
                steps = trainer.train_step()
                run.log_steps(steps)
                run.follow_requests(steps, trainer)
            if not run.stop_requested:
                run.finish(trainer, data)
            if run.stop_requested:
                run.stop_early(trainer)

    def evaluate(self, model, name, *_, stop_requested, **__) -> EvalMetrics | None:
        self.evaluated.append((self.trainer.step, name))
        accuracy, loss = self.accuracies.get(self.evaluated[-1], 0.5), self.losses.get(self.evaluated[-1], 1.0)
        return None if stop_requested() else EvalMetrics(4, loss, accuracy, 1, 1, 1, 1, 0.5, 0.1)


def logged() -> list[tuple]:
    return [(event["step"], event["split"]) for event in events_of("r", ("eval",))]


def best_of(file: str) -> dict:
    return load_state(Path("r", file)).best


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(("flags", "parts", "expected"), [
    ([], (TEST, VAL, TEST), [(0, "test"), (2, "val"), (4, "val"), (4, "test")]),                       # --test always
    ([], (VAL, VAL, TEST), [(0, "val"), (2, "val"), (4, "val"), (4, "test")]),                         # once
    ([], (VAL, VAL, VAL), [(0, "val"), (2, "val"), (4, "val")]),                                       # never
    ([], (TEST, TEST, TEST), [(0, "test"), (2, "test"), (4, "test")]),                                 # always, without val
    ([], (None, None, TEST), [(4, "test")]),                                                           # once, without val
    (["--eval_every", "3", "--eval_train"], (None, VAL, VAL), [(3, "val"), (4, "val"), (4, "train")])])
def test_each_evaluation_is_made_and_logged_once(flags, parts, expected):
    session = Session(*flags, parts=parts, accuracies={(4, parts[2].name): 0.9})
    assert session.run.history.result.accuracy == 0.9 and not session.run.stop_requested
    assert session.evaluated == logged() == expected
    assert session.run.history.first.get("split") == (parts[0] and parts[0].name)
    again = Session(*flags, parts=parts, resume=True)                       # does not train, only repeats the result
    assert again.evaluated == [(4, parts[2].name)] and logged() == expected


def test_the_best_is_saved_with_its_step():
    session = Session("--save_every", "3", accuracies={(2, "val"): 0.7, (4, "val"): 0.6})
    assert session.saved == [(2, ["best"]), (3, ["step-00000003"]), (4, ["step-00000004"])]
    assert best_of("step-00000004.pt") == best_of("best.pt") == {"step": 2, "accuracy": 0.7}


def validations(*pairs) -> dict:
    """Return the arguments of a Session for (correct of 4 images, loss) of val after step 1, 2, ..."""
    return {"accuracies": {(step, "val"): hits / 4 for step, (hits, _) in enumerate(pairs, start=1)},
            "losses": {(step, "val"): loss for step, (_, loss) in enumerate(pairs, start=1)}}


EACH = ("--num_steps", "6", "--eval_every", "1", "--save_every", "2")
# Step 1 is the first best; step 2 has the highest accuracy but is worse; step 4 is within one image of step 1 but two images
# below step 2; step 5 has the lowest loss.
DRIFT = validations((3, 0.5), (4, 0.9), (2, 0.3), (2, 0.2), (3, 0.4), (4, 0.8))


def test_within_one_image_of_the_highest_accuracy_the_loss_decides():
    session = Session(*EACH, **DRIFT)
    assert [step for step, files in session.saved if "best" in files] == [1, 5] and best_of("best.pt")["step"] == 5
    assert best_of("step-00000004.pt") == {"step": 1, "accuracy": 0.75}


@pytest.mark.parametrize("step", range(1, 7))
def test_the_choice_survives_a_resume(step):
    """The highest accuracy is not stored in best.pt. It is read from the log."""
    Session(*EACH, **DRIFT, stop_in=(step, "val"))
    assert best_of_all(Session(*EACH, **DRIFT, resume=True)) == {"step": 5, "accuracy": 0.75}


def best_of_all(session: Session) -> dict:
    assert not session.run.stop_requested and best_of("step-00000006.pt") == best_of("best.pt")
    return best_of("best.pt")


@pytest.mark.parametrize(("pairs", "steps", "again"), [
    (((2, 0.5), (3, 0.9), (4, 1.0)), [1, 3], [2, 3]),        # step 3 replaces step 2, as if that had not been written
    (((4, 0.5), (2, 0.8), (2, 0.7), (3, 0.9)), [1], [2, 3, 4])], ids=["made again", "lost"])
def test_a_lost_best_is_replaced(pairs, steps, again):
    """After a kill best.pt may belong to a later step than the newest checkpoint. The run ends with the best.pt of an
    uninterrupted run or, if its weights are lost, with the best of the later evaluations."""
    pairs = validations(*pairs)
    whole = Session(*EACH, **pairs)
    Path("r").rename("whole")
    Session(*EACH, **pairs, stop_in=(2, "val"))
    Path("r/best.pt").unlink()
    resumed = Session(*EACH, **pairs, resume=True)
    for session, expected in ((whole, steps), (resumed, again)):
        assert [step for step, files in session.saved if "best" in files] == expected


def test_a_run_of_an_earlier_version_keeps_its_rule(monkeypatch):
    """The rule was: any higher accuracy is better, whatever the loss."""
    monkeypatch.setitem(CONSTANT, "rules", 2)
    Session(*EACH, **DRIFT, stop_in=(1, "val"))
    session = Session(*EACH, **DRIFT, resume=True)
    assert [step for step, files in session.saved if "best" in files] == [1, 2] and best_of_all(session)["step"] == 2


def test_after_a_failed_save_a_later_evaluation_may_be_the_best(monkeypatch):
    real, failed = checkpoint.save, []

    def save(path, state):
        if path.name == "best.pt" and not failed:
            failed.append(path)
            raise StorageError("no room")
        real(path, state)

    monkeypatch.setattr(checkpoint, "save", save)
    session = Session("--keep_checkpoints", "9", accuracies={(2, "val"): 0.9, (4, "val"): 0.6})
    assert session.saved == [(number, ["best", f"step-0000000{number}"]) for number in (2, 4)] and failed
    assert best_of("best.pt") == {"step": 4, "accuracy": 0.6} and best_of("step-00000002.pt") == {}


@pytest.mark.parametrize("stopped", [(0, "test"), (2, "val"), (4, "val"), (4, "test")])
def test_an_interrupted_evaluation_is_repeated_on_resume(stopped, capsys, monkeypatch):
    """The resumed run has the evaluations and the best.pt of an uninterrupted run."""
    accuracies = {(2, "val"): 0.7, (4, "val"): 0.6}
    monkeypatch.delenv("VIT_CALLED_FROM", raising=False)
    monkeypatch.setattr(launch, "ROOT", Path.cwd().resolve())
    first = Session(accuracies=accuracies, stop_in=stopped)
    assert first.run.stop_requested and first.evaluated[-1] == stopped and stopped not in logged()
    assert [event["step"] for event in events_of("r", ("preempted",))] == [stopped[0]]
    if stopped[0] == 0:
        assert "after step 0 of 4. Nothing to save yet." in capsys.readouterr().out and not list(Path("r").glob("*.pt"))
        return
    assert f"after step {stopped[0]} of 4. Resume with: RESUME_PATH=r bash train.sh" in capsys.readouterr().out
    second = Session(accuracies=accuracies, resume=True)
    assert second.evaluated[0] == stopped and not second.run.stop_requested
    assert logged() == [(0, "test"), (2, "val"), (4, "val"), (4, "test")]
    for file in ("best.pt", "step-00000002.pt", "step-00000004.pt"):
        assert best_of(file) == {"step": 2, "accuracy": 0.7}
