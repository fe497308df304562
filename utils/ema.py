"""A moving average of the weights, for evaluation (Polyak and Juditsky 1992; with decay 0.9999 in many recipes)."""

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn


class Ema:
    """After update n: average = d average + (1 - d) weights, with d = min(decay, (1 + n) / (10 + n)).

    d grows as in TensorFlow's ExponentialMovingAverage, so that a run of a few hundred updates has an average too. The
    average starts at the weights given. It has their type: float16 weights are too coarse for it.
    """

    def __init__(self, model: nn.Module, decay: float):
        """`model` is the plain module, not the wrapped one; 0 <= decay < 1."""
        assert 0 <= decay < 1, decay
        self.decay = decay
        self._averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay)).requires_grad_(False).eval()

    @property
    def model(self) -> nn.Module:
        """The average, as a module of the given one's class."""
        return self._averaged.module

    @torch.no_grad()
    def update(self, model: nn.Module, updates: int) -> None:
        """`updates` of the weights so far, this one included (from 1): the average needs no counter of its own."""
        assert updates >= 1, updates
        decay = min(self.decay, (1 + updates) / (10 + updates))
        self._averaged.multi_avg_fn = get_ema_multi_avg_fn(decay)
        self._averaged.n_averaged.fill_(updates)        # at 0 AveragedModel would copy the weights
        self._averaged.update_parameters(model)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The averaged weights, under the plain model's names."""
        return self.model.state_dict()

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        self.model.load_state_dict(state)
