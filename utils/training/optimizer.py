"""Which parameters are trained, in which groups, by which optimizer.

Layer-wise decay of the learning rate is that of BEiT (arXiv 2106.08254) and MAE (arXiv 2111.06377); which parameters
have no weight decay is what DeiT, CaiT and MAE agree on.
"""

from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

NOT_DECAYED = ("pos_embed", "cls_token", "dist_token")
OPTIMIZERS = ("sgd", "adamw", "adam", "lamb")


class OptimizerError(ValueError):
    """Something is asked of the optimizer that cannot be had: one line."""


def choose_trainable(named_parameters: Iterable[tuple[str, nn.Parameter]], *, train_layers: str, freeze: Sequence[str],
                     depth_of: Callable[[str], int], depth: int,
                     head_names: Sequence[str]) -> tuple[list[str], list[str]]:
    """Sets requires_grad -> names of the parameters that are trained, and of those that are frozen.

    train_layers: "all"; "head" (a linear probe: `head_names` alone); or a number K: the last K of the depth - 1 layers
    and what stands after them. Of these, none whose name fits a pattern of `freeze` ("patch_embed.*").
    Raises OptimizerError for another train_layers, a pattern that fits no name, or if nothing is left to train.
    """
    named_parameters = list(named_parameters)
    names = [name for name, _ in named_parameters]
    if train_layers.isdecimal() and int(train_layers) < depth:
        chosen = {name for name in names if depth_of(name) >= depth - int(train_layers)}
    elif train_layers in ("all", "head"):
        chosen = set(names) if train_layers == "all" else set(names) & set(head_names)
    else:
        raise OptimizerError(f"train_layers {train_layers!r}: must be all, head, or a number of blocks from 1 to {depth - 1}")
    for pattern in freeze:
        fitting = {name for name in names if fnmatchcase(name, pattern)}
        if not fitting:
            raise OptimizerError(f"freeze {pattern!r}: no parameter is called so; their names go from {names[0]} to {names[-1]}")
        chosen -= fitting
    if not chosen:
        raise OptimizerError(f"train_layers {train_layers} and freeze {' '.join(freeze)} leave nothing to train: freeze less")
    for name, parameter in named_parameters:
        parameter.requires_grad_(name in chosen)
    return [name for name in names if name in chosen], [name for name in names if name not in chosen]


def parameter_groups(named_parameters: Iterable[tuple[str, nn.Parameter]], *, weight_decay: float,
                     decay_matrices_only: bool = False, layer_decay: float = 1.0,
                     depth_of: Callable[[str], int] | None = None, depth: int = 0, head_names: Sequence[str] = (),
                     head_scale: float = 1.0) -> list[dict]:
    """The parameters that require gradients, in groups {"params", "lr_scale", "weight_decay"} in order of appearance.

    lr_scale = layer_decay ** (depth - depth_of(name)), times head_scale for the names in `head_names`.
    decay_matrices_only: no weight decay for biases, norms and other vectors, positions and tokens.
    """
    assert layer_decay == 1 or depth_of is not None
    trained = [(name, parameter) for name, parameter in named_parameters if parameter.requires_grad]
    groups: dict[tuple[float, float], dict] = {}
    for name, parameter in trained:
        scale = 1.0 if layer_decay == 1 else layer_decay ** (depth - depth_of(name))
        scale *= head_scale if name in head_names else 1.0
        exempt = decay_matrices_only and (parameter.ndim <= 1 or name.rpartition(".")[2] in NOT_DECAYED)
        decay = 0.0 if exempt else weight_decay
        group = groups.setdefault((scale, decay), {"params": [], "lr_scale": scale, "weight_decay": decay})
        group["params"].append(parameter)
    members = [id(parameter) for group in groups.values() for parameter in group["params"]]
    assert sorted(members) == sorted({id(parameter) for _, parameter in trained}), "each parameter is in one group"
    return list(groups.values())


def build_optimizer(name: str, groups: Iterable[dict] | Iterable[nn.Parameter], learning_rate: float, *,
                    momentum: float = 0.9) -> torch.optim.Optimizer:
    """`groups` of parameter_groups(), or parameters alone, which then have no weight decay.

    "sgd": `momentum`, no Nesterov, weight decay as an L2 term, as the ViT paper's fine-tuning. "adam": decay as an L2
    term. "adamw": decoupled. "lamb" (arXiv 1904.00962): timm's, without its clipping, which the step does.
    Raises OptimizerError for another name, and for "lamb" where timm is not installed.
    """
    if name not in OPTIMIZERS:
        raise OptimizerError(f"no optimizer is called {name!r}: {', '.join(OPTIMIZERS)}")
    groups = list(groups)
    parameters = [each for group in groups for each in (group["params"] if isinstance(group, dict) else [group])]
    options = {"lr": learning_rate, "weight_decay": 0.0}
    if name == "sgd":
        options["momentum"] = momentum
    elif any(parameter.dtype == torch.float16 for parameter in parameters):
        # The usual 1e-8 is zero in float16, and 0 / 0 is the first update of a weight without gradient.
        options["eps"] = 1e-4
    if name == "lamb":
        optimizer = _lamb()(groups, max_grad_norm=None, **options)
    else:
        kinds = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW, "adam": torch.optim.Adam}
        # The fused kernels of CPUs get float16 weights wrong in torch 2.11.
        fused = not any(parameter.dtype == torch.float16 and parameter.device.type == "cpu" for parameter in parameters)
        optimizer = kinds[name](groups, fused=fused, **options)
    _begin_momentum(optimizer)
    set_learning_rate(optimizer, learning_rate)
    return optimizer


def _begin_momentum(optimizer: torch.optim.Optimizer) -> None:
    """SGD's, where there is none yet: the fused step makes it without a value, and leaves it at that if the update is skipped."""
    for group in optimizer.param_groups if isinstance(optimizer, torch.optim.SGD) else ():
        for parameter in group["params"] if group["momentum"] else ():
            if optimizer.state[parameter].get("momentum_buffer") is None:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)


def load_state(optimizer: torch.optim.Optimizer, state: dict) -> None:
    """A checkpoint's state of it. What is not state stays the optimizer's: the kernel, and the groups' lr_scale, shares of a
    learning rate that may be another one now."""
    groups = [{**saved, **{key: own[key] for key in ("fused", "lr_scale") if key in own}}
              for saved, own in zip(state["param_groups"], optimizer.param_groups, strict=True)]
    optimizer.load_state_dict({**state, "param_groups": groups})
    _begin_momentum(optimizer)


def update(optimizer: torch.optim.Optimizer, norm: Tensor, non_finite: Tensor, scale: Tensor, max_norm: float) -> None:
    """One step with the gradients divided by the loss's `scale` and clipped to the global norm `max_norm` (0: as they are);
    none if `non_finite`. `norm` is that of the gradients as they lie there, all of them () on the device.

    Fused optimizers divide, clip and skip in the one pass that changes the weights, and the host need not know whether they
    do (benchmarks/optimizer.py: SGD). With lamb, which has no such pass, it waits to know.
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


def _lamb() -> type[torch.optim.Optimizer]:
    try:
        from timm.optim import Lamb  # PyTorch has none
    except ImportError as error:
        raise OptimizerError("optimizer lamb is timm's, which is not installed: pip install timm, or take adamw") from error
    return Lamb


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Of every group, times its lr_scale (1 where it has none, as in states saved without groups)."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group.get("lr_scale", 1.0)
