"""Records of a step: its settings, the progress of a run, and the metrics of a step."""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple


@dataclasses.dataclass(frozen=True)
class StepSettings:
    batch_size: int                         # images of a step, over all ranks
    micro_steps: int                        # micro-batches of a step on each rank
    max_grad_norm: float                    # 0: no clipping
    seed: int
    schedule: Callable[[int], float]        # the learning rate of the n-th update, n from 1
    non_finite: str = "stop"                # "stop" the run or "skip" the update; overflows under loss scaling are skipped anyway


class Progress(NamedTuple):
    step: int = 0           # steps whose batches were consumed
    updates: int = 0        # of these, updates of the weights
    skips: int = 0          # updates skipped since the last one


class Requests(NamedTuple):
    """What the ranks ask for at the end of a step, summed over them together with the losses."""

    stop: float = 0             # ranks that were asked to stop
    save_failed: float = 0      # ranks whose checkpoint could not be written
    replaced: float = 0         # images that the loader replaced; the trainer counts them


@dataclasses.dataclass(frozen=True)
class StepMetrics:
    """`step` counts from 1; loss and accuracy are means over the step's images, augmented, before the update."""

    step: int
    loss: float                     # everything that is minimized, weight * attention_loss included
    accuracy: float                 # top-1; of mixed images, against the class of the first of the two
    learning_rate: float
    grad_norm: float                # before clipping
    loss_scale: float | None        # None where the loss is not scaled
    skipped: bool                   # the weights were not updated because loss or gradients were not finite
    images: int                     # of all ranks
    seconds: float                  # of this rank, from reading the step before to reading this one
    data_seconds: float             # of these, waiting for the loader (if read late: for the next step's batches)
    attention_loss: float | None = None      # mean over the step's images that have an edit; None if none has
    requests: Requests = dataclasses.field(default_factory=Requests)
    replaced: tuple[tuple[int, str], ...] = ()       # (index, reason) of the images that the loader replaced on this rank

    @property
    def images_per_second(self) -> float:
        return self.images / self.seconds

    def as_dict(self) -> dict[str, float | None]:
        """Return the metrics by their names in log.jsonl."""
        other = {"learning_rate", "images", "data_seconds", "requests", "replaced"}
        other |= {"attention_loss"} if self.attention_loss is None else set()
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name not in other}
        return values | {"lr": self.learning_rate, "images_per_second": self.images_per_second,
                         "data_wait": self.data_seconds / self.seconds}
