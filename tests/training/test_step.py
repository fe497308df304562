"""The records of a step."""

from utils.training.step import Progress, Requests, StepMetrics


def test_metrics_are_logged_under_their_names():
    metrics = StepMetrics(step=3, loss=0.5, accuracy=0.25, learning_rate=0.01, grad_norm=2.0, loss_scale=None, skipped=False,
                          images=32, seconds=0.5, data_seconds=0.1)
    assert metrics.as_dict() == {"step": 3, "loss": 0.5, "accuracy": 0.25, "lr": 0.01, "grad_norm": 2.0, "loss_scale": None,
                                 "skipped": False, "images_per_second": 64, "seconds": 0.5, "data_wait": 0.2}
    assert StepMetrics(*list(vars(metrics).values())[:10], attention_loss=0.125).as_dict()["attention_loss"] == 0.125
    assert metrics.requests == Requests(0, 0, 0) and metrics.replaced == () and Progress() == (0, 0, 0)
