"""Fine-tunes a Vision Transformer: configuration -> data, model, optimizer -> the step loop.

bash train.sh starts this file once per GPU through torchrun; `python train.py --name x` runs it on one device.
Exit codes: 0 done; what else can happen has its own code and one line (docs/reliability.md has the table; 2 is bad input).
A traceback, with code 1, is a bug of this program.

Imports stand in the functions that need them: a wrong flag is told at once, not after PyTorch has been loaded.
"""

import contextlib
import gc
import os
import shlex
import shutil
import sys
import textwrap
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent
LOST = 8                                         # the exit code where another process of the run was lost
ALONE = ("ImageError", "WorkerError", "OutOfMemory", "LostProcessError")      # errors that one process may have by itself
ATTENTION_FILE, SHOWN = "attention.png", 4       # the picture of attention before and after, and its images of a kind
try:
    import configs
except ModuleNotFoundError as error:
    sys.exit(f"train.py: error: this Python lacks {error.name}: run .venv/bin/python train.py (bash train.sh makes it), "
             "or install requirements.txt")


def main(argv: list[str]) -> int:
    from utils import process

    if "LOCAL_RANK" in os.environ:
        process.die_with_parent()
    with process.Stop() as stop:
        try:
            given = after_restart(configs.parse(argv))
            if given.get("check_data"):
                return check_data(configs.resolve(given))
            if given.get("prepare"):
                stop.kept = "stopped: what is prepared is kept, the same command goes on"
                return prepare(configs.resolve(given))
            if "resume_path" not in given:
                check_batch(configs.resolve(given), "--train_batch_size")
            # Idle threads soon sleep instead of spinning for milliseconds: on a machine that others use too, a step would
            # else wait for threads that are not running (ten times slower and more). Read when PyTorch loads libgomp.
            os.environ.setdefault("GOMP_SPINCOUNT", "1000")
            from utils import distributed

            timeout = given.get("rank_timeout", configs.FLAGS["rank_timeout"][1])
            with distributed.group(given.get("device", "auto"), timeout) as world:
                return in_group(given, world, stop)
        except (ValueError, OSError) as error:
            if not (known := what_it_is(error)):
                raise
            return tell(*known)


def in_group(given: dict, world, stop) -> int:
    """-> exit code"""
    from utils import allocator, distributed, process

    if world.device.type == "cpu":
        allocator.keep_memory()
    try:
        run, state, path = configure(given, world)
        code = 0
        if run.eval_only:
            evaluate_only(given, run, world, state, path)
        else:
            code = train(given, run, world, state, path, stop)
        if world.local_rank == 0:                                # of every node: each has a train.sh of its own
            process.leave_code(code)
        return 0 if "LOCAL_RANK" in os.environ else code         # torchrun would take any other for a failure
    except (ValueError, RuntimeError, MemoryError) as error:
        if distributed.out_of_memory(error):
            error = distributed.used_up(world.device, "setting up")
        if not (known := what_it_is(error)):
            raise
        return tell(*known, quiet=getattr(error, "quiet", False), others_know=distributed.others_know())


def what_it_is(error: Exception) -> tuple[str, int, bool] | None:
    """-> (what to tell the user, exit code, whether other processes may not have it); None: a bug, whose traceback is needed"""
    if isinstance(error, ValueError) and type(error).__module__.partition(".")[0] in ("configs", "models", "utils"):
        return str(error), getattr(error, "exit_code", getattr(error, "code", 2)), type(error).__name__ in ALONE
    if isinstance(error, OSError) and error.filename is not None:          # no such folder, no permission, disk full
        return f"{error.filename}: {error.strerror}", 2, True
    return None


