"""benchmarks/small_sets: the splits, reading of results, and the statistics, compared with numbers computed by hand."""

import json
import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from benchmarks.small_sets import __main__ as small_sets
from benchmarks.small_sets import comparison, contenders, figures, measured, start
from benchmarks.small_sets.comparison import Comparison, Results
from benchmarks.small_sets.contenders import Contender, Job, TimmLength
from benchmarks.small_sets.measured import Outcome, RunFailed
from benchmarks.small_sets.splits import Split, draw_split

ROOT = Path(__file__).resolve().parents[2]
TINY = "--model_type ViT-Ti_16 --img_size 8 --patch_size 4 --hidden_size 16 --num_layers 2 --num_heads 2 --mlp_dim 32"


@pytest.fixture
def photographs(tmp_path):
    """Write two classes with 5 + 2 and 4 + 3 images, with the same file names in both parts. Return the folder."""
    for part, name, count in (("train", "ant", 5), ("val", "ant", 2), ("train", "bee", 4), ("val", "bee", 3)):
        folder = tmp_path / "set" / part / name
        folder.mkdir(parents=True)
        for number in range(count):
            (folder / f"{number}.jpg").write_text(f"{part} {name} {number}")
    return tmp_path / "set"


def content(folder: Path) -> dict[str, set[str]]:
    return {f"{path.parent.parent.name}/{path.parent.name}": {one.read_text() for one in path.parent.iterdir()}
            for path in folder.rglob("*.jpg")}


def test_a_draw_pools_both_parts_and_keeps_the_size_of_val(photographs, tmp_path):
    drawn = draw_split(photographs, tmp_path / "a", 1, None)
    assert drawn == Split(tmp_path / "a", train=9, held_out=5, classes=2)
    found = content(tmp_path / "a")
    assert {name: len(images) for name, images in found.items()} == {"train/ant": 5, "val/ant": 2, "train/bee": 4, "val/bee": 3}
    for name in ("ant", "bee"):                                    # disjoint, together all images, each in its class
        assert found[f"train/{name}"] | found[f"val/{name}"] == {path.read_text() for path in photographs.rglob(f"{name}/*")}


def test_draws_differ_and_a_smaller_size_is_part_of_a_larger_one(photographs, tmp_path):
    for name, draw, per_class in (("a", 1, None), ("again", 1, None), ("small", 1, 2), ("b", 2, None)):
        draw_split(photographs, tmp_path / name, draw, per_class)
    a, again, small, b = (content(tmp_path / name) for name in ("a", "again", "small", "b"))
    assert a == again and a != b
    assert small["val/ant"] == a["val/ant"] and small["train/ant"] < a["train/ant"] and len(small["train/bee"]) == 2


def test_a_set_without_val_is_refused(photographs, tmp_path):
    (photographs / "val" / "bee").rename(photographs / "val" / "wasp")
    with pytest.raises(ValueError, match="the same class folders"):
        draw_split(photographs, tmp_path / "a", 1, None)
    with pytest.raises(ValueError, match="no folder train/"):
        draw_split(tmp_path, tmp_path / "a", 1, None)


# ---------------------------------------------------------------------------------------------- reading results


def test_more_evaluations_do_not_raise_the_best():
    evaluations = [(number / 27, float(number)) for number in range(3, 28, 3)]           # nine; 1/8 is 3.4
    assert [round(27 * position) for position, _ in measured.at_moments(evaluations)] == [3, 6, 9, 12, 18, 21, 24, 27]
    often = [(number / 80, 99.0 if number % 10 else 50.0) for number in range(1, 81)]    # 99 % between the eight moments
    assert Outcome(tuple(often), 80, 80).best == 50.0
    assert measured.at_moments([(0.5, 1.0), (1.0, 2.0)]) == [(0.5, 1.0), (1.0, 2.0)]
    with pytest.raises(ValueError, match="end of training"):
        measured.at_moments([(0.5, 1.0)])


