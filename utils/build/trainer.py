"""Config -> optimizer, criterion (class weights, mixing, teacher, edits of attention), loss scale, averages, Trainer."""

import contextlib
import functools
import gc
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.base import ImageTransformer
from utils import distributed
from utils.config import Config, ConfigError
from utils.data.classes import first_names
from utils.data.mixup import Mixer
from utils.data.transforms import normalize
from utils.distributed import Ranks
from utils.run.checkpoint import RunState
from utils.training import optimizer as optim
from utils.training.criterion import AttentionSupervision, Criterion, balanced_weights
from utils.training.ema import Ema
from utils.training.precision import LossScaler, warm_up
from utils.training.saved_optimizer import checked_state
from utils.training.step import Progress, Requests, StepSettings
from utils.training.task import SINGLE_LABEL
from utils.training.trainer import Trainer

from .data import Data
from .model import Built


def build_trainer(config: Config, state: RunState | None, ranks: Ranks, built: Built, data: Data,
                  requests: Callable[[], Requests] = Requests, stop: Callable[[], bool] = lambda: False) -> Trainer:
    """Build the trainer, with the `state` of the checkpoint that the run continues, whose tensors are released. `requests`: of
    this process, called at the end of a step; `stop`: of all processes, called between micro-batches. Raises ConfigError on
    every rank."""
    model, precision = built.model, built.precision
    optimizer = build_optimizer(config, model, ranks, state)
    scaler = LossScaler(precision, ranks.device, config.loss_scale)
    ema = Ema(model, config.ema_decay) if config.ema_decay else None
    if config.compile and ema:
        ema.model.compile(dynamic=False)
    progress = Progress()
    if state is not None:
        _load_optimizer(optimizer, state, model, config, ranks)
        if state.scaler:
            scaler.load_state_dict(state.scaler)
        elif scaler.enabled and not config.override:
            raise ConfigError(f"--resume_path {config.resume_path}: the file lacks its loss scale. Use an earlier checkpoint")
        if ema is not None:
            ema.model.load_state_dict(state.ema)
        progress = Progress(state.step, state.updates, state.skips)
        state.model, state.optimizer, state.ema = {}, {}, {}       # they have been copied
    criterion = build_criterion(config, data, built, ranks)
    reducer = None
    if config.exact:
        from utils.training.exact import ExactReducer

        reducer = ExactReducer(model, ranks)
    return Trainer(
        _wrap(config, built, data.sampler.micro_size, ranks), optimizer, criterion, scaler, precision, ranks, built.normalize,
        build_step_settings(config, state), ema=ema, reducer=reducer, progress=progress, requests=requests,
        stop=stop)


