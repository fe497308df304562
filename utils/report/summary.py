"""The end of a run: its results, where its files are, and commands to type next."""

import contextlib
import math
import shlex
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from utils import launch, process
from utils.attention.edits import digest
from utils.data.datasets import NAMED_BY_FOLDER
from utils.data.splits import Splits
from utils.files import StorageError
from utils.run import checkpoint, profiling
from utils.run.folder import BAD_IMAGES_FILE, MISTAKES_FILE
from utils.run.log import read_log
from utils.run.run import Run
from utils.training.certainty import Result, describe, describe_images, describe_interval
from utils.training.evaluation import EvalMetrics, write_confusion
from utils.training.trainer import Trainer

from . import plots
from .attention_effect import ATTENTION_FILE, ShownImage, attention_loss_line, choose_images, draw, predict_with_attention
from .batch_picture import BATCH_FILE

RECENT_STEPS = 20            # over which a mean is taken, at least


def before(run: Run, trainer: Trainer, data: Any) -> list[ShownImage]:
    """Return the images whose attention is shown before and after; a new run stores what it predicts of them in checkpoints."""
    if not (data.edits and run.ranks.is_main):
        return []
    shown = choose_images(data.splits.train, data.edits, data.final.images, data.final.name, data.held_out_edits,
                          run.history.first.get("attention", {}).get("names", ()))
    if run.history.began_at == 0:
        run.history.first |= {"edits": digest(data.edits), "attention": _attention_now(shown, trainer, trainer.module, data)}
    return shown


def after(run: Run, trainer: Trainer, data: Any, shown: Sequence[ShownImage]) -> None:
    """Draw the curves, and the attention before and after edits; print the summary. On rank 0.

    Raises StorageError at the end if a picture or table cannot be written.
    """
    if not run.ranks.is_main:
        return
    config, folder, model, failed = run.config, run.outputs.folder, trainer.module, []
    if data.edits:
        title = (f"{config.name}: attention of layer {model.sigmoid_layers[-1]} before and after {config.num_steps} steps "
                 f"with weight {config.attention_loss_weight:g}")
        now = _attention_now(shown, trainer, trainer.eval_model, data)
        with _collect_failures(failed):
            draw(folder, title, model, config.eval_crop, data.splits.classes, shown, run.history.first.get("attention"), now)
    speed = profiling.summary(read_log(folder), model, (model.config.in_channels, *model.img_size), trainer.precision.compute,
                              run.ranks.device, run.ranks.size)
    print_summary(run, data.splits, data.final.name, speed, failed, data.title)
    if failed:
        raise StorageError(f"{'; '.join(failed)}. The run is done and saved. Make room, then write what is missing with: "
                           f"{launch.command_to_resume(folder)}")


@contextlib.contextmanager
def _collect_failures(failed: list[str]) -> Iterator[None]:
    """Add the error of a file that cannot be written to `failed`; the summary is printed in any case."""
    try:
        yield
    except (StorageError, OSError) as error:
        message, _ = process.classify_error(error)
        if message is None:
            raise
        failed.append(message)


def _attention_now(shown: Sequence[ShownImage], trainer: Trainer, model: nn.Module, data: Any) -> dict:
    return predict_with_attention(shown, model, data.eval_transform, trainer.normalize, trainer.precision, trainer.ranks.device)


def metric_lines(metrics: EvalMetrics, num_classes: int) -> list[str]:
    """Return lines on an evaluation besides its accuracy."""
    last = min(len(metrics.top), num_classes - 1)                   # among all classes is every image
    top = [f"top-1 to top-{last} {' '.join(f'{value:.2%}' for value in metrics.top[:last])}"] if last > 1 else []
    return [*top, f"probability    {metrics.true_probability:.4f} of the true class on average; calibration error "
                  f"{metrics.calibration_error:.4f}: the mean difference between how sure the model is and how often it is right"]


def print_evaluation(name: str, metrics: EvalMetrics, num_classes: int, chosen: int | None = 0) -> None:
    """chosen: on how many of the images the checkpoint, a best.pt, was chosen; None: unknown."""
    of = describe_images(metrics.images) if name == "train" else describe(_result(metrics))       # those were learned
    top5 = f"top-5 {metrics.top5:.2%}, " if num_classes > len(metrics.top) else ""
    print(f"{name} accuracy {metrics.accuracy:.2%}, {top5}loss {metrics.loss:.4f} ({of})")
    if chosen is None:
        print("warning: the data have changed since best.pt was saved, so it may have been chosen on some of these images")
    elif chosen:
        some = "" if chosen == metrics.images else f"{chosen} of "
        print(f"best.pt was chosen on {some}these images, so on new ones it is probably a little less accurate")