def test_our_log_is_read():
    events = [{"event": "eval", "step": 0, "split": "test", "accuracy": 0.9}, {"event": "train", "step": 1},
              {"event": "eval", "step": 20, "split": "test", "accuracy": 0.25},
              {"event": "eval", "step": 40, "split": "train", "accuracy": 1.0},
              {"event": "eval", "step": 40, "split": "test", "accuracy": 0.5}]
    outcome = contenders.outcome_of_ours({"num_steps": 40, "train_batch_size": 32}, events)
    assert outcome == Outcome(((0.5, 25.0), (1.0, 50.0)), 40, 1280) and outcome.last == 50.0


def a_job(tmp_path: Path, train: int, images_seen: int, draw: int = 3) -> Job:
    return Job(Split(tmp_path / "split", train, 20, 2), draw, tmp_path / "out", tmp_path / "x.npz", TINY, start.row_of(TINY),
               tmp_path / "start.safetensors", tmp_path / "train.py", images_seen, "all")


@pytest.mark.parametrize(("train", "length"), [
    (40, TimmLength(32, 1, 40)),           # 8 of the 40 are dropped in every epoch: 40 epochs, not 32, show 1,280 images
    (10, TimmLength(10, 1, 128)),          # fewer than a batch: timm would drop them all
    (256, TimmLength(32, 8, 5)),
])
def test_timm_sees_as_many_images_although_it_drops_the_last_batch(tmp_path, train, length):
    job = a_job(tmp_path, train, 1280)
    assert TimmLength.of(job) == length
    words = contenders.timm_same(job)
    epochs, warmup = (int(words[words.index(flag) + 1]) for flag in ("--epochs", "--warmup-epochs"))
    assert epochs + warmup == length.epochs and "act_layer=gelu_tanh" in words       # its warm-up comes before its epochs


def test_timm_s_summary_is_read(tmp_path):
    (tmp_path / "out" / "run").mkdir(parents=True)
    (tmp_path / "out" / "run" / "summary.csv").write_text(
        "epoch,train_loss,eval_loss,eval_top1,eval_top5,lr\n1,2.0,1.9,55.0,90.0,0.03\n4,1.0,0.9,65.0,95.0,0.0\n")
    assert contenders.read_timm(a_job(tmp_path, 256, 1280)) == Outcome(((0.4, 55.0), (1.0, 65.0)), 40, 1280)


def test_results_of_the_trainer_and_of_the_regression_are_read():
    outcome = contenders.outcome_of_trainer({"steps": 20, "passes": 10.0, "evaluations": [[10, 0.5], [20, 0.75]]}, 64)
    assert outcome == Outcome(((0.5, 50.0), (1.0, 75.0)), 20, 640)
    views = {"squeezed": {"accuracy": 0.5, "loss": 1.0}, "cut": {"accuracy": 0.4, "loss": 0.9}}
    outcome = contenders.outcome_of_logistic({"view": "cut", "views": views})
    assert (outcome.last, outcome.best, outcome.steps) == (40.0, 40.0, 0)


def test_vit_paper_runs_as_long_as_the_base_and_a_candidate_is_evaluated_at_the_same_moments(tmp_path):
    words = contenders.vit_paper(a_job(tmp_path, 100, 3200))
    assert {"--num_steps 100", "--warmup_steps 10", "--eval_every 13"} <= {" ".join(pair) for pair in pairwise(words)}
    words = contenders.candidate("x", {"all": "--num_steps 20"}, ["all"]).command(a_job(tmp_path, 100, 0))
    assert words[words.index("--num_steps"):][:4] == ["--num_steps", "20", "--eval_every", "3"]
    with pytest.raises(ValueError, match="candidate x: no flags for 5"):
        contenders.candidate("x", {"all": ""}, ["5", "all"])


def test_an_accuracy_on_another_number_of_images_is_refused():
    comparison.check_held_out(Outcome(((1.0, 68.75),), 1, 1), Split(Path(), 1, held_out=128, classes=2))
    with pytest.raises(RunFailed, match="no whole number of 100 images"):
        comparison.check_held_out(Outcome(((1.0, 68.75),), 1, 1), Split(Path(), 1, held_out=100, classes=2))


# --------------------------------------------------------------------------------------------------- statistics


