"""The result of a sweep: its choice, its table, and which trials the held-out images cannot distinguish from the choice.

A row is a dict of the figures of one run: "run", what was tried, "status" (done, or how it ended), and, if it is done, the
figures of its evaluation.
"""

from collections.abc import Sequence

from utils.training.certainty import describe_images, result_of

FINAL = "final"                 # the run with the chosen value; all others are trials
BY_LOSS = "the lowest loss within one image of the highest accuracy"


def spoken(tried: str) -> str:
    return tried.replace("_", " ")


def ended_trials(rows: Sequence[dict]) -> list[dict]:
    return [row for row in rows if row["run"] != FINAL and row["status"] == "done"]


def choose(rows: Sequence[dict]) -> dict | None:
    """Return the trial of the lowest loss within one held-out image of the highest accuracy; None if no trial is done."""
    ended = ended_trials(rows)
    highest = max((row["accuracy"] for row in ended), default=0.0)
    return max(ended, key=lambda row: result_of(row).rank(highest), default=None)


def like(rows: Sequence[dict], chosen: dict) -> list[dict]:
    """Return the other trials whose accuracy the held-out images cannot distinguish from that of the chosen one."""
    return [row for row in ended_trials(rows) if row is not chosen and result_of(row).resembles(result_of(chosen))]


def is_by_loss(rows: Sequence[dict], chosen: dict) -> bool:
    """Return whether several trials were within one image of the highest accuracy, so that the loss decided."""
    highest = max(row["accuracy"] for row in ended_trials(rows))
    equal = [row for row in ended_trials(rows) if result_of(row).rank(highest)[0] == result_of(chosen).rank(highest)[0]]
    return len(equal) > 1 and chosen is choose(rows)


def describe_choice(rows: Sequence[dict], chosen: dict, tried: str) -> str:
    """Return a line on the choice, the reason, and the trials that may be as good."""
    best, others = result_of(chosen), like(rows, chosen)
    text = f"{spoken(tried)} {chosen[tried]:g}, chosen on {chosen['split']} ({describe_images(best.images)})"
    if chosen is not choose(rows):
        text += ": the final run began with it, as an earlier version chose"
    elif is_by_loss(rows, chosen):
        text += f": {BY_LOSS}"
    if others:
        values = ", ".join(f"{row[tried]:g}" for row in others)
        text += f". {values} may be as good: on so few images such differences can be chance (a test at 5%)"
    return text


def describe_images_of(rows: Sequence[dict]) -> str:
    """Return a line on why the accuracies of the trials and of the final run differ; "" unless both are done."""
    trials, final = ended_trials(rows), rows[-1]
    if not trials or final["run"] != FINAL or final["status"] != "done":
        return ""
    drawn = ", held out of train" * (trials[0]["split"] == final["split"])           # which has a val of its own
    on = [f"{row['images']} image{'s' * (row['images'] != 1)} ({row['split']}{more})"
          for row, more in ((trials[0], drawn), (final, ""))]
    return (f"trials are evaluated on {on[0]}, the final run on {on[1]}. These are different images, and the highest of several "
            "accuracies is partly luck: report the final run's accuracy, with its interval")


def table(rows: Sequence[dict], tried: str) -> list[str]:
    """Return a line for each run, the final one last, with the choice marked, and lines on the choice. No column of top-5
    accuracies if all are 100 %, as of five classes or fewer."""
    chosen = chosen_of(rows, tried)
    others = like(rows, chosen)
    shows_top5 = any(row["top5"] < 1 for row in rows if row["status"] == "done")
    lines = [f"{'run':<12} {spoken(tried):>21}  {'split':<6} {'images':>7} {'accuracy':>9} {'95% interval':>16} "
             + f"{'top-5':>8} " * shows_top5 + f"{'loss':>8}"]
    for row in rows:
        result = row["status"]
        if result == "done":
            low, high = result_of(row).interval
            result = (f"{row['split']:<6} {row['images']:>7} {row['accuracy']:>9.2%} {f'{low:.1%} to {high:.1%}':>16} "
                      + f"{row['top5']:>8.2%} " * shows_top5 + f"{float(row['loss']):>8.4f}")
        mark = "  <- chosen" if row is chosen else "  may be as good" if row in others else ""
        lines.append(f"{row['run']:<12} {row[tried]:>21g}  {result}{mark}")
    images = describe_images_of(rows)
    return [*lines, f"choice   {describe_choice(rows, chosen, tried)}", *[f"images   {images}"] * bool(images)]


def chosen_of(rows: Sequence[dict], tried: str) -> dict:
    """Return the trial whose value the final run, the last row, has."""
    return next(row for row in rows if row[tried] == rows[-1][tried])
