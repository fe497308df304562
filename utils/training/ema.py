"""A moving average of the weights, for evaluation (Polyak and Juditsky 1992; with decay 0.9999 in many recipes)."""

import copy

import torch
from torch import nn


class Ema:
    """Averages weights: after update n, average = d average + (1 - d) weights with d = min(decay, (1 + n) / (10 + n)).

    d grows as in TensorFlow's ExponentialMovingAverage, so that a run of a few hundred updates has a useful average too. The
    average starts at the initial weights and has their type (float16 is too coarse for it). Unlike torch's AveragedModel it
    keeps no counter on the device, for which the host would have to wait.
    """

    def __init__(self, model: nn.Module, decay: float):
        """`model` is the plain module, not the wrapped one; 0 <= decay < 1. `self.model` holds the average."""
        self.decay = decay
        self.model = copy.deepcopy(model).requires_grad_(False).eval()

    @torch.no_grad()
    def update(self, model: nn.Module, updates: int) -> None:
        """`updates`: the number of updates so far, including this one (from 1)."""
        decay = min(self.decay, (1 + updates) / (10 + updates))
        torch._foreach_lerp_(list(self.model.parameters()), list(model.parameters()), 1 - decay)
        for averaged, buffer in zip(self.model.buffers(), model.buffers(), strict=True):
            averaged.copy_(buffer)