def a_run(contender: str, last: float, set_name: str = "s", draw: int = 1, size: str = "all", **more) -> dict:
    return {"contender": contender, "set": set_name, "draw": draw, "per_class": size, "last": last, "best": last + 1,
            "flags": "", "wall": 10.0, "cpu": 5.0, "memory": 100, "steps": 40, "passes": 20.0, "moments": 8, "train": 50,
            "classes": 2, "held_out": 20, "date": "2000-01-01", "command": f"python {contender}", "session": 1} | more


def test_differences_are_paired():
    ours = [a_run("ours", value, draw=draw) for draw, value in ((1, 60.0), (2, 70.0), (3, 80.0), (4, 99.0))]
    theirs = [a_run("x", value, draw=draw) for draw, value in ((3, 77.0), (1, 59.0), (2, 68.0))]     # 1, 2, 3; no fourth
    found = figures.difference(ours, theirs, "last")
    assert found.mean == pytest.approx(2.0) and found.error == pytest.approx(1 / 3 ** 0.5) and found.pairs == 3
    assert str(found) == "**+2.0 ± 0.6**" and str(figures.difference(theirs, ours, "last")) == "**-2.0 ± 0.6**"
    assert str(figures.difference(ours[:1], theirs, "last")) == "+1.0"                # one pair has no error
    assert figures.difference(ours, [], "last") is None
    assert figures.difference(ours, theirs, "last", lambda run: run["draw"] == 2).mean == pytest.approx(2.0)
    assert str(figures.Difference(1.0, 0.5, 9)) == "+1.0 ± 0.5"                       # not above twice its error


def test_the_sizes_of_one_draw_count_as_one_for_the_error():
    ours = [a_run("ours", 60.0 + gain, draw=draw, size=size) for draw, size, gain in
            ((1, "5", 1.0), (1, "all", 3.0), (2, "5", 4.0), (2, "all", 4.0))]
    theirs = [a_run("x", 60.0, draw=draw, size=size) for draw in (1, 2) for size in ("5", "all")]
    found = figures.difference(ours, theirs, "last")                # draws: +2 and +4
    assert found.mean == pytest.approx(3.0) and found.error == pytest.approx(1.0) and found.pairs == 4


@pytest.mark.parametrize(("overall", "by_set", "above"), [
    ((2.1, 1.0), [3.0, -1.0], True), ((2.0, 1.0), [3.0, 1.0], False), ((2.1, 1.0), [9.0, -1.1], False),
    ((2.1, None), [2.1], False)])
def test_when_a_difference_counts_as_above(overall, by_set, above):
    differences = [figures.Difference(mean, 1.0, 5) for mean in by_set]
    assert figures.is_above(figures.Difference(*overall, 10), differences) is above


SESSION = {"machine": {"cpu": "Some CPU", "cores": 2}, "versions": {"torch": "2"}, "threads": 1, "model": TINY, "start": "x.npz",
           "command": "python -m x"}


def test_the_page_has_means_and_differences():
    runs = [a_run("auto", 60.0 + draw, name, draw, size) for name in ("s", "t") for draw in (1, 2) for size in ("all", "5")]
    runs += [a_run("timm", 58.0 + draw + (size == "5"), name, draw, size) for name in ("s", "t") for draw in (1, 2)
             for size in ("all", "5")]
    text = figures.page(runs, [SESSION], [("auto", "ours"), ("absent", "-"), ("timm", "theirs")], "auto")
    assert "| auto | 61.5 | 61.5 | 61.5 | 8 |" in text and "| contender | 5 a class | all images | all runs | runs |" in text
    # 1 point for 5 a class and 2 for all: 1.5 in every draw of every set
    assert "| timm | **+1.5 ± 0.0** | **+1.0 ± 0.0** | **+2.0 ± 0.0** | **+1.5 ± 0.0** | **+1.5 ± 0.0** | 8 | yes |" in text
    assert "| timm | 10.0 | 5.0 | 100 | 40 | 20 | 8 |" in text and "absent" not in text
    assert "- **timm**: theirs. Last command:\n\n  `python timm`" in text
    assert f"`MODEL` stands for `{TINY}`, `START` for x.npz." in text
    turned = figures.page(runs, [SESSION], [("auto", "ours"), ("timm", "theirs")], "auto", gains=True)
    assert "## Each minus auto, last step (points)" in turned and "| timm | **-1.5 ± 0.0** |" in turned and "| 8 | no |" in turned