def _load_optimizer(optimizer: torch.optim.Optimizer, state: RunState, model: ImageTransformer, config: Config,
                    ranks: Ranks) -> None:
    """Load the optimizer's state. Raises ConfigError, before loading, for a state that cannot be of this run."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    earlier = functools.cache(lambda: _earlier_groups(config, state, model))
    as_now = len(state.optimizer.get("param_groups", ())) == len(optimizer.param_groups)
    try:
        own = checked_state(optimizer, state.optimizer, state.updates, names, None if as_now else earlier())
        change = optim.load_state(optimizer, own, earlier)
    except optim.OptimizerError as error:
        raise ConfigError(f"--resume_path {config.resume_path}: {error}") from error
    if change and ranks.is_main:
        print(change)


def build_step_settings(config: Config, state: RunState | None = None) -> StepSettings:
    peak = config.learning_rate
    schedule = functools.partial(
        optim.lr_multiplier, warmup=config.warmup_steps, total=config.num_steps, decay=config.decay_type,
        floor=config.min_learning_rate / peak if peak else 0.0, start=config.warmup_learning_rate / peak if peak else 0.0,
        milestones=config.decay_milestones or (), ends_at_floor=True if state and state.rules < 2 else None)
    return StepSettings(batch_size=config.train_batch_size, micro_steps=config.gradient_accumulation_steps,
                        max_grad_norm=config.max_grad_norm, seed=config.seed, non_finite=config.non_finite,
                        schedule=lambda update: peak * schedule(update))


def build_optimizer(config: Config, model: ImageTransformer, ranks: Ranks,
                    state: RunState | None = None) -> torch.optim.Optimizer:
    """Build the optimizer of the trained parameters, in their groups; the others are frozen."""
    frozen, pool = _freeze(config, model, state)
    if frozen and ranks.is_main:
        count = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        new = " (the head, and the pooling by attention, which the file lacks)" if pool else ""
        names = ", ".join(frozen) if len(frozen) < 3 else f"{frozen[0]}, ..., {frozen[-1]}"
        print(f"training {count:,} parameters{new}; frozen: {len(frozen)} array{'s' * (len(frozen) > 1)} ({names})")
        if config.pretrained_dir == "none":
            print("warning: the frozen layers have random weights. Add --pretrained_dir")
    return optim.build_optimizer(config.optimizer, _parameter_groups(config, model), config.learning_rate,
                                 momentum=config.momentum)


def _freeze(config: Config, model: ImageTransformer, state: RunState | None) -> tuple[list[str], bool]:
    """Freeze what is not trained -> its names, and whether `--train_layers head` also trains pooling by attention.

    It does if the pooling's values are new because the file has none; a pooling from the file is part of the frozen model, as in
    a linear probe. A resumed run trains the parameters that its optimizer has.
    """
    names = [name for name, _ in model.named_parameters() if name.startswith("attn_pool.")]
    maybe_new = config.train_layers == "head" and bool(names)
    new = maybe_new and state is None and (model.load_report is None or names[0] in model.load_report.fresh)

    def choose(head: list[str]) -> list[str]:
        return optim.choose_trainable(model.named_parameters(), train_layers=config.train_layers,
                                      freeze=config.freeze.split(",") if config.freeze else [],
                                      **_layers(model) | {"head_names": head})

    frozen = choose(model.head_names() + names * new)
    if maybe_new and state is not None:
        known = sum(len(group["params"]) for group in state.optimizer.get("param_groups", ()))
        new = known != sum(parameter.requires_grad for parameter in model.parameters())
        frozen = choose(model.head_names() + names) if new else frozen
    return frozen, new


def _layers(model: ImageTransformer) -> dict:
    return {"layer_index": model.layer_index, "depth": model.depth, "head_names": model.head_names()}


def _parameter_groups(config: Config, model: ImageTransformer, by_value: bool = False) -> list[dict]:
    head_scale = None if config.head_learning_rate is None else config.head_learning_rate / config.learning_rate
    return optim.parameter_groups(
        model.named_parameters(), weight_decay=config.weight_decay, decay_matrices_only=config.decay_on == "matrices",
        layer_decay=config.layer_decay, head_scale=head_scale, by_value=by_value, **_layers(model))


def _earlier_groups(config: Config, state: RunState, model: ImageTransformer) -> list[dict]:
    """Return the groups of an earlier version's checkpoint. Of what they depend on, a resumed run may change only the learning
    rate."""
    return _parameter_groups(config.replace(learning_rate=state.config["learning_rate"]), model, by_value=True)


def build_criterion(config: Config, data: Data, built: Built, ranks: Ranks) -> Criterion:
    """Build the loss: smoothing, class weights and mixing by the configuration, and the parts of the teacher and the edits."""
    mixer, teacher = None, None
    if config.mixup_alpha or config.cutmix_alpha:
        mixer = Mixer(len(data.splits.classes), config.train_batch_size, config.seed, mixup_alpha=config.mixup_alpha,
                      cutmix_alpha=config.cutmix_alpha, probability=config.mix_probability,
                      switch_probability=config.mix_switch_probability, stop_at=config.num_steps - config.mix_off_steps)
    if config.distillation != "none":
        teacher = build_teacher(config, data, built, ranks)
        built.model.distilling = True               # a model with a distillation head returns the logits of both in training
    supervision = build_attention_supervision(config, data, built.model, ranks) if config.attention_edits else None
    return SINGLE_LABEL.criterion(
        config.label_smoothing, _class_weights(config, data, ranks.device), mixer, config.distillation, teacher,
        config.distillation_alpha, config.distillation_temperature, supervision)


def _class_weights(config: Config, data: Data, device: torch.device) -> Tensor | None:
    if config.class_weights == "none":
        return None
    if config.class_weights == "balanced":
        return balanced_weights(torch.as_tensor(data.splits.train.targets), len(data.splits.classes)).to(device)
    return torch.tensor([float(number) for number in config.class_weights.split(",")], device=device)


def build_teacher(config: Config, data: Data, built: Built, ranks: Ranks) -> Callable[[Tensor], Tensor]:
    """-> images (B, C, height, width) of 0..255, as the student gets them -> the teacher's logits (B, classes)"""
    path, precision, splits, opened = config.teacher, built.precision, data.splits, built.teacher
    teacher = opened.model.to(ranks.device, precision.weights).eval()
    known = opened.named and (opened.has_data or config.dataset != "imagenet")      # other programs spell its names differently
    if len(opened.classes) != len(splits.classes) or (known and sorted(opened.classes) != sorted(splits.classes)):
        raise ConfigError(f"--teacher {path}: it has {len(opened.classes)} classes ({first_names(opened.classes)}), the "
                          f"data {len(splits.classes)} ({first_names(splits.classes)}): not the same task. Use another teacher")
    order = [list(opened.classes).index(name) for name in splits.classes] if known else range(len(splits.classes))
    channels = teacher.config.in_channels
    if channels not in (built.model.config.in_channels, 3):
        raise ConfigError(f"--teacher {path}: it takes gray images, the student color ones. Train with --in_channels 1")
    if ranks.is_main:
        taken = first_names(splits.classes)
        unnamed = "" if opened.named else f"; it does not name its classes, which are taken to be {taken}"
        print(f"teacher: {path}, {opened.parameters:,} parameters, {teacher.config.num_heads} attention heads{unnamed}")

    @torch.no_grad()
    def teach(images: Tensor) -> Tensor:
        images = images.float().expand(-1, channels, -1, -1)
        if images.shape[-2:] != teacher.img_size:
            images = F.interpolate(images, teacher.img_size, mode="bilinear", antialias=True)
        with precision.autocast(ranks.device):
            logits = teacher(normalize(images, teacher.config.mean, teacher.config.std, precision.weights))
        return logits if list(order) == sorted(order) else logits[:, order]

    return teach


