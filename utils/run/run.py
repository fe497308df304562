"""A run while it is open: the only object, besides the Trainer, that the step loop calls.

It decides what is due at a step, evaluates, logs, saves, and stops cleanly on request. Every method is called on every rank, in
the same order, because evaluations and saves contain collectives; only rank 0 writes.
"""

import contextlib
import dataclasses
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from utils import distributed, launch
from utils.data.sampler import StepSampler
from utils.data.splits import DataError
from utils.device import SMALLER_EVALUATION, SMALLER_SAVE, OutOfMemory
from utils.distributed import PeerLost, Ranks
from utils.process import StopSignal
from utils.training.certainty import Result, best_of, result_of
from utils.training.evaluation import EvalMetrics, evaluate
from utils.training.optimizer import is_time
from utils.training.step import Requests, StepMetrics
from utils.training.trainer import DivergedError, Trainer

from . import checkpoint
from .checkpoint import NonFiniteError, RunCheckpoint, RunState
from .folder import BAD_IMAGES_FILE
from .health import Health
from .log import LOG_FILE, read_log
from .loggers import BadImages, RunLogger
from .mistakes import write_mistakes
from .profiling import Profile
from .saver import Saver


@dataclasses.dataclass
class History:
    """What the run has done, in earlier sessions and in this one."""

    began_at: int = 0                        # the step that this session began at
    first: dict = dataclasses.field(default_factory=dict)      # RunState.first
    best: dict = dataclasses.field(default_factory=dict)       # {"step", "accuracy"} of the evaluation of best.pt
    seconds: float = 0.0                     # of earlier sessions
    # The evaluations in the log, by (step, split). None: the log has no figures of it that can be read.
    logged: dict[tuple[int, str], Result | None] = dataclasses.field(default_factory=dict)
    result: EvalMetrics | None = None        # the last evaluation of this session


@dataclasses.dataclass
class Outputs:
    """What the run writes to. Ranks other than 0 have only the folder's path."""

    folder: Path
    log_folder: Path
    logger: RunLogger
    saver: Saver | None = None
    bad_images: BadImages | None = None
    profile: Profile | None = None