def test_the_page_omits_contenders_that_were_not_chosen(tmp_path):
    results = Results(tmp_path / "r.jsonl")
    results.begin(SESSION)
    for run in (a_run("auto", 60.0), a_run("vit-paper", 59.0, "other"), a_run("auto", 1.0, draw=9)):
        results.add(run)
    text = small_sets.page(results, list(contenders.CONTENDERS[:1]), [("s", 1, "all"), ("other", 1, "all")], False)
    assert "| auto | 60.0 | 60.0 | 1 |" in text and "Draws 1 of these sets" in text and "other (" not in text


def test_the_page_begins_with_the_results():
    runs = [a_run("auto", 60.0 + draw, draw=draw) for draw in (1, 2, 3)]
    runs += [a_run("timm", 58.0 + draw + (draw == 3), draw=draw) for draw in (1, 2, 3)]
    runs += [a_run("x", value, draw=draw) for draw, value in ((1, 66.0), (2, 60.0), (3, 65.0))]
    contenders = [("auto", "ours; nothing set"), ("timm", "timm's train.py: SGD"), ("x", "another")]
    text = figures.page(runs, [SESSION], contenders, "auto", purpose="Who is better?")
    first = text.partition("\n## ")[0]
    assert first.startswith("# Fine-tuning on few photographs\n\nWho is better?\n")
    assert "`auto` (ours) reached 62.0 % on average over 3 runs on s." in first
    assert "- `timm` (timm's train.py): 1.7 ± 0.3 points lower\n" in first
    assert "- `x` (another): 1.7 ± 2.0 points higher, which is not clear with so few pairs" in first


@pytest.mark.parametrize("file", sorted(small_sets.RESULTS.parent.glob("small_sets*.jsonl")), ids=lambda file: file.stem)
def test_each_page_matches_its_results(file):
    results = Results(file)
    flags = {run["contender"]: run["flags"] for run in results.runs}
    others = [contenders.candidate(name, flags[name], []) for name in flags.keys() - {one.name for one in contenders.CONTENDERS}]
    page = small_sets.page(results, [*contenders.CONTENDERS, *sorted(others, key=lambda one: list(flags).index(one.name))],
                           sorted({figures.pair_of(run) for run in results.runs}), bool(others), file.stem)
    assert (ROOT / "docs" / f"{file.stem}.md").read_text() == page


def test_the_page_of_the_recipe_repeats_rows_of_the_other_pages():
    """Each row that begins with a contender or a candidate is a row of one of those pages."""
    pages = [page.read_text() for page in (ROOT / "docs").glob("small_sets*.md")]
    names = {line.split("|")[1] for page in pages for line in page.splitlines() if line.startswith("| ")} - {" contender "}
    page = (ROOT / "docs" / "recipe_photos.md").read_text()
    rows = [line for line in page.splitlines() if line.startswith("| ") and line.split("|")[1] in names]
    assert len(rows) > 10 and all(any(f"\n{row}\n" in page for page in pages) for row in rows)


# ------------------------------------------------------------------------------------------------------ the command


def fake(name: str, code: str = "pass", images_seen: int = 640) -> Contender:
    return Contender(name, name, lambda job: [sys.executable, "-c", code],
                     lambda job: Outcome(((1.0, 60.0),), 20, job.images_seen or images_seen))


def compare(photographs: Path, results: Results, *who: Contender) -> Comparison:
    made = Comparison(who, results, photographs.parent, photographs.parent, lambda **given: Job(
        start=Path("x"), model=TINY, row={}, timm_start=Path("y"), timm_train=None, **given), 1)
    made.run([("set", 1, "2"), ("set", 1, "all")], 2)
    return made


