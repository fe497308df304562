"""The numbers in the events of a log.jsonl: what is drawn of a run."""

from collections.abc import Sequence

from utils.training.certainty import best_of, result_of


def evaluations_of(events: Sequence[dict]) -> dict[str, list[dict]]:
    """Return the evaluations by split."""
    found: dict[str, list[dict]] = {}
    for event in events:
        if event.get("event") == "eval":
            found.setdefault(str(event.get("split")), []).append(event)
    return found


def choosing_split(events: Sequence[dict]) -> str | None:
    """Return the split that chooses the best step: val, or else what is evaluated most often of those that are not trained on."""
    counts = {split: len(series) for split, series in evaluations_of(events).items() if split != "train"}
    return "val" if "val" in counts else max(counts, key=counts.get, default=None)


def best_evaluation(events: Sequence[dict]) -> tuple[float, float] | None:
    """Return step and accuracy of the best evaluation by certainty.best_of; by its accuracy if the log lacks the rest."""
    series = [event for event in evaluations_of(events).get(choosing_split(events), ()) if (number_of(event, "step") or 0) > 0]
    results = {event["step"]: result_of(event) for event in series}
    if results and all(results.values()):
        step, _ = best_of(results)
        return step, results[step].accuracy
    known = [(accuracy, -event["step"]) for event in series if (accuracy := number_of(event, "accuracy")) is not None]
    accuracy, step = max(known, default=(None, 0))
    return None if accuracy is None else (-step, accuracy)


def number_of(event: dict, field: str) -> float | None:
    """Return the number; None if it is none. The log has the texts nan, inf and -inf, since JSON has no such numbers."""
    value = event.get(field)
    known = (isinstance(value, (int, float)) and not isinstance(value, bool)) or value in ("nan", "inf", "-inf")
    try:
        return float(value) if known else None
    except OverflowError:                # hundreds of digits
        return None


def numbers_of(events: Sequence[dict], field: str) -> list[float]:
    return [float("nan") if (number := number_of(event, field)) is None else number for event in events]


def percent_of(events: Sequence[dict], field: str) -> list[float]:
    return [100 * ratio for ratio in numbers_of(events, field)]
