"""Which parameters are trained, in which groups, by which optimizer, and with which learning rate.

The layer-wise decay of the learning rate is that of BEiT (arXiv 2106.08254) and MAE (arXiv 2111.06377): what is behind the last
block (norms, pooling by attention, head) has the whole rate. timm's is the same, except that its last norm has the last block's.
Which parameters have no weight decay is what DeiT, CaiT and MAE agree on. Registers are tokens like the cls token, and so is the
query of pooling by attention (which timm decays). The learning rate is a closed form of the number of the update: a checkpoint
saves no state for it.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from utils import launch

NOT_DECAYED = ("pos_embed", "cls_token", "dist_token", "reg_token", "latent")
KINDS = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW, "adam": torch.optim.Adam}


class OptimizerError(ValueError):
    """Raised for an optimizer that is not available, and for a choice of parameters that cannot be trained."""

    exit_code = 2


def choose_trainable(named_parameters: Iterable[tuple[str, nn.Parameter]], *, train_layers: str, freeze: Sequence[str],
                     layer_index: Callable[[str], int], depth: int, head_names: Sequence[str]) -> list[str]:
    """Set requires_grad and return the names of the frozen parameters.

    train_layers: "all"; "head" (a linear probe, only `head_names`); or a number K: the last K of the depth - 1 layers and
    everything after them. A parameter whose name matches a pattern of `freeze` ("patch_embed.*") is frozen in any case.
    Raises OptimizerError for any other train_layers, for a pattern that matches no name, and if nothing is left to train;
    requires_grad is then unchanged.
    """
    named_parameters = list(named_parameters)
    names = [name for name, _ in named_parameters]
    if train_layers.isdecimal() and int(train_layers) < depth:
        trained = {name for name in names if layer_index(name) >= depth - int(train_layers)}
    elif train_layers in ("all", "head"):
        trained = set(names) if train_layers == "all" else set(names) & set(head_names)
    else:
        raise OptimizerError(f"--train_layers {train_layers!r}: expected all, head, or a number of blocks from 1 to {depth - 1}")
    for pattern in freeze:
        matches = {name for name in names if fnmatchcase(name, pattern)}
        if not matches:
            raise OptimizerError(f"--freeze {pattern!r} matches no parameter. The names run from {names[0]} to {names[-1]}.")
        trained -= matches
    if not trained:
        raise OptimizerError(f"--train_layers {train_layers} with --freeze {','.join(freeze)} leaves nothing to train. "
                             "Freeze fewer parameters.")
    for name, parameter in named_parameters:
        parameter.requires_grad_(name in trained)
    return [name for name in names if name not in trained]


def parameter_groups(named_parameters: Iterable[tuple[str, nn.Parameter]], *, weight_decay: float,
                     decay_matrices_only: bool = False, layer_decay: float = 1.0,
                     layer_index: Callable[[str], int] | None = None, depth: int = 0, head_names: Sequence[str] = (),
                     head_scale: float | None = None, by_value: bool = False) -> list[dict]:
    """Return the parameters that require gradients in groups {"params", "lr_scale", "weight_decay"}, in order of appearance.

    lr_scale = layer_decay ** (depth - layer_index(name)), times head_scale for the names in `head_names`.
    decay_matrices_only: biases, norms and other vectors, positions and tokens have no weight decay.
    A group is a layer (with layer_decay), the heads (with head_scale), and what has no weight decay of them, whatever the
    numbers are: a checkpoint numbers parameters in the order of the groups. by_value: as earlier versions of this program, which
    put into one group what has the same lr_scale and weight decay.
    """
    groups: dict[tuple, dict] = {}
    for name, parameter in named_parameters:
        if not parameter.requires_grad:
            continue
        layer = depth if layer_decay == 1 else layer_index(name)
        is_head = head_scale is not None and name in head_names
        exempt = decay_matrices_only and (parameter.ndim <= 1 or name.rpartition(".")[2] in NOT_DECAYED)
        scale, decay = layer_decay ** (depth - layer) * (head_scale if is_head else 1.0), 0.0 if exempt else weight_decay
        group = groups.setdefault((scale, decay) if by_value else (layer, is_head, exempt),
                                  {"params": [], "lr_scale": scale, "weight_decay": decay})
        group["params"].append(parameter)
    return list(groups.values())


def build_optimizer(name: str, groups: Iterable[dict] | Iterable[nn.Parameter], learning_rate: float, *,
                    momentum: float = 0.9) -> torch.optim.Optimizer:
    """Build the optimizer of the groups of parameter_groups(), or of plain parameters, which then have no weight decay.

    "sgd": `momentum`, no Nesterov, weight decay as an L2 term, as in the ViT paper's fine-tuning. "adam": weight decay as an
    L2 term. "adamw": decoupled weight decay. "lamb" (arXiv 1904.00962): timm's, without its clipping, which `update` does.
    Raises OptimizerError for "lamb" if timm is not installed.
    """
    groups = list(groups)
    parameters = [each for group in groups for each in (group["params"] if isinstance(group, dict) else [group])]
    options = {"lr": learning_rate, "weight_decay": 0.0}
    if name == "sgd":
        options["momentum"] = momentum
    elif any(parameter.dtype == torch.float16 for parameter in parameters):
        # The usual 1e-8 is zero in float16, and 0 / 0 is the first update of a weight without gradient.
        options["eps"] = 1e-4
    if name == "lamb":
        try:
            from timm.optim import Lamb  # PyTorch has none
        except ImportError as error:
            raise OptimizerError("--optimizer lamb needs timm, which is not installed. Install it "
                                 f"({launch.command_to_install('timm')}), or use adamw") from error
        optimizer = Lamb(groups, max_grad_norm=None, **options)
    else:
        # The fused kernels of CPUs get float16 weights wrong in torch 2.11; those of Apple GPUs ignore grad_scale and found_inf.
        fused = not any(parameter.device.type == "mps" or (parameter.dtype == torch.float16 and parameter.device.type == "cpu")
                        for parameter in parameters)
        optimizer = KINDS[name](groups, fused=fused, **options)
    _initialize_momentum(optimizer)
    set_learning_rate(optimizer, learning_rate)
    return optimizer


def _initialize_momentum(optimizer: torch.optim.Optimizer) -> None:
    """Set SGD's missing momentum to zero: the fused step would allocate it and, if it skips the update, not fill it."""
    for group in optimizer.param_groups if isinstance(optimizer, torch.optim.SGD) else ():
        for parameter in group["params"] if group["momentum"] else ():
            if optimizer.state[parameter].get("momentum_buffer") is None:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)


