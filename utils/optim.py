"""Optimizers by name."""

from collections.abc import Iterable

import torch
from torch import nn


def build_optimizer(name: str, parameters: Iterable[nn.Parameter], learning_rate: float,
                    weight_decay: float) -> torch.optim.Optimizer:
    """"sgd": momentum 0.9, no Nesterov, weight decay as an L2 term, as the ViT paper's fine-tuning. "adamw": decoupled."""
    if name == "sgd":
        return torch.optim.SGD(parameters, lr=learning_rate, momentum=0.9, weight_decay=weight_decay)
    if name == "adamw":
        parameters = list(parameters)
        # The usual 1e-8 is zero in float16, and 0 / 0 is the first update of a weight without gradient.
        eps = 1e-4 if any(parameter.dtype == torch.float16 for parameter in parameters) else 1e-8
        return torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=weight_decay, eps=eps)
    raise ValueError(f"no optimizer is called {name!r}: sgd or adamw")


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