def build_attention_supervision(config: Config, data: Data, model: ImageTransformer, ranks: Ranks) -> AttentionSupervision:
    """Raise ConfigError if nothing that the edited attention depends on is trained."""
    layers, folder = ", ".join(map(str, model.sigmoid_layers)), Path(config.attention_edits)
    if not any(parameter.requires_grad and decides_attention(model, name) for name, parameter in model.named_parameters()):
        raise ConfigError(f"--attention_edits: nothing that the attention of layer {layers} depends on is trained. Train more "
                          "(--train_layers), or freeze less (--freeze)")
    if ranks.is_main:
        left = len(list(folder.rglob("*.json"))) - len(data.edits)
        others = (f"; not used: {left} file{'s' * (left > 1)} in {folder}, of held-out images ({len(data.held_out_edits)}), of "
                  "no image of these data, or without an edited patch") if left else ""
        print(f"attention: edits of {len(data.edits)} of {len(data.splits.train)} training images supervise layer {layers} of "
              f"{model.attention_layers}, weight {config.attention_loss_weight:g}{others}")
    return AttentionSupervision(config.attention_loss_weight, model.recording_patch_logits,
                                lambda step: sum(sample.index in data.edits for sample in data.sampler.samples_of(step)))


def decides_attention(model: ImageTransformer, name: str) -> bool:
    """Return whether the logits of the last layer with sigmoid attention depend on this parameter."""
    index, last = model.layer_index(name), max(model.sigmoid_layers)
    if index == last == model.depth:                 # pooling by attention, after the last norm
        return name.startswith(("norm.", "attn_pool.latent", "attn_pool.q.", "attn_pool.kv."))
    return index < last or (index == last and any(part in name for part in (".norm1.", ".attn.q", ".attn.k.", ".attn.k_norm")))


def _wrap(config: Config, built: Built, micro_size: int, ranks: Ranks) -> nn.Module:
    """Return the model for training: wrapped in DistributedDataParallel on several ranks, and warmed up (compiled)."""
    model, precision = built.model, built.precision
    if config.exact:
        distributed.broadcast_weights(model, ranks)
    wrapped = model if config.exact else distributed.wrap(model, ranks, precision.half_gradients)
    if not config.compile and wrapped is model:
        return wrapped
    began, images = time.monotonic(), micro_size if config.compile else 2
    if config.compile and ranks.is_main:
        print(f"compiling for {images} images a micro-step: about a minute, less if the cache has it", flush=True)
    inputs = torch.zeros(images, model.config.in_channels, *model.img_size, device=ranks.device, dtype=precision.weights)
    with (distributed.watch(ranks, lambda: f"compiling for {images} images a micro-step") if config.compile
          else contextlib.nullcontext()):
        warm_up(wrapped, inputs, precision)
    if config.compile:
        if ranks.is_main:
            print(f"compiled in {time.monotonic() - began:.0f} s, for {images} images a micro-step", flush=True)
        gc.collect()                       # what compiling leaves behind would keep memory forever
    return wrapped