def _result(metrics: EvalMetrics) -> Result:
    return Result(metrics.accuracy, metrics.loss, metrics.images)


def print_confusion(folder: Path, metrics: EvalMetrics, classes: Sequence[str], checkpoint: str = "") -> None:
    """Write the tables and print where they are; `checkpoint` as write_confusion takes it."""
    folder.mkdir(parents=True, exist_ok=True)
    for file in write_confusion(folder, metrics.confusion, classes, checkpoint):
        print(f"  wrote {file}")


def print_summary(run: Run, splits: Splits, final: str, speed: Sequence[str], failed: list[str], title: str) -> None:
    """Print the results of a run, its files, and commands to type next; write the curves and the confusion matrix.

    final: the name of the split that was evaluated last; speed: lines of profiling.summary; title: the model and its data set.
    Errors of the disk go to `failed`.
    """
    config, history, outputs = run.config, run.history, run.outputs
    folder, result, events = outputs.folder, history.result, read_log(outputs.folder)
    curves = folder / "curves.png"
    with _collect_failures(failed):
        plots.save(plots.learning_curves(events, f"{config.name}: {title}"), curves)
    best = outputs.saver.best
    newest = (checkpoint.step_files(folder) or [folder / checkpoint.BEST_FILE])[0]
    print(f"\nDone: step {config.num_steps} of {config.num_steps}, {run.seconds - history.seconds:.0f} s.")
    print("  " + "\n  ".join([*_accuracy_lines(run, splits, final, best), *_training_lines(events, config)]))
    for number, line in enumerate(speed):
        print(f"  {'' if number else 'speed':<14} {line}")
    print(f"  checkpoint     {newest}")
    if (folder / MISTAKES_FILE).exists():
        of = f"of best.pt on {splits.val_name}" if best else f"of the last step on {final}"
        print(f"  mistakes       {folder / MISTAKES_FILE}: {of}, the worst first")
    bad = folder / BAD_IMAGES_FILE
    if bad.exists():
        count = len(bad.read_text(encoding="utf-8", errors="replace").splitlines())
        print(f"  bad images     {count} training image{'s were' if count != 1 else ' was'} replaced: {bad}")
    if (folder / BATCH_FILE).exists():
        print(f"  batches        {folder / BATCH_FILE}: what the model saw at the step in its heading, with labels")
    if curves.exists():
        print(f"  curves         {curves}")
    if (folder / ATTENTION_FILE).exists():
        print(f"  attention      {folder / ATTENTION_FILE}: before, edits, after")
    tensorboard = f"{launch.command('-m tensorboard.main')} --logdir {shlex.quote(config.log_dir)}"
    print(f"  TensorBoard    {tensorboard}")
    if config.confusion_matrix:
        with _collect_failures(failed):
            print_confusion(folder, result, splits.classes)
    if not launch.is_trial():
        evaluate = best and best["step"] != config.num_steps and splits.test is not splits.val
        _print_next_commands(config, folder, folder / checkpoint.BEST_FILE if evaluate else None)


def _accuracy_lines(run: Run, splits: Splits, final: str, best: dict) -> list[str]:
    """Lines on the last step and on best.pt, each with the images that it was evaluated on."""
    result = run.history.result
    lines = [f"{final + ' accuracy':<14} {result.accuracy:.2%} after the last step ({describe(_result(result))})"
             + _before(run, final),
              *_guess_lines(splits.held_out[final].targets, _result(result)), *metric_lines(result, len(splits.classes))[:-1]]
    return [*lines, *(_best_lines(run, splits, final, best) if best else [])]


def _before(run: Run, split: str) -> str:
    """Return the end of a line on the split: its accuracy before training, if it was evaluated then."""
    first = run.history.first
    return f"; before training {first['accuracy']:.2%}" if "accuracy" in first and first.get("split", "test") == split else ""


def _guess_lines(targets: Sequence[int], result: Result) -> list[str]:
    largest = Counter(map(int, targets)).most_common(1)[0][1] / len(targets)
    low, _ = result.interval
    line = f"               not clearly above {largest:.2%}, the accuracy of always guessing the largest class"
    return [line] * (low <= largest)


