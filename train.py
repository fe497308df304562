"""Fine-tunes a Vision Transformer: flags -> configuration -> data, model, optimizer -> the step loop -> report.

bash train.sh starts this file once per GPU through torchrun; `python train.py --name x` runs it on one device.
Exit codes: 0 done, 2 bad input; docs/reliability.md lists the others. A traceback, with code 1, is a bug of this program.
"""

import os
from pathlib import Path
from typing import TYPE_CHECKING

from utils import launch, process

with process.imports("train.py"):
    from models.checkpoints import hub
    from models.checkpoints.first_look import require_run, require_weights
    from models.checkpoints.published import published_name, published_names
    from models.errors import ModelError
    from utils import config as configuration
    from utils.run.names import check_free

if TYPE_CHECKING:
    from utils.build import Found, SavedRun
    from utils.config import Config
    from utils.distributed import Ranks


def main(argv: list[str]) -> int:
    with process.program("train.py", single_process=False) as program:    # signals, one-line errors, exit codes
        if launch.only_checks() and not launch.in_sweep():
            configuration.warn_of_variables(os.environ, "train.sh")
        flags = configuration.name_model(configuration.parse(argv), hub)
        if launch.one_node() and not launch.restarts():
            check(flags)                                         # what needs neither data nor PyTorch
        if launch.only_checks():                                 # train.sh asks before it starts torchrun
            return program.exit_code
        # Deferred, so that a bad flag fails before PyTorch loads. Idle threads of libgomp sleep soon instead of spinning: on a
        # machine that others use too, a step would otherwise wait for threads that do not run.
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")
        os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")    # on the CPU, with a warning, what MPS has not
        from utils import build, distributed

        with distributed.init(flags.get("device", "auto"), flags.get("rank_timeout", 600)) as ranks:
            flags = build.decide_resume(flags, ranks)            # after a restart: the same run
            if not launch.one_node():                            # all nodes end if a file is missing on one of them
                distributed.local_main_first(ranks, lambda: check(flags))
            saved = build.saved_run(flags, ranks)                # the checkpoint to resume or branch from, or None
            sources = configuration.choose(flags, saved and saved.state.config, build.machine(ranks))
            found = build.find(sources, saved, ranks)            # facts as plain values, opened data, opened start weights
            config = configuration.resolve(flags, found.facts, saved and saved.facts)
            if config.eval_only:
                program.stop.kept = "stopped: an evaluation has nothing to save"
                evaluate_only(config, found, saved, ranks)
            else:
                program.exit_code = train(config, found, saved, ranks, program.stop)
    return program.exit_code


def check(flags: dict) -> None:
    """Raise ConfigError or FolderError for what can be known without data and PyTorch."""
    first = launch.place().rank == 0
    configuration.check(flags, written=("output_dir", "log_dir") if first else ())
    if first and "name" in flags and not flags.keys() & {"resume_path", "eval_only"}:
        check_free(flags.get("output_dir", configuration.FLAGS["output_dir"].default), flags["name"])
    check_weights(flags)


def check_weights(flags: dict) -> None:
    """Raise ConfigError for weights of a flag that are neither there nor published, or are no file of weights. A resumed run has
    its own."""
    for flag in ("pretrained_dir", "teacher"):
        configuration.check_published(flags, published_name, published_names(), flag)
    resumes = flags.keys() & {"resume_path"}
    for flag in resumes or flags.keys() & {"pretrained_dir", "teacher"}:
        try:
            if Path(flags[flag]).exists():
                (require_run if resumes else require_weights)(flags[flag])
        except ModelError as error:
            raise configuration.ConfigError(f"--{flag}: {error}") from error


def train(config: "Config", found: "Found", saved: "SavedRun | None", ranks: "Ranks", stop: process.StopSignal) -> int:
    """Train -> exit code: 0, or that of a run that was asked to stop"""
    from utils import build, distributed
    from utils.report import batch_picture, summary

    run = build.build_run(config, found, saved, ranks, stop)
    built = build.build_model(config, found, saved, ranks)             # the model, filled, on its device, and its precision
    data = build.build_data(config, found, saved, ranks, built)        # loaders over the splits that were found
    trainer = build.build_trainer(config, run.state, ranks, built, data, run.requests, run.stop_within_step)
    with build.open_outputs(run, found, built, data, trainer):         # folder and loggers, closed however the loop ends
        process.collect_garbage()
        data = batch_picture.watch_first_batches(run, trainer, data)   # what the model sees first becomes batch.png
        shown = summary.before(run, trainer, data)                     # attention before edits change it, for checkpoints
        while True:
            run.evaluate_if_due(trainer, data)                         # before step 1 too, and one that a stop cut short
            run.save_if_due(trainer)
            if trainer.step == config.num_steps or run.stop_requested:
                break
            # On a GPU these are the metrics of the step before, unless what is due after this one needs its own.
            steps = trainer.train_step(data.batches, flush=run.is_due(trainer.step + 1))
            run.log_steps(steps)
            run.follow_requests(steps, trainer)                        # of any rank: to stop, or to report
        if not run.stop_requested:
            run.finish(trainer, data)                                  # the last evaluations
        if run.stop_requested:                                         # in a step, or in any evaluation
            run.stop_early(trainer)                                    # saves what was trained
            return process.EXIT_PREEMPTED
    with distributed.watch(ranks, lambda: "after the last step", "the run is done and saved"):
        summary.after(run, trainer, data, shown)                       # pictures and results
    return 0


def evaluate_only(config: "Config", found: "Found", saved: "SavedRun | None", ranks: "Ranks") -> None:
    """Evaluate the checkpoint, or the start weights with their head, and print the results."""
    from utils import build, distributed
    from utils.device import SMALLER_EVALUATION
    from utils.report import summary
    from utils.training.evaluation import evaluate

    if saved:
        build.print_resume(config, saved, ranks)
        build.check_same_data(config, found, saved, ranks)
    elif ranks.is_main:
        print(f"evaluating {found.start.path}")
    built = build.build_model(config, found, saved, ranks)
    loader, splits = build.build_eval_loader(config, built.model, ranks), found.splits
    on_compiled = build.print_compile_time(ranks) if config.compile else None
    process.collect_garbage()
    only_val = config.test == "never" or splits.test is splits.val
    last = {splits.val_name: splits.val} if only_val else {"test": splits.test}
    parts = {"train": splits.train} | last if config.eval_train and len(splits.train) else last
    path, run, step = ((saved.opened.path, vars(saved.state), saved.state.step) if saved else
                       (found.start.path, found.start.file.run, found.start.step))
    for name, images in parts.items():
        with distributed.watch(ranks, lambda name=name: f"evaluation on {name}", SMALLER_EVALUATION):
            metrics = evaluate(built.model, loader(images), built.normalize, built.precision, ranks, len(splits.classes),
                               confusion=config.confusion_matrix, on_compiled=on_compiled, flipped=config.tta == "flip",
                               filled=True)
        if ranks.is_main:
            chosen = build.chosen_on(path, run, step, config.to_dict(), splits, name)
            summary.print_evaluation(name, metrics, len(splits.classes), chosen)
    if ranks.is_main:
        print("  " + "\n  ".join(summary.metric_lines(metrics, len(splits.classes))))
        if config.confusion_matrix:
            # Next to the checkpoint of a run, under its name: the run's tables are of its last step. A published file may be
            # anywhere.
            folder = path.parent if run else Path(config.output_dir)
            summary.print_confusion(folder, metrics, splits.classes, path.stem)


if __name__ == "__main__":
    process.run(main)