class Run:
    """`config` has the settings of the run as attributes; `state` is the checkpoint that it continues, or None."""

    def __init__(self, config: Any, state: RunState | None, source: RunCheckpoint | None, ranks: Ranks, stop: StopSignal):
        """`source`: the opened file of `state`."""
        self.config, self.state, self.source, self.ranks, self.stop = config, state, source, ranks, stop
        self.history = History(state.step, state.first, seconds=state.seconds) if state else History()
        self.outputs: Outputs | None = None
        self.constant: dict = {}             # fields of RunState that do not change
        self.started = time.monotonic()
        self.unsaved: list[Path] = []        # files to write after the last evaluation
        self.stop_requested = False

    # ------------------------------------------------------------------------------------------- opening and closing

    @contextlib.contextmanager
    def opened(self, folder: Path, log_folder: Path, constant: dict, trainer: Trainer, sampler: StepSampler, settings: str,
               health: Health | None = None, aliases: Mapping[str, str] | None = None) -> Iterator[None]:
        """Around the step loop: opens the outputs of the run, and closes them however the loop ends.

        `constant`: the fields of RunState that do not change; `settings`: what is printed of the configuration; `health` warns
        of a run that goes badly; `aliases` as RunLogger takes them. An error in a step does not lose the steps before it.
        """
        self.constant = constant
        self._open(folder, log_folder, settings, health, aliases)
        try:
            with distributed.watch(self.ranks, lambda: f"step {trainer.step + 1}"):
                if self.source and self.source.path.parent.resolve() != folder.resolve():
                    self._save(trainer, [checkpoint.step_path(folder, trainer.step)])      # a branch begins with a copy
                yield
        except ValueError as error:
            if not isinstance(error, (PeerLost, OutOfMemory)):            # after these the device returns nothing more
                with contextlib.suppress(DivergedError):
                    self.log_steps(trainer.finish())
            if isinstance(error, (DivergedError, NonFiniteError)):
                raise self._diverged(error, trainer, sampler) from error
            raise
        finally:
            if self.outputs.profile:
                self.outputs.profile.close()
            if self.outputs.saver:
                self.outputs.saver.wait()
            self.outputs.logger.close()

    def _open(self, folder: Path, log_folder: Path, settings: str, health: Health | None,
              aliases: Mapping[str, str] | None) -> None:
        config, main = self.config, self.ranks.is_main
        logger = RunLogger(folder if main else None, log_folder, self.history.began_at, config.num_steps, config.wandb,
                           config.to_dict(), config.eval_every, health, len(self.constant["classes"]), aliases)
        self.outputs = Outputs(folder, log_folder, logger)

        def earlier_evaluations() -> dict:
            events = read_log(folder)
            if health:
                health.resume(events)
            return {(event["step"], event["split"]): result_of(event) for event in events if event["event"] == "eval"}

        self.history.logged = distributed.broadcast_from_main(self.ranks, earlier_evaluations)
        if main:
            print(f"{settings}\nrun folder: {folder}", flush=True)
            self.outputs.saver = Saver(folder, config.keep_checkpoints, self.history.best, warn=logger.log)
            self.outputs.bad_images = BadImages(folder, logger.log)
            self.outputs.profile = Profile(folder, self.ranks.device, logger.log) if config.profile else None
        logger.log_session("resume" if self.state else "start", self.history.began_at, world_size=self.ranks.size)
        self.stop.saves = True

    # ----------------------------------------------------------------------------------------------------- what is due

    def is_due(self, step: int) -> bool:
        """Return whether the run evaluates or saves after this step."""
        return any(is_time(step, every, self.config.num_steps) for every in (self.config.eval_every, self.config.save_every))

    def evaluate_if_due(self, trainer: Trainer, data: Any) -> None:
        """Evaluate before step 1 of a new run and after the steps of --eval_every, unless the log has that evaluation already.

        So a run that was stopped or killed before an evaluation ended repeats it when it is resumed.
        """
        step, history = trainer.step, self.history
        if self.stop_requested:
            return
        if step == 0:
            before = data.evaluated_before
            if before:                         # no checkpoint is of step 0: the run is new
                metrics = self.evaluate(trainer, data, before)
                history.first |= {"accuracy": metrics.accuracy, "split": before.name} if metrics else {}
            return
        watched = data.watched
        due = watched and is_time(step, self.config.eval_every, self.config.num_steps)
        if not due or (step, watched.name) in history.logged:
            return
        metrics = self.evaluate(trainer, data, watched)
        if metrics is None:
            return
        history.result = metrics
        # What is on the disk: after a save that failed, a later evaluation may become the best again.
        history.best = distributed.broadcast_from_main(self.ranks, lambda: self.outputs.saver.best)
        if self.is_best(step, watched.name):
            history.best = {"step": step, "accuracy": metrics.accuracy}
            self.unsaved.append(self.outputs.folder / checkpoint.BEST_FILE)
            write_mistakes(metrics, watched.images, data.splits.classes, self.outputs, self.ranks)
        if step == history.began_at:           # the step's file holds the best evaluation too
            self.unsaved.append(checkpoint.step_path(self.outputs.folder, step))

    def is_best(self, step: int, split: str) -> bool:
        """Return whether the evaluation of this step, the last one, is the best: its weights become best.pt.

        The rule is that of certainty.best_of over the evaluations in the log, in their order: within one image of the highest
        accuracy so far the loss decides. If best.pt is not the one that the rule chose (its save failed, or it was later than
        the checkpoint that is resumed), being better than best.pt is enough. Runs that earlier versions began keep their rule:
        any higher accuracy.
        """
        history = self.history
        result, kept = history.logged[step, split], history.best
        if self.state and self.state.rules < 3:
            return result.accuracy > kept.get("accuracy", -1.0)
        results = {at: each for (at, name), each in sorted(history.logged.items()) if each and name == split and 0 < at <= step}
        best, highest = best_of(results)
        if best == step or not kept:
            return True
        held = results.get(kept["step"]) or Result(kept["accuracy"], float("nan"), result.images)
        return best != kept["step"] and result.rank(highest) > held.rank(highest)

    def save_if_due(self, trainer: Trainer) -> None:
        """Save after the steps of --save_every, and if the last evaluation was the best."""
        step = trainer.step
        files, self.unsaved = self.unsaved, []
        if self.stop_requested:
            return
        if step > self.history.began_at and is_time(step, self.config.save_every, self.config.num_steps):
            files.append(checkpoint.step_path(self.outputs.folder, step))
        if files:
            self._save(trainer, list(dict.fromkeys(files)))

    # -------------------------------------------------------------------------------------------------------- the steps

    def requests(self) -> Requests:
        """Return the requests of this process at the end of a step; the trainer adds up those of all ranks."""
        saver = self.outputs.saver
        return Requests(stop=self.stop.requested(), save_failed=saver is not None and saver.failed)

    def stop_within_step(self) -> bool:
        """Return whether any rank was asked to stop, between the micro-batches of a step, which may take minutes. A resumed run
        repeats the step. Several GPUs finish their step: an agreement within it would make them wait for each other."""
        if self.ranks.size == 1 or self.ranks.device.type == "cpu":
            asked = torch.tensor(float(self.stop.requested()))
            self.stop_requested |= bool(distributed.all_reduce_sum(asked))
        return self.stop_requested

    def log_steps(self, steps: Sequence[StepMetrics]) -> None:
        for step in steps:
            self.outputs.logger.log_step(step)

    def follow_requests(self, steps: Sequence[StepMetrics], trainer: Trainer) -> None:
        """Follow the requests of the ranks in these steps: report replaced images, end a run that cannot save, note a stop.

        Raises DataError or StorageError on every rank.
        """
        outputs = self.outputs
        for step in steps:
            if step.requests.replaced:
                self._list_bad_images(step)
            if step.requests.save_failed:
                distributed.broadcast_from_main(self.ranks, lambda: outputs.saver.raise_if_failed())
            self.stop_requested |= bool(step.requests.stop)
        if outputs.saver and trainer.step == self.history.began_at + 1:
            outputs.saver.reserve(self._snapshot(trainer))
        if outputs.profile:
            outputs.profile.step()

    def _list_bad_images(self, step: StepMetrics) -> None:
        """Raise DataError on every rank when too many images were replaced."""
        config, outputs, images = self.config, self.outputs, self.constant["train_images"]
        lines = {reason for replaced in distributed.all_gather_objects(self.ranks, step.replaced) for _, reason in replaced}
        new, count = distributed.broadcast_from_main(self.ranks, lambda: outputs.bad_images.add(lines))
        for line in new:
            outputs.logger.log(f"warning: replaced by the next readable image: {line}")
        if count > config.max_bad_images * images:
            raise DataError(f"--max_bad_images {config.max_bad_images:g}: {count} of {images} training images cannot be read, "
                            f"which is more; {outputs.folder / BAD_IMAGES_FILE} lists them. Replace them, or raise the limit "
                            f"({launch.command('dataset.py')} check finds all of them, and prints the limit)")

    # ------------------------------------------------------------------------------------------------- evaluating, saving

    def evaluate(self, trainer: Trainer, data: Any, split: Any, confusion: bool = False) -> EvalMetrics | None:
        """Evaluate a split; log the metrics unless an earlier session did.

        Returns None, on every rank, if one of them is asked to stop during the evaluation; then `stop_requested` is true.
        """
        loader, classes = data.eval_loader(split.images), len(data.splits.classes)
        with distributed.watch(self.ranks, lambda: f"evaluation on {split.name} after step {trainer.step}", SMALLER_EVALUATION):
            metrics = evaluate(trainer.eval_model, loader, trainer.normalize, trainer.precision, self.ranks, classes,
                               confusion=confusion, stop_requested=self.stop.requested, on_compiled=data.on_compiled,
                               flipped=self.config.tta == "flip", answers=split is (data.watched or data.final))
        self.stop_requested |= metrics is None
        if metrics is not None and (trainer.step, split.name) not in self.history.logged:
            self.outputs.logger.log_evaluation(trainer.step, split.name, metrics)
            self.history.logged[trainer.step, split.name] = result_of(metrics.as_dict())
        return metrics

    def _save(self, trainer: Trainer, files: Sequence[Path]) -> None:
        """Save the state in these files. Raises NonFiniteError on every rank, so that all stop together."""
        with distributed.watch(self.ranks, lambda: f"saving step {trainer.step}", SMALLER_SAVE):
            if self.ranks.is_main:
                self.outputs.saver.save(files, self._snapshot(trainer))
            else:
                checkpoint.check_finite(trainer.model.state_dict())
                checkpoint.check_finite(trainer.ema.model.state_dict() if trainer.ema else {})

    def _snapshot(self, trainer: Trainer) -> RunState:
        return RunState(
            **trainer.progress._asdict(), model=trainer.module.state_dict(), optimizer=trainer.optimizer.state_dict(),
            scaler=trainer.scaler.state_dict(), best=self.history.best, first=self.history.first, seconds=self.seconds,
            ema=trainer.ema.model.state_dict() if trainer.ema else {}, world_size=self.ranks.size,
            threads=torch.get_num_threads(), **self.constant)

    @property
    def seconds(self) -> float:
        """Return the seconds over all sessions of the run."""
        return self.history.seconds + time.monotonic() - self.started

    # ---------------------------------------------------------------------------------------------------------- the end

    def finish(self, trainer: Trainer, data: Any) -> None:
        """Make the last evaluations and log the end. A request to stop during an evaluation sets `stop_requested`."""
        self._evaluate_at_end(trainer, data)
        if self.stop_requested:
            return
        distributed.broadcast_from_main(self.ranks, lambda: self.outputs.saver.close())
        self.outputs.logger.log_session("end", trainer.step, seconds=round(self.seconds, 2))

    def _evaluate_at_end(self, trainer: Trainer, data: Any) -> None:
        config, history = self.config, self.history
        is_evaluated = data.watched is not None and data.watched.images is data.final.images and history.result is not None
        if not is_evaluated or config.confusion_matrix:
            history.result = self.evaluate(trainer, data, data.final, config.confusion_matrix)
            if data.watched is None and history.result is not None:
                write_mistakes(history.result, data.final.images, data.splits.classes, self.outputs, self.ranks)
        if config.eval_train and not self.stop_requested and (trainer.step, data.train.name) not in history.logged:
            self.evaluate(trainer, data, data.train)

    def stop_early(self, trainer: Trainer) -> None:
        """End a run that is asked to stop: save it and print how to resume it."""
        steps = trainer.finish()
        self.log_steps(steps)
        self.follow_requests(steps, trainer)
        step, folder = trainer.step, self.outputs.folder
        if step:
            self._save(trainer, [checkpoint.step_path(folder, step)])
        distributed.broadcast_from_main(self.ranks, lambda: self.outputs.saver.close())
        self.outputs.logger.log_session("preempted", step)
        if self.ranks.is_main:
            self.outputs.logger.end_progress()
            resume = "" if launch.in_sweep() else f" Resume with: {launch.command_to_resume(folder)}"
            resume = resume if step else " Nothing to save yet."
            print(f"Stopped on request after step {step} of {self.config.num_steps}.{resume}", flush=True)

    def _diverged(self, error: ValueError, trainer: Trainer, sampler: StepSampler) -> DivergedError:
        """Return the error with what a user needs to continue."""
        step, outputs = trainer.step, self.outputs
        outputs.logger.log_session("diverged", step + 1, samples=[sample.index for sample in sampler.samples_of(step)])

        def newest_file() -> str:
            outputs.saver.wait()
            return str(*checkpoint.step_files(outputs.folder)[:1]) or "none yet"

        # Every rank comes here, and any of them may print the line.
        return DivergedError(f"{error}; last good checkpoint: {distributed.broadcast_from_main(self.ranks, newest_file)}; "
                             f"{outputs.folder / LOG_FILE} lists all samples of the step")