def test_runs_that_have_results_are_not_repeated(photographs, tmp_path, capsys):
    results = Results(tmp_path / "r.jsonl")
    results.begin(SESSION)
    first = compare(photographs, results, fake("base"), fake("broken", "import sys; sys.exit('no such flag')"))
    assert len(first.failed) == 2 and "no such flag" in capsys.readouterr().err
    with open(results.path, "a") as stream:
        stream.write('{"cut off')
    again = Results(results.path)
    assert again.runs == json.loads(json.dumps(results.runs)) and again.sessions == [SESSION]
    again.begin(SESSION)
    assert not compare(photographs, again, fake("base", "raise SystemExit('not again')"), fake("broken")).failed
    runs = Results(results.path).runs
    assert sorted((run["contender"], run["per_class"], run["session"]) for run in runs) == [
        ("base", "2", 1), ("base", "all", 1), ("broken", "2", 2), ("broken", "all", 2)]
    assert {run["images_seen"] for run in runs} == {640} and {run["train"] for run in runs} == {4, 9}
    assert all(run["wall"] >= 0 and run["memory"] > 1 for run in runs)


def test_an_interrupt_ends_the_runs(photographs, tmp_path):
    """Also those of other threads: a run of a minute ends immediately, and its result is not stored."""
    def command(job: Job) -> list[str]:
        if job.size == "all":
            return [sys.executable, "-c", "import time; time.sleep(60)"]
        while not measured._running:
            time.sleep(0.01)
        raise KeyboardInterrupt

    results, began = Results(tmp_path / "r.jsonl"), time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        compare(photographs, results, Contender("base", "", command, lambda job: None), fake("other"))
    assert time.monotonic() - began < 30 and not results.runs and not measured._running


def test_without_the_base_the_others_do_not_run(photographs, tmp_path):
    broken = fake("base", "raise SystemExit(3)")
    made = compare(photographs, Results(tmp_path / "r.jsonl"), broken, fake("other"))
    assert len(made.failed) == 2 and not made.results.runs


@pytest.mark.parametrize(("flags", "message"), [
    (["--contenders", "nobody"], "--contenders: unknown name nobody"),
    (["--contenders", "timm"], "timm needs --timm_train"),
    (["--sets", "flowers"], "no folder train/"),
    (["--per_class", "0"], "--per_class"),
    (["--draws", "one"], "--draws"),
    (["--model", "--model_type none"], "none"),
])
def test_bad_input_is_reported_in_one_line(photographs, tmp_path, capsys, flags, message):
    (tmp_path / "x.npz").touch()
    with pytest.raises(SystemExit, match="2"):
        small_sets.main(["--data", str(tmp_path), "--sets", "set", "--start", str(tmp_path / "x.npz"), "--json",
                         str(tmp_path / "r.jsonl"), *flags])
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_another_candidate_of_the_same_name_is_refused(photographs, tmp_path, capsys):
    (tmp_path / "x.npz").touch()
    (tmp_path / "c.json").write_text('{"a": "--num_steps 20"}')
    results = Results(tmp_path / "r.jsonl")
    results.add(a_run("a", 60.0, flags="--num_steps 40"))
    with pytest.raises(SystemExit, match="2"):
        small_sets.main(["--data", str(tmp_path), "--sets", "set", "--start", str(tmp_path / "x.npz"), "--json",
                         str(results.path), "--candidates", str(tmp_path / "c.json"), "--base", "a"])
    assert "has runs of a with other flags (--num_steps 40)" in capsys.readouterr().err


@pytest.mark.reference
def test_the_start_has_the_same_features_in_every_program(tmp_path):
    for package in ("timm", "transformers"):
        pytest.importorskip(package)
    from models import create_model, save_npz

    row = start.row_of(TINY)
    sizes = {name: row[name] for name in ("patch_size", "hidden_size", "num_layers", "num_heads", "mlp_dim")}
    model = create_model("ViT-Ti_16", 3, 8, **sizes)
    torch.manual_seed(0)
    for parameter in model.parameters():
        parameter.data.normal_(std=0.5)
    save_npz(model, tmp_path / "x.npz")
    found = start.differences(tmp_path / "x.npz", row, tmp_path)
    assert set(found) == {"timm", "transformers"} and max(found.values()) < start.TOLERANCE
    assert max(start.differences(tmp_path / "x.npz", row | {"gelu": "erf"}, tmp_path).values()) > start.TOLERANCE