def load_state(optimizer: torch.optim.Optimizer, state: dict, earlier: Callable[[], list[dict]] = list) -> str:
    """Load a checkpoint's averages. The optimizer keeps its kernel, eps and lr_scale, which are settings of this session.

    earlier: the groups of the checkpoint's parameters, where it has others than the optimizer: by value. Returns a line for the
    user if the precision has changed eps, else "".
    """
    saved, groups = state["param_groups"], optimizer.param_groups
    in_file = groups if len(saved) == len(groups) else earlier()
    numbers = {id(parameter): (number, group) for group, there in zip(saved, in_file, strict=True)
               for number, parameter in zip(group["params"], there["params"], strict=True)}
    own = optimizer.state_dict()["param_groups"]
    values, options = {}, []
    for group, packed in zip(groups, own):
        for parameter, number in zip(group["params"], packed["params"]):
            if (in_checkpoint := numbers[id(parameter)][0]) in state["state"]:
                values[number] = state["state"][in_checkpoint]
        there = numbers[id(group["params"][0])][1]
        options.append(there | packed | {"lr": there["lr"]})              # lamb keeps its count of the steps there
    optimizer.load_state_dict({"state": values, "param_groups": options})
    _initialize_momentum(optimizer)
    before, now = (group[0].get("eps") for group in (saved, own))
    return "" if before == now else f"changed: the optimizer's eps is {now} (was {before}), as the precision needs it"


def update(optimizer: torch.optim.Optimizer, norm: Tensor, non_finite: Tensor, scale: Tensor, max_norm: float) -> None:
    """Update the weights, unless `non_finite`: divide the gradients by the loss's `scale`, clip them to the global norm
    `max_norm` (0: no clipping) and step.

    `norm` is the norm of the gradients before the division. It, `non_finite` and `scale` are scalars () on the device.
    Fused optimizers divide, clip and skip in the single pass that changes the weights, so that the host never waits for the
    device (benchmarks/optimizer.py measures SGD). lamb has no such pass: the host waits for `non_finite`.
    """
    divisor = scale * ((norm / scale + 1e-6) / max_norm).clamp(min=1) if max_norm else scale
    if optimizer.param_groups[0].get("fused"):
        optimizer.grad_scale, optimizer.found_inf = divisor.float(), non_finite.float()
        optimizer.step()
        del optimizer.grad_scale, optimizer.found_inf
    elif not non_finite:
        torch._foreach_div_([parameter.grad for group in optimizer.param_groups for parameter in group["params"]
                             if parameter.grad is not None], divisor)
        optimizer.step()


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Set every group's learning rate, times its lr_scale (1 in states saved before there were groups)."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group.get("lr_scale", 1.0)


SHORT_RUN = 10      # updates; in a shorter run each of them has a learning rate above the floor


def lr_multiplier(update: float, warmup: float, total: float, decay: str, *, floor: float = 0.0, start: float = 0.0,
                  milestones: Sequence[int] = (), ends_at_floor: bool | None = None) -> float:
    """Return the learning rate of update 1..total as a fraction of the peak.

    During the warm-up it rises linearly from `start` (at update 0) to 1. Afterwards it falls from 1 to `floor`: "cosine"
    (half a period) and "linear" reach it at `total`; "step" divides by 10 after each of the `milestones`, as BiT (arXiv
    1912.11370); "constant" stays at 1.
    With start and floor 0 these are the values of the ViT-pytorch scripts, whose scheduler steps before the optimizer, so that
    the last update changes nothing. In a run of few updates that would cost half of the progress: without `ends_at_floor`
    (default: in a run of fewer than SHORT_RUN) the decay begins one update later and does not reach `floor`.
    """
    if update < warmup:
        return start + (1 - start) * (update / warmup)
    if ends_at_floor is None:
        ends_at_floor = total >= SHORT_RUN
    progress = max(0, update - warmup - (not ends_at_floor)) / max(1, total - warmup)
    ratio = 1.0
    if decay == "cosine":
        ratio = max(0.0, 0.5 * (1 + math.cos(math.pi * progress)))
    elif decay == "linear":
        ratio = max(0.0, 1 - progress)
    elif decay == "step":
        ratio = 10.0 ** -sum(update > milestone for milestone in milestones)
    return floor + (1 - floor) * ratio


def is_time(step: int, every: int, total: int) -> bool:
    """Return whether something is due after step 1..total: every `every` steps, and at the end."""
    return step % every == 0 or step == total