def tell(message: str, code: int, alone: bool, quiet: bool = False, others_know: bool = False) -> int:
    """Prints the one line, once a node, and returns what this process ends with. `alone`: others may not have the error;
    `others_know`: they end with it all the same; `quiet`: another process has told it.

    torchrun turns any failure into code 1 and a report of its own. Started by train.sh the processes therefore leave the
    code to it and end quietly, if they all do: those of another node, or ignorant ones, have to be stopped, and after the
    loss of a process torchrun is to start all of them anew (MAX_RESTARTS).
    """
    from utils import process

    size, local_size = (int(os.environ.get(name, 1)) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    first = process.leave_code(code)
    if not quiet and ((first is not False) if alone else int(os.environ.get("LOCAL_RANK", 0)) == 0):
        print(f"train.py: error: {' '.join(message.split())}", file=sys.stderr, flush=True)
    if first is None or "LOCAL_RANK" not in os.environ or code == LOST:
        return code
    return code if (alone and size > 1 and not others_know) or size > local_size else 0


def after_restart(given: dict) -> dict:
    """The flags with which processes go on that torchrun has started anew (MAX_RESTARTS) after one of them was lost."""
    from utils import process

    if not process.restarts() or any(given.get(name) for name in ("eval_only", "check_data", "prepare")):
        return given
    file = process.launch_file("folder")
    if file is None and "name" not in given and given.get("resume_path") != "auto":
        raise configs.ConfigError("a run that torchrun may restart needs a --name, to be found again; or start it by train.sh")
    if file is not None and not file.exists():
        return given                               # it was lost before it had a folder
    folder = Path(file.read_text()) if file else Path(given.get("output_dir", configs.FLAGS["output_dir"][1]), given["name"])
    here = given | {"output_dir": str(folder.parent), "name": folder.name}
    return here | {"resume_path": "auto"} if any(folder.glob("step-*.pt")) or "resume_path" not in given else here


def check_data(run) -> int:
    """python train.py --check_data: every image of every split is read; what cannot be used is told. -> exit code"""
    from utils.data import check as check_data
    from utils.data import datasets

    if int(os.environ.get("RANK", 0)):
        return 0                                   # one process is enough, and has processes of its own
    splits = datasets.load_splits(run.dataset, run.data_dir, val_fraction=run.val_fraction, test_fraction=run.test_fraction,
                                  split_seed=run.split_seed)
    workers = (os.cpu_count() or 1) if run.num_workers is None else run.num_workers
    collect_garbage()
    findings = check_data.check(splits, workers, say=lambda line: print(line, file=sys.stderr))
    print("\n".join(findings.lines))
    if run.dataset == "folder" and (line := check_data.left_out_line(run.data_dir)):
        print(line)
    if not findings.bad:
        print("every image can be read")
        return 0
    listed = Path(run.output_dir) / "bad_images.txt"
    listed.parent.mkdir(parents=True, exist_ok=True)
    listed.write_text("".join(f"{why}\n" for *_, why in findings.bad))
    return tell(f"{len(findings.bad):,} images cannot be read: {listed} lists them; replace or remove them, or train with "
                "--bad_images skip (those held out have to be readable)", 2, alone=False)


def prepare(run) -> int:
    """python train.py --prepare FOLDER: the images of every split are decoded and made smaller, once. -> exit code"""
    from utils.data import datasets, prepare

    if int(os.environ.get("RANK", 0)):
        return 0
    workers = (os.cpu_count() or 1) if run.num_workers is None else run.num_workers
    collect_garbage()
    prepare.build(datasets.own_splits(run.dataset, run.data_dir), run.dataset, run.prepare, run.prepare_size, workers, print,
                  skip=run.max_bad_images if run.bad_images == "skip" else 0.0)
    return 0


def check_batch(run, may_change: str) -> None:
    """Raises ConfigError if the batch cannot be cut into equal micro-batches; the nearest sizes, or what else to change."""
    ranks, parts = int(os.environ.get("WORLD_SIZE", 1)), run.gradient_accumulation_steps
    unit = ranks * parts
    if run.train_batch_size % unit and not run.eval_only:
        below = run.train_batch_size // unit * unit
        near = f"{below} or {below + unit}" if below else f"{unit}"
        advice = f"take {near}" if may_change == "--train_batch_size" else f"change {may_change}"
        raise configs.ConfigError(f"--train_batch_size {run.train_batch_size} is not divisible by {ranks} processes x "
                                  f"{parts} micro-steps: {advice}")
    if (run.mixup_alpha or run.cutmix_alpha) and run.train_batch_size // unit % 2 and not run.eval_only:
        raise configs.ConfigError(f"MixUp and CutMix mix pairs: --train_batch_size {run.train_batch_size} over {ranks} processes "
                                  f"x {parts} micro-steps leaves {run.train_batch_size // unit} images, an odd number: take "
                                  f"{run.train_batch_size + unit}")


def configure(given: dict, world):
    """-> (the resolved configuration, RunState to resume from or None, its file or None)"""
    from utils import distributed
    from utils.run import checkpoint
    from utils.run import folder as run_folder
    from utils.training import exact

    found = None
    if "resume_path" in given:
        place = given["resume_path"], given.get("output_dir", configs.FLAGS["output_dir"][1]), given.get("name")
        found = distributed.on_main(world, lambda: run_folder.find_checkpoint(*place))
    if found is None:                                          # also: RESUME_PATH=auto, and nothing is there yet
        if "resume_path" in given and world.is_main:
            print(f"nothing to resume in {Path(place[1], place[2])} yet: a new run")
        run = configs.resolve({name: value for name, value in given.items() if name not in ("resume_path", "override")})
        check_batch(run, "--train_batch_size")
        if run.exact:
            exact.check(world.size, run.gradient_accumulation_steps)
        if run.name and not run.eval_only:
            distributed.on_main(world, lambda: run_folder.check_free(run.output_dir, run.name))
        return run, None, None
    path, complaints = found
    state = distributed.first_on_node(world, lambda: checkpoint.load(path))
    if not given.get("eval_only"):
        distributed.on_main(world, lambda: run_folder.check_resume(path, given.get("output_dir"), given.get("name")))
    run = configs.resolve_resumed(given, state.config, state.train_images)
    micro_batches = state.config["gradient_accumulation_steps"] * state.world_size
    if "gradient_accumulation_steps" not in given and micro_batches % world.size == 0:
        run.gradient_accumulation_steps = micro_batches // world.size     # the same micro-batches on any number of processes
    check_batch(run, "--gradient_accumulation_steps (GRAD_STEPS) or the number of processes (NPROC)")
    if run.exact:
        exact.check(world.size, run.gradient_accumulation_steps)
        if run.gradient_accumulation_steps * world.size != micro_batches and state.config.get("exact"):
            raise configs.ConfigError(f"--exact: the run has {micro_batches} micro-batches a step, and {world.size} processes x "
                                      f"{run.gradient_accumulation_steps} micro-steps make others: change NPROC or GRAD_STEPS")
    if run.num_steps < state.step and not run.eval_only:
        raise configs.ConfigError(f"--num_steps {run.num_steps}: {path} is at step {state.step} already")
    if world.is_main:
        for complaint in complaints:
            print(f"warning: {complaint}; going back to the checkpoint before it")
        print(f"resuming {path} at step {state.step} of {run.num_steps}")
        tell_changes(given, run, state, world)
    return run, state, path


def tell_changes(given: dict, run, state, world) -> None:
    """What is not as it was in the session before."""
    if state.world_size != world.size and not run.eval_only:
        print(f"changed: {world.size} processes (were {state.world_size}), {run.gradient_accumulation_steps} micro-steps each "
              f"(were {state.config['gradient_accumulation_steps']})")
    laid = ("the milestones of the learning rate stay" if run.decay_type == "step"
            else "the learning-rate schedule is laid anew over all of them")
    quiet = {"resume_path", "override", "name", "output_dir"} if given["resume_path"] == "auto" else {"resume_path", "override"}
    resolved = {"num_epochs": "num_steps", "warmup_epochs": "warmup_steps", "fp16": "precision"}
    for name in sorted({resolved.get(name, name) for name in given} - quiet):
        if name == "pretrained_dir":
            print("--resume_path wins: --pretrained_dir is not used")
        elif run[name] != state.config.get(name) and name != "eval_only":
            print(f"changed: --{name} {run[name]} (was {state.config.get(name)})" + (f"; {laid}" if name == "num_steps" else ""))
    if state.step == run.num_steps and not run.eval_only:
        print("nothing is left to train: a larger --num_steps (NUM_STEPS) goes on", flush=True)


def data_of(given, run, world, state):
    """The splits, the same on every process; what of the run depends on their size is settled."""
    from utils import distributed
    from utils.data import datasets
    from utils.data.splits import fingerprint

    splits = distributed.first_on_node(world, lambda: datasets.load_splits(
        run.dataset, run.data_dir, val_fraction=run.val_fraction, test_fraction=run.test_fraction, split_seed=run.split_seed))
    facts = (splits.classes, len(splits.train), len(splits.val), len(splits.test), fingerprint(splits.train))
    if any(other != facts for other in distributed.gather(world, facts)):
        raise datasets.DataError(f"the nodes have different data in {run.data_dir}: classes or numbers of images differ")
    if state is not None:
        same_data(splits, state, run, world)
    elif run.num_steps is None or run.warmup_steps is None:
        said = configs.set_lengths(run, given, len(splits.train))
        check_batch(run, "--train_batch_size")              # again: a recipe may mix by the size of the data
        if world.is_main and said and not run.eval_only:
            print(f"length: {said}")
    if run.test == "never" and splits.test is splits.val:
        raise configs.ConfigError("--test never leaves nothing to evaluate: hold some of train out (--val_fraction 0.1)")
    return splits


def build(given, run, world, state):
    """-> (splits, model on the device, precision, prepare: images of 0..255 on the device -> the model's input)"""
    import torch

    from models import create_model
    from utils import distributed
    from utils.data import transforms
    from utils.training import exact, precision

    splits = data_of(given, run, world, state)
    path = None
    if state is None:
        path = distributed.first_on_node(world, lambda: pretrained_file(run))
        adopt_architecture(run, given, path)
        if run.head == "keep":
            check_head(run, splits, path)

    def create():
        torch.manual_seed(run.seed)
        if state is not None:
            model = create_model(configs.architecture(**state.architecture), len(splits.classes), run.img_size, initialise=False)
            model.load_state_dict((state.ema if run.eval_only else {}) or state.model)
            return model
        return create_model(run.model_type, len(splits.classes), run.img_size, path, run.head, **configs.model_overrides(run))

    model = distributed.first_on_node(world, create)
    if state is None and run.head == "keep" and model.load_report.classes not in ([], list(splits.classes)):
        raise configs.ConfigError(f"--pretrained_dir {run.pretrained_dir} knows other classes ("
                                  f"{', '.join(model.load_report.classes[:3])}, ...) than the data "
                                  f"({', '.join(splits.classes[:3])}, ...): not the same task")
    chosen, why = precision.choose(run.precision, run.fp16_opt_level, world.device)
    if state is not None and all(run[name] == state.config[name] for name in ("precision", "fp16_opt_level")):
        why = why.replace("requested", "as the run began")
    if run.precision == "auto":
        run.precision = "bf16" if chosen is precision.BF16 else "fp32"
    if chosen.compute == torch.float32:
        torch.set_float32_matmul_precision(run.float32_matmul)
        why += f"; products may round inside: {run.float32_matmul}" if run.float32_matmul != "highest" else ""
        torch.backends.cudnn.allow_tf32 = run.float32_matmul != "highest"      # convolutions would round to TF32 unasked
    if run.exact:
        exact.set_deterministic(world.device)
    elif state is not None and state.threads and state.world_size == world.size and world.device.type == "cpu":
        torch.set_num_threads(state.threads)         # another number sums in another order
    model = model.to(world.device, chosen.weights)
    if run.compile:
        compile_model(model, world)
    if world.is_main:
        introduce(run, world, splits, model, f"{chosen.name} ({why})", state)
    mean, std = model.config.mean, model.config.std
    return splits, model, chosen, lambda images: transforms.normalise(images, mean, std, chosen.weights)


def compile_model(model, world) -> None:
    """For the sizes it will be called with: the first call of each compiles. Raises ConfigError where nothing can be compiled."""
    import logging

    import torch

    on_gpu = world.device.type == "cuda"
    if not on_gpu:                          # builds for GPUs would warn that there is none
        logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    try:
        torch.compile(lambda numbers: numbers + 1)(torch.zeros(2, device=world.device))
    except Exception as error:              # of many kinds, from Dynamo, Inductor and the compilers they call
        inner = getattr(error, "inner_exception", error)
        reason = f"{type(inner).__name__}: {(str(inner).strip().splitlines() or [''])[0][:200]}"
        raise configs.ConfigError(f"--compile: PyTorch cannot compile here ({reason}); it needs a C++ compiler such as g++"
                                  f"{' and Triton' * on_gpu}; or leave --compile out") from error
    model.compile(dynamic=False)


def tell_compiled(world, say, sizes: set[int]):
    """For metrics.evaluate -> what tells of the sizes of batches that are not in `sizes` yet"""
    def told(images: int, seconds: float) -> None:
        if world.is_main and images not in sizes:
            say(f"compiled in {seconds:.0f} s, for {images} images an evaluation batch")
        sizes.add(images)

    return told


def introduce(run, world, splits, model, precision: str, state) -> None:
    """The first words of a run: where it happens, with what."""
    import torch

    place = (torch.cuda.get_device_name(world.device) if world.device.type == "cuda"
             else f"CPU with {torch.get_num_threads()} threads")
    count = sum(parameter.numel() for parameter in model.parameters())
    own_size = [f"--{key} {run[key]}" for key in configs.SIZES if run[key] is not None]
    source = "from the checkpoint" if state else model.load_report or (
        "from scratch" + (f" (nobody has published them for {' '.join(own_size)})" if own_size else ""))
    print(f"device: {world.size} x {place}\nprecision: {precision}")
    prepared = f" (prepared, the shorter side {splits.prepared} px at most)" if splits.prepared else ""
    print(f"data: {run.dataset}{prepared}, {len(splits.classes)} classes, {len(splits.train)} images to train on, "
          f"{len(splits.val)} {splits.val_name}"
          + (f", {len(splits.test)} test" if splits.test is not splits.val else ""))
    size = "x".join(map(str, model.img_size))
    print(f"model: {run.model_type} at {size} px, {count:,} parameters\nweights: {source}", flush=True)
    if 0 < splits.prepared < max(model.img_size):
        print(f"warning: the images were prepared for less than the model's {size} px: they are enlarged; prepare them with "
              f"--prepare_size {int(max(model.img_size) / 0.875)}", flush=True)


def same_data(splits, state, run, world) -> None:
    """Raises CheckpointError unless the data are those of the checkpoint's run, as far as that can be told cheaply."""
    from utils.data.splits import fingerprint
    from utils.run import checkpoint

    if list(splits.classes) != state.classes:
        raise checkpoint.CheckpointError(
            f"the checkpoint has {len(state.classes)} classes ({', '.join(state.classes[:3])}, ...), the data in "
            f"{run.data_dir} have {len(splits.classes)} ({', '.join(splits.classes[:3])}, ...): not the same task")
    if run.eval_only:
        return
    told = ""
    if len(splits.train) != state.train_images:
        told = f"the run has trained on {state.train_images} images, {run.data_dir} now holds {len(splits.train)}"
    elif state.data and fingerprint(splits.train) != state.data:
        told = f"labels or names of the training images in {run.data_dir} are not those that the run began with"
    if told and not run.override:
        raise checkpoint.CheckpointError(f"{told}: the order of the samples would be another; restore the data, start a new run, "
                                         "or add --override")
    if told and world.is_main:
        print(f"warning: {told}: the order of the samples is another from here on (--override)")


def pretrained_file(run) -> Path | None:
    """What --pretrained_dir means: a path, a published name, 'auto' (the model's own published file) or 'none'."""
    from models import find_checkpoint
    from utils.run import folder as run_folder

    if run.pretrained_dir == "none":
        return None
    if run.pretrained_dir != "auto":
        return find_checkpoint(run_folder.weights_of(run.pretrained_dir))
    default = configs.DEFAULT_WEIGHTS.get(run.model_type, run.model_type)
    return find_checkpoint(os.path.relpath(ROOT / default) if default.startswith("assets/") else default)


def adopt_architecture(run, given, path: Path | None) -> None:
    """A run of ours that is given as a start tells its architecture, unless another one is given.

    Where its head is kept the task is the same: the run also tells how it looks at images, and its sigmoid attention.
    """
    from models import run_settings

    settings = run_settings(path) if path is not None else None
    architecture = ("model_type", *configs.SIZES, "in_channels", "classifier")
    same = settings and all(given[key] == settings.get(key) for key in architecture if key in given)
    keys = (*architecture, "img_size", "dropout_rate", "sigmoid_attention") if same else ()
    if run.head == "keep":
        keys = dict.fromkeys((*keys, "img_size", "eval_crop", "interpolation", "sigmoid_attention"))
    with run.ignore_type():                          # a side may become height and width
        for key in keys if settings else ():
            if key not in given:
                value = settings.get(key, configs.FLAGS[key][1])
                run[key] = tuple(value) if isinstance(value, list) else value
        if run.attention_edits and not run.sigmoid_attention:
            run.sigmoid_attention = "last"           # the same model: without edits it computes what it did


def check_head(run, splits, path: Path) -> None:
    """Raises ConfigError unless the file has a head with as many classes as the data."""
    from models import checkpoint_head

    classes, _ = checkpoint_head(path)
    if classes != len(splits.classes):
        why = "--eval_only" if run.eval_only else "--attention_edits" if run.attention_edits else "--head keep"
        other = "--resume_path output/NAME, or " if run.eval_only else ""
        raise configs.ConfigError(f"{why}: the head of {path} has {classes} classes, the data {len(splits.classes)}: give "
                                  f"{other}a --pretrained_dir with a head for these data")


def transforms_of(run, model, splits):
    """-> (for training, for evaluation): PIL image -> uint8 (channels, height, width)"""
    from utils.data import transforms

    shared = {"channels": model.config.in_channels, "interpolation": run.interpolation}
    return (transforms.train_transform(
        run.augmentation, model.img_size, flip=splits.can_flip, crop_scale=run.crop_scale, crop_padding=run.crop_padding,
        rotation=run.rotation, color_jitter=run.color_jitter, randaugment_ops=run.randaugment_ops,
        randaugment_magnitude=run.randaugment_magnitude, random_erasing=run.random_erasing, **shared),
        transforms.eval_transform(model.img_size, crop=run.eval_crop, **shared))


def loading_of(run, world) -> dict:
    """What the training and evaluation loaders share."""
    from utils.data import loader as data

    workers = run.num_workers
    if workers is None:
        workers = data.default_workers(run.dataset, world.local_size, world.device.type)
    return {"num_workers": workers, "pin_memory": world.device.type == "cuda", "timeout_s": run.worker_timeout,
            "device": world.device, "held_workers": 0 if run.num_workers is None else None}      # drawing takes no time


def optimizer_of(run, model, world):
    """The parameters that are trained, in their groups, and what updates them."""
    from utils.training import optimizer

    facts = {"layer_index": model.depth_of, "depth": model.depth, "head_names": model.head_names()}
    _, frozen = optimizer.choose_trainable(model.named_parameters(), train_layers=run.train_layers,
                                       freeze=run.freeze.split(",") if run.freeze else [], **facts)
    if frozen and world.is_main:
        count = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        print(f"training {count:,} parameters; frozen: {len(frozen)} arrays ({frozen[0]}, ..., {frozen[-1]})")
        if run.pretrained_dir == "none":
            print("warning: what is frozen has random weights: give a --pretrained_dir")
    head_scale = 1.0 if run.head_learning_rate is None else run.head_learning_rate / run.learning_rate
    groups = optimizer.parameter_groups(
        model.named_parameters(), weight_decay=run.weight_decay, decay_matrices_only=run.decay_on == "matrices",
        layer_decay=run.layer_decay, head_scale=head_scale, **facts)
    return optimizer.build_optimizer(run.optimizer, groups, run.learning_rate, momentum=run.momentum)


def criterion_of(run, splits, model, chosen, world, attention):
    """The loss: labels smoothed, weighed and mixed as the run says, and the parts of the teacher and of edited attention."""
    import torch

    from utils.data import mixup
    from utils.training import criterion, task

    classes, weights, mixer = len(splits.classes), None, None
    if run.class_weights == "balanced":
        weights = criterion.balanced_weights(torch.as_tensor(splits.train.labels), classes).to(world.device)
    elif run.class_weights != "none":
        weights = torch.tensor([float(number) for number in run.class_weights.split(",")], device=world.device)
        if len(weights) != classes:
            raise configs.ConfigError(f"--class_weights has {len(weights)} numbers, the data have {classes} classes")
    if run.mixup_alpha or run.cutmix_alpha:
        mixer = mixup.Mixer(classes, run.train_batch_size, run.seed, mixup_alpha=run.mixup_alpha, cutmix_alpha=run.cutmix_alpha,
                          probability=run.mix_probability, switch_probability=run.mix_switch_probability,
                          stop_at=run.num_steps - run.mix_off_steps)
    teacher = None
    if run.distillation != "none":
        teacher = teacher_of(run, splits, model, chosen, world)
        model.distilling = True                     # a model with a distillation head answers with both while it trains
    return task.SINGLE_LABEL.criterion(run.label_smoothing, weights, mixer, run.distillation, teacher, run.distillation_alpha,
                                       run.distillation_temperature, attention)


def teacher_of(run, splits, model, chosen, world):
    """images (B, C, height, width) of 0..255, as the student gets them -> the teacher's logits"""
    import torch
    from torch.nn import functional as F

    from models import load_model
    from utils import distributed
    from utils.data import transforms
    from utils.run import folder as run_folder

    path = run_folder.weights_of(run.teacher)
    if not Path(path).is_file():
        raise configs.ConfigError(f"--teacher {path}: no such file; give a run folder or a checkpoint of this project")
    teacher = distributed.first_on_node(world, lambda: load_model(path)).to(world.device, chosen.weights).eval()
    if world.is_main:
        print(f"teacher: {path}, {sum(parameter.numel() for parameter in teacher.parameters()):,} parameters")
    if list(teacher.classes) != list(splits.classes):
        raise configs.ConfigError(f"--teacher {path} has {len(teacher.classes)} classes ({', '.join(teacher.classes[:3])}, ...), "
                                  f"the data {len(splits.classes)} ({', '.join(splits.classes[:3])}, ...): not the same task")
    channels = teacher.config.in_channels
    if channels not in (model.config.in_channels, 3):
        raise configs.ConfigError(f"--teacher {path} takes grey images, the student colour: train with --in_channels 1")

    @torch.no_grad()
    def teach(images):
        images = images.float().expand(-1, channels, -1, -1)
        if images.shape[-2:] != teacher.img_size:
            images = F.interpolate(images, teacher.img_size, mode="bilinear", antialias=True)
        with chosen.autocast(world.device):
            return teacher(transforms.normalise(images, teacher.config.mean, teacher.config.std, chosen.weights))

    return teach


def lesson_of(run, splits, held_out, model, order, world, state):
    """-> (the edits by index of training image, those of the `held_out` split, what the step does with the first).

    (None, {}, None) without --attention_edits. Raises ConfigError or EditError, on every process.
    """
    from models import record_patch_logits
    from utils import distributed
    from utils.attention import edits
    from utils.run import checkpoint
    from utils.training import criterion

    if not run.attention_edits:
        return None, {}, None
    folder = Path(run.attention_edits)
    found, others = distributed.first_on_node(world, lambda: (edits.find(folder, splits.train), edits.find(folder, held_out)))
    files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*.json"))
    if not found:
        names = f", such as {files[0]}," if files else ""
        raise configs.ConfigError(f"--attention_edits {folder}: none of its {len(files)} files{names} is an edit of an image "
                                  f"that this run trains on, such as {splits.train.name(0)}; python annotate.py --checkpoint "
                                  "output/NAME makes them")
    if state is not None and state.first.get("edits") not in (None, edits.digest(found)):
        raise checkpoint.CheckpointError(f"the edits in {folder} are not those that the run began with: restore them, or start a "
                                         "new run with --pretrained_dir in place of --resume_path")
    layers = ", ".join(map(str, model.sigmoid_layers))
    if not any(parameter.requires_grad and decides_attention(model, name) for name, parameter in model.named_parameters()):
        raise configs.ConfigError(f"--attention_edits: nothing that the attention of layer {layers} comes from is trained: train "
                                  "more --train_layers, or --freeze less")
    if world.is_main:
        left = len(files) - len(found)
        print(f"attention: edits of {len(found)} of {len(splits.train)} training images teach layer {layers} of "
              f"{len(model.blocks) + model.config.class_layers}, weight {run.attention_loss_weight:g}"
              + (f"; {left} other files in {folder} do not: of held-out images ({len(others)}), of no image of these data, or "
                 "without an edited patch" if left else ""))
    return found, others, criterion.AttentionSupervision(
        run.attention_loss_weight, lambda: record_patch_logits(model),
        lambda step: sum(key.index in found for key in order.keys_of(step)))


def decides_attention(model, name: str) -> bool:
    """Whether the logits of the last layer with sigmoid attention depend on this parameter."""
    depth, last = model.depth_of(name), max(model.sigmoid_layers)
    return depth < last or (depth == last and any(part in name for part in (".norm1.", ".attn.q", ".attn.k.")))


def shown_images(splits, held_out, edits, others) -> list[tuple]:
    """Whose attention is reported before and after: (what it is, split, index, its edit or None), taught and held-out images.

    Of the held-out ones those that have edits too, which nothing learns from, come first.
    """
    (split, name), quarters = held_out, range(SHOWN)
    taught = sorted(edits)
    taught = dict.fromkeys(taught[number * len(taught) // SHOWN] for number in quarters)
    chosen = list(dict.fromkeys([*sorted(others), *(number * len(split) // SHOWN for number in quarters)]))[:SHOWN]
    return ([("taught", splits.train, index, edits[index]) for index in taught]
            + [(name, split, index, others.get(index)) for index in chosen])


def look(shown: list[tuple], model, transform, prepare, precision, world) -> dict:
    """-> names, pixels (n, channels, height, width) uint8, probabilities (n, C), the last sigmoid attention (n, h, w)"""
    import torch

    from models import record_patch_logits

    was_training = model.training
    model.eval()
    pixels = torch.stack([transform(split[index][0]) for _, split, index, _ in shown])
    with torch.no_grad(), precision.autocast(world.device), record_patch_logits(model) as logits:
        probabilities = model(prepare(pixels.to(world.device))).float().softmax(dim=1)
    model.train(was_training)
    attention = logits[-1].sigmoid().mean(dim=(1, 2)).unflatten(-1, model.grid)
    return {"names": [f"{kind}: {split.name(index)}" for kind, split, index, _ in shown], "pixels": pixels,
            "probabilities": probabilities.cpu(), "attention": attention.cpu()}


def draw_attention(run, folder, model, classes, shown: list[tuple], before: dict | None, after: dict) -> None:
    """attention.png: for each image the attention before, the edit, the attention after, and what was predicted."""
    import numpy as np

    from utils.attention.editor import session as editing
    from utils.data import transforms
    from utils.report import pictures, plots

    if before is None or before["names"] != after["names"]:
        (folder / ATTENTION_FILE).unlink(missing_ok=True)
        print("attention: other held-out images have edits now than when the run began: no picture of before and after")
        return

    def seen(side: dict, number: int, label: int) -> tuple:
        probabilities = side["probabilities"][number]
        return side["attention"][number].numpy(), classes[int(probabilities.argmax())], float(probabilities[label])

    rows = []
    for number, (kind, split, index, edit) in enumerate(shown):
        label, image = int(split.labels[index]), after["pixels"][number].permute(1, 2, 0).numpy()
        marked = None
        if edit is not None:                         # made on another crop or grid, perhaps
            region = transforms.eval_region(split[index][0].size[::-1], model.img_size, run.eval_crop)
            edit = editing.fitted(edit, model.grid, region)
            marked = np.where(edit.edited, edit.values, np.nan)
        rows.append(pictures.Taught(kind, image, classes[label], seen(before, number, label), seen(after, number, label), marked))
    title = (f"{run.name}: attention of layer {model.sigmoid_layers[-1]} before and after {run.num_steps} steps "
             f"with weight {run.attention_loss_weight:g}")
    plots.save(pictures.before_and_after(rows, title), folder / ATTENTION_FILE)


def train(given: dict, run, world, state, path, stop) -> int:
    """-> exit code: 0, or that of a run which was asked to stop"""
    from utils import distributed
    from utils.run import checkpoint
    from utils.run.loggers import check_wandb
    from utils.training import trainer as engine

    if run.wandb:
        check_wandb()
    session = Session(given, run, world, state, path, stop)
    try:
        with distributed.watching(world, lambda: f"step {session.trainer.step + 1}"):
            try:
                session.go()
            except _Asked:
                return session.stopped()
    except (engine.DivergedError, checkpoint.NonFiniteError) as error:
        raise session.diverged(error) from error
    finally:
        session.close()
    session.tell_end()
    return 0


class _Asked(Exception):
    """The run was asked to stop."""


class Session:
    """A run from here to its end, as one of its processes sees it: the objects of the loop, and the loop."""

    def __init__(self, given: dict, run, world, state, path, stop):
        from utils.data.splits import fingerprint
        from utils.run import saver
        from utils.training import exact, optimizer, precision
        from utils.training import trainer as engine
        from utils.training.ema import Ema

        self.started = time.monotonic()
        self.run, self.world, self.stop, self.began_at = run, world, stop, state.step if state else 0
        self.splits, self.model, self.chosen, self.prepare = build(given, run, world, state)
        splits, model = self.splits, self.model
        self.identity = fingerprint(splits.train)
        self.optimizer = optimizer_of(run, model, world)
        self.scaler = precision.LossScaler(self.chosen, world.device, run.loss_scale)
        self.ema = Ema(model, run.ema_decay) if run.ema_decay else None
        if run.compile and self.ema:
            self.ema.model.compile(dynamic=False)
        self.first, self.seconds, self.sizes, progress = {}, 0.0, set(), engine.Progress()
        if state is not None:
            optimizer.load_state(self.optimizer, state.optimizer)
            if state.scaler:
                self.scaler.load_state_dict(state.scaler)
            if self.ema is not None:
                self.ema.load_state_dict(state.ema)
            self.first, self.seconds = state.first, state.seconds
            state.model, state.optimizer, state.ema = {}, {}, {}       # a copy of them is in memory now
            progress = engine.Progress(state.step, state.updates, state.skips)

        criterion = criterion_of(run, splits, model, self.chosen, world, self.feed(state))
        self.saver = None
        settings = engine.StepSettings(run.train_batch_size, run.gradient_accumulation_steps, run.max_grad_norm, run.seed,
                                       self.learning_rate, run.non_finite)
        self.trainer = engine.Trainer(
            self.wrapped(), self.optimizer, criterion, self.scaler, self.chosen, world, self.prepare, settings, ema=self.ema,
            reducer=exact.ExactReducer(model, world) if run.exact else None, progress=progress, requests=self.requests)
        self.open(given, state, path)
        self.saver = saver.Saver(self.folder, run.keep_checkpoints, say=self.report.say) if world.is_main else None

    def feed(self, state):
        """What there is to see: the loaders, and which splits are evaluated. -> AttentionSupervision or None"""
        from utils.data import loader as data
        from utils.data import prefetch

        run, world, splits, model = self.run, self.world, self.splits, self.model
        self.loading = loading_of(run, world)
        train_transform, self.eval_transform = transforms_of(run, model, splits)
        self.order = data.StepOrder(len(splits.train), run.train_batch_size, world.size * run.gradient_accumulation_steps,
                                    world.rank, world.size, run.seed, self.began_at, run.num_steps)
        val, test = (splits.val, splits.val_name), (splits.test, "test")
        # Which split is looked at in the end, and which during training, under which name; None: none is.
        self.final = val if run.test == "never" else test
        self.watched = val if splits.test is not splits.val or run.test == "always" else None
        self.edits, self.others, lesson = lesson_of(run, splits, self.final[0], model, self.order, world, state)
        self.loader = data.train_loader(splits.train, self.order, transform=train_transform, seed=run.seed, edits=self.edits,
                                        grid=model.grid, bad_images=run.bad_images, **self.loading)
        self.batches = prefetch.ahead(self.loader, world.device)
        if world.is_main:
            workers, why = self.loader.num_workers, self.loader.not_held
            print("input: " + (f"{workers} worker process{'es' * (workers > 1)} a rank; " if workers else "")
                  + (f"image by image: {why}" if why else f"whole batches, of images held on the {world.device.type.upper()}"))
        return lesson

    def wrapped(self):
        """The model as it is trained."""
        import torch

        from utils import distributed
        from utils.training import precision

        run, world, model = self.run, self.world, self.model
        if run.exact:
            distributed.share_weights(model, world)
        wrapped = model if run.exact else distributed.wrap(model, world, self.chosen.half_gradients)
        if run.compile or wrapped is not model:
            begun, images = time.monotonic(), self.order.micro_size if run.compile else 2
            if run.compile and world.is_main:
                print(f"compiling for {images} images a micro-step: a minute or so, less where it was done before", flush=True)
            precision.warm_up(wrapped, torch.zeros(images, model.config.in_channels, *model.img_size, device=world.device,
                                                   dtype=self.chosen.weights), self.chosen)
            if run.compile:
                if world.is_main:
                    print(f"compiled in {time.monotonic() - begun:.0f} s, for {images} images a micro-step", flush=True)
                gc.collect()                       # of what compiling leaves, some holds memory, and would stay for good
        return wrapped

    def open(self, given: dict, state, path) -> None:
        """The run's folder, and what is told there."""
        from utils import distributed, process
        from utils.run import folder as run_folder
        from utils.run import profiling
        from utils.run.loggers import BadImages, Report

        run, world = self.run, self.world
        self.folder, self.best = distributed.on_main(world, lambda: open_folder(given, run, state, path))
        if world.is_main and (place := process.launch_file("folder")) is not None:
            place.write_text(str(self.folder))                     # where processes go on that torchrun starts anew
        run.name, run.output_dir = self.folder.name, str(self.folder.parent)
        self.log_folder = Path(run.log_dir) / run.name
        distributed.on_main(world, lambda: run_folder.write_config(self.folder, run.to_dict(), self.model.config.to_dict(),
                                                                   world.size))
        if world.is_main:
            print("\n  ".join(["settings:", *textwrap.wrap(configs.as_flags(run), 100, break_on_hyphens=False)]))
            print(f"run folder: {self.folder}", flush=True)
        self.told = distributed.on_main(world, lambda: {
            (event["step"], event["split"]) for event in run_folder.read_log(self.folder) if event["event"] == "eval"})
        self.report = Report(self.folder if world.is_main else None, self.log_folder, self.began_at, run.num_steps, run.wandb,
                             run.to_dict())
        self.listed = BadImages(self.folder, self.report.say) if world.is_main else None
        self.profile = profiling.Profile(self.folder, world.device, self.report.say) if run.profile and world.is_main else None
        self.report.session("resume" if state else "start", self.began_at, world_size=world.size)
        # A branch begins with what it came from.
        self.branch = state is not None and self.folder.resolve() != path.parent.resolve()
        self.result, self.stop.saves = None, True

    # ------------------------------------------------------------------------------------------------ the loop

    def go(self) -> None:
        """To the end of the run. Raises _Asked."""
        from utils import distributed
        from utils.run import checkpoint

        run = self.run
        collect_garbage()
        if self.branch:
            self.save(checkpoint.step_path(self.folder, self.began_at))
        before = (self.splits.test, "test") if run.test == "always" else self.watched
        if not self.first and before and self.began_at == 0:
            start = self.evaluate(before[0])
            self.first = {"accuracy": start.accuracy, "split": before[1]}
            self.report.evaluation(0, before[1], start)
        if self.edits and self.world.is_main:
            self.look_before()
        while True:
            # A run that was stopped between a step and its evaluation makes up for it here.
            files = self.evaluate_if_due()
            if self.trainer.step > self.began_at and self.is_due(run.save_every):
                files.append(checkpoint.step_path(self.folder, self.trainer.step))
            if files:
                self.save(*files)
            if self.trainer.step == run.num_steps:
                break
            self.train_step()
        if self.watched is None or self.watched[0] is not self.final[0] or run.confusion_matrix or self.result is None:
            self.result = self.evaluate(self.final[0], run.confusion_matrix)
            self.tell_evaluation(self.final[1], self.result)       # an earlier session may have ended just before or after it
        if run.eval_train and (self.trainer.step, "train") not in self.told:
            self.tell_evaluation("train", self.evaluate(self.splits.train))
        distributed.on_main(self.world, lambda: self.saver.close())
        self.report.session("end", self.trainer.step, seconds=round(self.seconds_so_far(), 2))

    def is_due(self, every: int, ahead: int = 0) -> bool:
        from utils.training.optimizer import is_time

        return is_time(self.trainer.step + ahead, every, self.run.num_steps)

    def train_step(self) -> None:
        """Raises _Asked."""
        from utils.training import trainer as engine

        asked, now = False, any(self.is_due(every, ahead=1) for every in (self.run.eval_every, self.run.save_every))
        try:
            steps = self.trainer.train_step(self.batches, flush=now)
        except ValueError:                     # of this step, or of the next one's images: what is known of those before is told
            with contextlib.suppress(engine.DivergedError):
                for step in self.trainer.finish():
                    self.report.train(step)
            raise
        for step in steps:
            asked |= self.tell_step(step)
        if self.world.is_main and self.trainer.step == self.began_at + 1:
            self.saver.reserve(self.snapshot())
        if self.profile:
            self.profile.step()
        if asked:
            raise _Asked

    def tell_step(self, step) -> bool:
        """-> whether the run is to stop"""
        from utils import distributed

        self.report.train(step)
        if step.requests.replaced:
            list_bad_images(self.run, self.listed, self.world, self.report, step.replaced, len(self.splits.train))
        if step.requests.save_failed:
            distributed.on_main(self.world, lambda: self.saver.end_if_failed())
        return bool(step.requests.stop)

    def learning_rate(self, update: int) -> float:
        from utils.training.optimizer import lr_multiplier

        run = self.run
        return run.learning_rate * lr_multiplier(
            update, run.warmup_steps, run.num_steps, run.decay_type, floor=share(run.min_learning_rate, run),
            start=share(run.warmup_learning_rate, run), milestones=run.decay_milestones or ())

    def requests(self) -> tuple:
        """Of this process, at the end of a step: was it asked to stop, have saves failed."""
        return self.stop.requested(), self.saver is not None and self.saver.failed

    def evaluate_if_due(self) -> list[Path]:
        """-> best.pt, and what belongs to it, where it is to be saved"""
        from utils.run import checkpoint

        step, files = self.trainer.step, []
        if not (step and self.watched and self.is_due(self.run.eval_every)) or (step, self.watched[1]) in self.told:
            return files
        self.result = self.evaluate(self.watched[0])
        self.tell_evaluation(self.watched[1], self.result)
        if self.world.is_main and self.saver.best_is_lost:
            self.best = {}
        if self.result.accuracy > self.best.get("accuracy", -1.0):
            self.best = {"step": step, "accuracy": self.result.accuracy}
            files.append(self.folder / checkpoint.BEST_FILE)
        if step == self.began_at:
            files.append(checkpoint.step_path(self.folder, step))
        return files

    def tell_evaluation(self, split: str, result) -> None:
        """Once for a step."""
        if (self.trainer.step, split) not in self.told:
            self.report.evaluation(self.trainer.step, split, result)
            self.told.add((self.trainer.step, split))

    def evaluate(self, split, confusion: bool = False):
        """-> EvalMetrics. Raises _Asked on every process if one was asked to stop meanwhile."""
        from utils.data import loader as data
        from utils.training import evaluation

        run, world = self.run, self.world
        loader = data.eval_loader(split, transform=self.eval_transform, batch_size=run.eval_batch_size, rank=world.rank,
                                  world_size=world.size, **self.loading)
        judged = self.model if self.ema is None else self.ema.model
        result = evaluation.evaluate(judged, loader, self.prepare, self.chosen, world, len(self.splits.classes),
                                     confusion=confusion, stop_requested=self.stop.requested,
                                     on_compiled=tell_compiled(world, self.report.say, self.sizes) if run.compile else None)
        if result is None:
            raise _Asked
        return result

    # --------------------------------------------------------------------------------------- saving, and the end

    def seconds_so_far(self) -> float:
        return self.seconds + time.monotonic() - self.started

    def snapshot(self):
        import torch

        from utils.run import checkpoint

        trainer = self.trainer
        return checkpoint.RunState(
            *trainer.progress, self.model.state_dict(), self.optimizer.state_dict(),
            self.scaler.state_dict(), self.best, self.first, self.run.to_dict(), self.model.config.to_dict(),
            list(self.splits.classes), len(self.splits.train), self.seconds_so_far(), self.ema.state_dict() if self.ema else {},
            world_size=self.world.size, threads=torch.get_num_threads(), data=self.identity)

    def save(self, *files: Path) -> None:
        """Raises NonFiniteError, on every process: they stop together."""
        from utils.run import checkpoint

        if self.world.is_main:
            self.saver.save(list(files), self.snapshot())
        else:
            checkpoint.check_finite(self.model.state_dict())
            checkpoint.check_finite(self.ema.state_dict() if self.ema else {})

    def stopped(self) -> int:
        """The end of a run that was asked to stop: what has been trained is saved. -> exit code"""
        from utils import distributed, process
        from utils.run import checkpoint

        for step in self.trainer.finish():
            self.tell_step(step)
        step = self.trainer.step
        if step:
            self.save(checkpoint.step_path(self.folder, step))
        distributed.on_main(self.world, lambda: self.saver.close())
        self.report.session("preempted", step)
        if self.world.is_main:
            went_on = f"; RESUME_PATH={shlex.quote(str(self.folder))} bash train.sh goes on" if step else ": nothing to save"
            print(f"stopped as asked, after step {step} of {self.run.num_steps}{went_on}", flush=True)
        return process.PREEMPTED

    def diverged(self, error: Exception) -> Exception:
        """The error, with what a user needs to go on."""
        from utils.run import checkpoint
        from utils.run import folder as run_folder
        from utils.training import trainer as engine

        step = self.trainer.step
        self.report.session("diverged", step + 1, samples=[key.index for key in self.order.keys_of(step)])
        if self.world.is_main:
            self.saver.wait()
        saved = [str(file) for file in checkpoint.step_files(self.folder)[:1]] if self.world.is_main else []
        return engine.DivergedError(f"{error}; last good checkpoint: {', '.join(saved) or 'none yet'}; "
                                    f"{self.folder / run_folder.LOG_FILE} lists all samples of the step")

    def close(self) -> None:
        """Whatever has happened."""
        self.loader.close()
        if self.profile:
            self.profile.close()
        if self.world.is_main:
            self.saver.wait()
            self.listed.close()
        self.report.close()

    # ----------------------------------------------------------------------------------- edited attention, last words

    def look_before(self) -> None:
        from utils.attention.edits import digest

        self.shown = shown_images(self.splits, self.final, self.edits, self.others)
        if self.began_at == 0:
            self.first = self.first | {"edits": digest(self.edits), "attention": look(
                self.shown, self.model, self.eval_transform, self.prepare, self.chosen, self.world)}

    def tell_end(self) -> None:
        if not self.world.is_main:
            return
        if self.edits:
            judged = self.model if self.ema is None else self.ema.model
            draw_attention(self.run, self.folder, self.model, self.splits.classes, self.shown, self.first.get("attention"),
                           look(self.shown, judged, self.eval_transform, self.prepare, self.chosen, self.world))
        summarise(self, time.monotonic() - self.started)


def list_bad_images(run, listed, world, report, replaced, images: int) -> None:
    """Adds what was replaced in this step to bad_images.txt. Raises DataError on every process when there are too many."""
    from utils import distributed
    from utils.data.datasets import DataError
    from utils.run import folder as run_folder

    folder = Path(run.output_dir) / run.name
    lines = {reason for bad in distributed.gather(world, list(replaced)) for _, reason in bad}
    new, count = distributed.on_main(world, lambda: listed.add(lines))
    for line in new if world.is_main else ():
        report.say(f"warning: replaced by the next readable image: {line}")
    if count > run.max_bad_images * images:
        raise DataError(f"{count} of {images} training images cannot be read, a share of more than --max_bad_images "
                        f"{run.max_bad_images:g} (raise it to accept that); {folder / run_folder.BAD_IMAGES_FILE} lists them")


def share(rate: float, run) -> float:
    """Of the peak learning rate."""
    return rate / run.learning_rate if run.learning_rate else 0.0


def open_folder(given: dict, run, state, path) -> tuple[Path, dict]:
    """-> (the run's folder, its best evaluation so far: that of best.pt there, or {})"""
    from utils.run import checkpoint
    from utils.run import folder as run_folder

    if state is None:
        return run_folder.create(run.output_dir, run.name, run.dataset), {}
    folder = run_folder.resume(path, state.step, given.get("output_dir"), given.get("name"))
    try:
        kept = checkpoint.load(folder / checkpoint.BEST_FILE).best
    except checkpoint.CheckpointError:
        kept = {}
    return folder, kept if kept.get("step", 0) <= state.step else {}       # a later one is evaluated again


def evaluate_only(given, run, world, state, path) -> None:
    from utils import distributed
    from utils.data import loader as data
    from utils.training import evaluation

    splits, model, chosen, prepare = build(given, run, world, state)
    collect_garbage()
    _, eval_transform = transforms_of(run, model, splits)
    sizes: set[int] = set()

    def evaluate(split):
        loader = data.eval_loader(split, transform=eval_transform, batch_size=run.eval_batch_size, rank=world.rank,
                                  world_size=world.size, **loading_of(run, world))
        return evaluation.evaluate(model, loader, prepare, chosen, world, len(splits.classes), confusion=run.confusion_matrix,
                                   on_compiled=tell_compiled(world, print, sizes) if run.compile else None)

    last = (splits.val_name, splits.val) if run.test == "never" else ("test", splits.test)
    for name, split in [("train", splits.train), last] if run.eval_train else [last]:
        with distributed.watching(world, lambda name=name: f"evaluation on {name}"):
            result = evaluate(split)
        if world.is_main:
            print(f"{name} accuracy {result.accuracy:.2%}, top-5 {result.top5:.2%}, loss {result.loss:.4f} "
                  f"({result.images} images)")
    if world.is_main:
        print("  " + "\n  ".join(details(result, splits.classes)))
        if run.confusion_matrix:
            write_confusion(path.parent if path else Path("."), result, splits.classes)


def details(result, classes) -> list[str]:
    """What an evaluation says beside its accuracy: two lines."""
    last = max(1, min(len(result.top), len(classes) - 1))           # among all classes is every image
    return [f"top-1 to top-{last} {' '.join(f'{value:.2%}' for value in result.top[:last])}",
            f"probability    {result.true_probability:.4f} of the true class on average; "
            f"calibration error {result.calibration_error:.4f}"]


def write_confusion(folder: Path, result, classes) -> None:
    from utils.training import evaluation

    for file in evaluation.write_confusion(folder, result.confusion, classes):
        print(f"  wrote {file}")


def summarise(session: Session, seconds: float) -> None:
    """The last words of a run: what came out, where it is, and what one might type next."""
    from utils.report import plots
    from utils.run import checkpoint, profiling
    from utils.run import folder as run_folder

    run, splits, folder, first = session.run, session.splits, session.folder, session.first
    best = session.best if session.saver.best_is_saved else {}
    name, result = session.final[1], session.result
    curves = folder / "curves.png"
    events = run_folder.read_log(folder)
    plots.save(plots.learning_curves(events, f"{run.name}: {run.model_type} on {run.dataset}"), curves)
    newest = (checkpoint.step_files(folder) or [folder / checkpoint.BEST_FILE])[0]
    python = sys.executable
    if Path(python).is_relative_to(Path.cwd()):
        python = os.path.relpath(python)
    elif shutil.which("python") and os.path.samefile(shutil.which("python"), python):
        python = "python"
    print(f"\nDone: step {run.num_steps} of {run.num_steps}, {seconds:.0f} s.")
    before = f"{first['accuracy']:.2%} before, " if first.get("split", "test") == name and "accuracy" in first else ""
    if "accuracy" in first and not before:
        print(f"  {first['split'] + ' accuracy':<14} {first['accuracy']:.2%} before")
    print(f"  {name + ' accuracy':<14} {before}{result.accuracy:.2%} after ({result.images} images)")
    print("  " + "\n  ".join(details(result, splits.classes)))
    if best:
        print(f"  best           {best['accuracy']:.2%} on {splits.val_name} at step {best['step']}: "
              f"{folder / checkpoint.BEST_FILE}")
    steps = [event for event in events if event["event"] == "train"][-max(run.eval_every, 20):]
    if steps and "accuracy" in steps[0]:
        mean = sum(event["accuracy"] for event in steps) / len(steps)
        print(f"  train accuracy {mean:.2%} on the images of the last {len(steps)} steps, as they were fed")
    if run.eval_train:
        whole = [event for event in events if event["event"] == "eval" and event["split"] == "train"][-1]
        print(f"                 {whole['accuracy']:.2%} on all {whole['images']} training images, without augmentation")
    world, config = session.world, session.model.config
    for number, line in enumerate(profiling.summary(events, session.model, (config.in_channels, *session.model.img_size),
                                                session.chosen.compute, world.device, world.size, world.local_size)):
        print(f"  {'' if number else 'speed':<14} {line}")
    print(f"  checkpoint     {newest}")
    bad = folder / run_folder.BAD_IMAGES_FILE
    if bad.exists():
        print(f"  bad images     {len(bad.read_text().splitlines())} of the training images were replaced: {bad}")
    print(f"  curves         {curves}")
    taught = [event["attention_loss"] for event in events if event.get("attention_loss") is not None]
    if taught:
        begun, ended = (sum(some) / len(some) for some in (taught[:20], taught[-20:]))
        print(f"  attention loss {begun:.4f} in the first steps, {ended:.4f} in the last: mean square of attention - edit")
    if (folder / ATTENTION_FILE).exists():
        print(f"  attention      {folder / ATTENTION_FILE}: before, edits, after")
    print(f"  TensorBoard    {session.log_folder}  ({python} -m tensorboard.main --logdir {run.log_dir})")
    if run.confusion_matrix:
        write_confusion(folder, result, splits.classes)
    print("Next:")
    print(f"  {python} train.py --eval_only --resume_path {shlex.quote(str(folder / checkpoint.BEST_FILE if best else newest))}")
    print(f"  RESUME_PATH={shlex.quote(str(folder))} NUM_STEPS={2 * run.num_steps} bash train.sh")
    if run.attention_edits:
        print("  the same with --attention_loss_weight 0 and another --name     # what did the edits do, what the steps?")
    print(f"  {python} visualize.py attention --checkpoint {shlex.quote(str(folder))}     # see what it looks at")
    if run.sigmoid_attention:
        print(f"  {python} annotate.py --checkpoint {shlex.quote(str(folder))}     # edit what it looks at")
    if run.dataset == "digits":
        print("  DATASET=cifar10 MODEL_TYPE=ViT-B_16 NUM_STEPS=500 bash train.sh     # on a GPU; downloads both")


class _Outlives:
    """An output that may be closed (`| head`, a terminal that is gone): what is written then goes nowhere, and the run on."""

    def __init__(self, stream):
        self._stream = stream

    def __getattr__(self, name):
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        return self._try(self._stream.write, text) or len(text)

    def flush(self) -> None:
        self._try(self._stream.flush)

    def _try(self, call, *arguments):
        try:
            return call(*arguments)
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())


def collect_garbage() -> None:
    """From here on; what is there by now stays."""
    if not gc.isenabled():
        gc.freeze()
        gc.enable()


if __name__ == "__main__":
    gc.disable()                # imports make a million objects that stay: looking through them takes a third of the start
    sys.stdout, sys.stderr = _Outlives(sys.stdout), _Outlives(sys.stderr)
    try:
        code = main(sys.argv[1:])
    finally:
        gc.unfreeze()           # or packages whose objects are looked for at the exit (nanobind's) tell of leaks
    sys.exit(code)