def _best_lines(run: Run, splits: Splits, final: str, best: dict) -> list[str]:
    """Lines on best.pt and the last step, on the images that it was chosen on, and which accuracy to expect on new ones."""
    name, last, lines = splits.val_name, run.config.num_steps, []
    results = {step: each for (step, split), each in run.history.logged.items() if split == name and step and each}
    is_last = best["step"] == last
    if final != name and last in results and not is_last:
        lines.append(f"{name + ' accuracy':<14} {results[last].accuracy:.2%} after the last step ({describe(results[last])})"
                     + _before(run, name))
    held = results.get(best["step"])
    count = f", the best of {len(results)} evaluations" if len(results) > 1 else ""
    figures = f" ({describe(held) if final != name or not is_last else describe_interval(held)})" if held else ""
    at = f"after step {best['step']}{', the last' * is_last}{count}"
    lines.append(f"best           {best['accuracy']:.2%} on {name} {at}{figures}: {run.outputs.folder / checkpoint.BEST_FILE}")
    highest = max(results.values(), key=lambda each: each.rank(2.0), default=held)
    if held and held.accuracy < highest.accuracy:
        # Else the highest could not be saved, or was later than the checkpoint that was resumed.
        by_loss = held.rank(highest.accuracy) > highest.rank(highest.accuracy)
        lines.append(f"               {highest.accuracy:.2%} was the highest, "
                     + ("by one image at most, and with a higher loss" if by_loss else "and was not saved"))
    if launch.is_trial() or is_last:
        return lines
    if final != name:
        figure = "the first command below prints its test accuracy (that of the last step is above)"
    elif splits.test is splits.val:
        figure = "for an exact figure, hold out a test set (--test_fraction 0.2)"
    else:
        figure = "for an exact figure, run the first command below with --test once, after all decisions"
    return [*lines, "               predict.py and export.py use best.pt. It was chosen on these images, so on new ones it is "
                    f"probably a little less accurate: {figure}"]


def _training_lines(events: Sequence[dict], config) -> list[str]:
    lines, steps = [], [event for event in events if event["event"] == "train"]
    recent = steps[-max(config.eval_every, RECENT_STEPS):]
    if recent and "accuracy" in recent[0]:
        mean = sum(event["accuracy"] for event in recent) / len(recent)
        lines.append(f"train accuracy {mean:.2%} on the images of the last {len(recent)} steps, as they were fed")
    evaluated = [event for event in events if event["event"] == "eval" and event["split"] == "train"]
    if config.eval_train and evaluated:            # a full disk may have lost the line
        whole = evaluated[-1]
        lines.append(f"               {whole['accuracy']:.2%} on all {whole['images']} training images, without augmentation")
    # The log has NaN and infinity, of steps that were skipped (--non_finite skip), as text.
    losses = [float(event["attention_loss"]) for event in steps if event.get("attention_loss") is not None]
    return [*lines, *attention_loss_line([loss for loss in losses if math.isfinite(loss)], RECENT_STEPS)]


def _print_next_commands(config, folder: Path, to_evaluate: Path | None) -> None:
    """to_evaluate: the best.pt whose test accuracy is not known."""
    run, command = shlex.quote(str(folder)), launch.command
    print("Next:")
    if to_evaluate:
        print(f"  {command('train.py')} --eval_only --resume_path {shlex.quote(str(to_evaluate))}     # best.pt on the test set")
    if config.attention_edits:
        print("  train again with --attention_loss_weight 0 and another --name     # the effect of the steps without the edits")
    if config.dataset not in NAMED_BY_FOLDER:
        own = command("train.sh", "DATASET=folder DATA_DIR=PHOTOS VAL_FRACTION=0.2")
        print(f"  {own}     # your own photographs: one folder for each class")
    print(f"  {command('predict.py')} {run} PHOTOS > predictions.csv     # label photographs: a folder, a file or a list")
    exported = shlex.quote(f"{folder.name}-model")
    print(f"  {command('export.py')} {run} --to folder --output {exported}     # for timm and transformers")
    print(f"  {command('visualize.py')} attention --checkpoint {run}     # see what it looks at")
    if config.sigmoid_attention:
        print(f"  {command('annotate.py')} --checkpoint {run}     # edit what it looks at")
