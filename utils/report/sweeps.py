"""What a sweep found: its choice, its table, and which trials the held-out images do not tell from the choice.

A row is a dict of the figures of one run: "run", what was tried, "status" (done, or how it ended), and where it is done those of
its evaluation.
"""

from collections.abc import Sequence

from utils.training.certainty import describe_images, result_of

FINAL = "final"                 # the run with the choice; all others are trials
BY_LOSS = "the lowest loss within one image of the highest accuracy"


def spoken(tried: str) -> str:
    return tried.replace("_", " ")


def ended_trials(rows: Sequence[dict]) -> list[dict]:
    return [row for row in rows if row["run"] != FINAL and row["status"] == "done"]


def choose(rows: Sequence[dict]) -> dict | None:
    """The trial of the lowest loss within one held-out image of the highest accuracy; None if no trial has ended."""
    ended = ended_trials(rows)
    highest = max((row["accuracy"] for row in ended), default=0.0)
    return max(ended, key=lambda row: result_of(row).rank(highest), default=None)


def like(rows: Sequence[dict], chosen: dict) -> list[dict]:
    """The other trials that the held-out images do not tell from the chosen one."""
    return [row for row in ended_trials(rows) if row is not chosen and result_of(row).resembles(result_of(chosen))]


def is_by_loss(rows: Sequence[dict], chosen: dict) -> bool:
    """Whether several trials were within one image of the highest accuracy, so that the loss decided for this one."""
    highest = max(row["accuracy"] for row in ended_trials(rows))
    equal = [row for row in ended_trials(rows) if result_of(row).rank(highest)[0] == result_of(chosen).rank(highest)[0]]
    return len(equal) > 1 and chosen is choose(rows)


def describe_choice(rows: Sequence[dict], chosen: dict, tried: str) -> str:
    """The choice, why, and which trials cannot be told from it."""
    best, others = result_of(chosen), like(rows, chosen)
    text = f"{spoken(tried)} {chosen[tried]:g}, chosen on what is held out ({describe_images(best.images)})"
    if chosen is not choose(rows):
        text += ": the final run began with it, by the rule of an earlier version"
    elif is_by_loss(rows, chosen):
        text += f": {BY_LOSS}"
    if others:
        values = ", ".join(f"{row[tried]:g}" for row in others)
        text += f". These images cannot tell it from {values}: such differences may be chance (a test at 5%)"
    return text


def table(rows: Sequence[dict], tried: str) -> list[str]:
    """A line for each run, the final one last, with the choice marked."""
    chosen = chosen_of(rows, tried)
    others = like(rows, chosen)
    lines = [f"{'run':<12} {spoken(tried):>21}  {'split':<6} {'images':>7} {'accuracy':>9} {'95% interval':>16} {'top-5':>8} "
             f"{'loss':>8}"]
    for row in rows:
        result = row["status"]
        if result == "done":
            low, high = result_of(row).interval
            result = (f"{row['split']:<6} {row['images']:>7} {row['accuracy']:>9.2%} {f'{low:.1%} to {high:.1%}':>16} "
                      f"{row['top5']:>8.2%} {float(row['loss']):>8.4f}")
        mark = "  <- chosen" if row is chosen else "  not told from it" if row in others else ""
        lines.append(f"{row['run']:<12} {row[tried]:>21g}  {result}{mark}")
    return [*lines, f"choice   {describe_choice(rows, chosen, tried)}"]


def chosen_of(rows: Sequence[dict], tried: str) -> dict:
    """The trial that the final run, the last row, was made of."""
    return next(row for row in rows if row[tried] == rows[-1][tried])
