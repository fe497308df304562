"""benchmarks: arithmetic, order of turns, pages, and that every benchmark runs. The measured values are not tested."""

import json
import sys

import pytest
import torch
from processes import FORK

from benchmarks import attention, checkpoint, evaluation, goals, harness, load, memory, optimizer, predict, report, runs, step
from benchmarks import input as input_question
from benchmarks.harness import Contender, Failed
from utils import device

HERE = "tests.system.test_benchmarks"


@pytest.fixture(autouse=True)
def as_before(monkeypatch):
    monkeypatch.setattr(device, "keep_memory", lambda: True)        # other tests measure memory
    yield
    torch.set_float32_matmul_precision("highest")


def writes(file: str, label: str, cost: float):
    """Return a contender that writes to a file when it is built and run."""
    def note(what: str) -> None:
        with open(file, "a") as stream:
            stream.write(f"{label}{what} ")

    def run() -> float:
        note("")
        return cost

    note("!")
    return run


def names_two():
    return lambda: {"stall": 1.0, "total": 4.0}


def absent():
    raise ModuleNotFoundError("No module named 'peer_x'", name="peer_x")


def broken():
    raise ValueError("no such size")


def contender(name: str, function: str, kind: str = "peer", /, **given) -> Contender:
    return Contender(name, f"{HERE}:{function}", given, kind)


@pytest.mark.slow
def test_contenders_take_turns(tmp_path):
    """With `fresh` each contender is built again for every turn."""
    file = tmp_path / "order"
    group = [contender(name, "writes", file=str(file), label=name, cost=cost) for name, cost in (("A", 1.0), ("B", 2.0))]
    with harness.worker_pool(quick=True) as pool:
        assert harness.measure(group, pool, rounds=3) == {"A": [1.0] * 3, "B": [2.0] * 3}
        assert file.read_text().split() == ["A!", "A", "B!", "B", *"AB" * 3]
        file.unlink()
        harness.measure(group, pool, rounds=2, fresh=True)
    assert file.read_text().split() == ["A!", "A", "B!", "B"] * 2
    assert [each.name for each in harness.choose_contenders(group, "B")] == ["B"]
    with pytest.raises(SystemExit, match="nobody"):
        harness.choose_contenders(group, "nobody")


def test_a_worker_is_another_process_that_sleeps_between_turns():
    worker = harness.Worker({})
    try:
        assert worker.ask("build", "benchmarks.runs:bare", {"command": [sys.executable, "-c", "print('not a reply')"]}) is None
        assert 0 < worker.ask("run", 2) < 60
        with pytest.raises(Failed, match="no_such_function"):
            worker.ask("build", "benchmarks.runs:no_such_function", {})
    finally:
        worker.close()


def test_missing_and_broken_peers_are_skipped_but_our_own_errors_are_raised(capsys):
    good = contender("timm", "names_two")
    with harness.worker_pool(quick=True) as pool:
        costs = harness.measure([contender("x", "absent"), good], pool, rounds=2)
        said = capsys.readouterr().out.splitlines()
    assert said == ["x: skipped: package peer_x is not installed: pip install -r benchmarks/requirements.txt"]
    assert costs == {"timm, stall": [1.0, 1.0], "timm, total": [4.0, 4.0]}
    with harness.worker_pool(quick=False) as pool, pytest.raises(Failed, match="no_such_function"):
        harness.measure([Contender("ours", "benchmarks.runs:no_such_function", {}, "ours")], pool, rounds=1)


def test_ratios_are_paired_by_round():
    # A neighbor made the second round ten times slower for both: the ratio does not change.
    assert harness.paired([4.0, 40.0, 4.0], [2.0, 20.0, 2.0]) == (2.0, 2.0, 2.0)
    assert harness.spread([1.0, 2.0, 3.0, 4.0, 5.0]) == (3.0, 2.0, 4.0)
    assert harness.spread([7.0]) == (7.0, 7.0, 7.0)
    with pytest.raises(ValueError):
        harness.paired([1.0, 2.0], [1.0])


def a_record(title: str, **costs: list[float]) -> dict:
    kinds = {name: "limit" if name == "matmul" else "ours" if name.startswith("ours") else "peer" for name in costs}
    work = {name: 2e9 if name == "matmul" else 3e9 for name in costs}
    return {"title": title, "baseline": next(iter(costs)), "unit": "seconds a step", "kinds": kinds, "costs": costs, "work": work,
            "settings": {"batch": 8}, "command": "python -m benchmarks.step", "date": "2000-01-01", "versions": {"torch": "2"},
            "machine": {"cpu": "Some CPU", "flags": ["avx2"], "cores": 2, "memory": 8, "gpu": ""}}


STEP = a_record("step ViT-B_16 224 bf16 cpu", timm=[3.0, 3.0], other=[2.0, 2.0], ours=[1.5, 1.5], matmul=[0.5, 0.5])


def test_fraction_of_the_limit_and_the_fastest_peer():
    assert harness.fraction_of_limit(STEP, "ours") == pytest.approx(0.5)          # 3 GFLOP in 1.5 s; limit 2 in 0.5 s
    assert harness.best_peer(STEP) == "other"
    lines = harness.table(STEP)
    assert "1.5" in lines[4] and "2.00" in lines[4] and "50%" in lines[4] and "4 GFLOP/s" in lines[5]


def test_goals_are_found_and_marked_as_met_or_missed():
    rows = {line.split(" | ")[0]: line for line in goals.table({STEP["title"]: STEP}, on_gpu=False)}
    assert "2.00 | yes" in rows["| training step in bf16, compared with timm"]
    assert "1.33 | yes" in rows["| training step in bf16, compared with the fastest peer"]
    start = a_record("startup", **{"import torch": [2.0, 4.0], "ours (train.py)": [4.0, 6.0]})
    assert "<= 1.50 s | 2.00 s | no" in goals.table({"startup": start}, on_gpu=False)[-1]
    assert len(goals.table({STEP["title"]: STEP}, on_gpu=True)) == 4                       # two goals of a GPU fit the title
    run = a_record("end to end x", **{"ours (files), step": [1.0, 2.0], "ours (files), data wait": [0.01, 0.08]})
    assert [line.split(" | ")[3:] for line in goals.table({"end to end x": run}, on_gpu=True)[2:]] == [["2.5%", "no |"]]


def test_the_summary_has_one_row_for_each_goal_with_missed_ones_last():
    slow = a_record("step ViT-S_16 224 bf16 cpu", timm=[3.0], ours=[2.5], matmul=[0.5])
    lines = goals.summary({record["title"]: record for record in (STEP, slow)}, on_gpu=False)
    assert "| training step in bf16, compared with timm | >= 1.45 | 1.20 to 2.00 | met in 1 of 2 |" in lines
    start = a_record("startup", **{"import torch": [1.0], "ours (train.py)": [3.0]})
    lines = goals.summary({"startup": start, STEP["title"]: STEP}, on_gpu=False)
    assert lines[-1].endswith("<= 1.50 s | 2.00 s | missed |") and "missed" not in "".join(lines[:-1])
    near = a_record("input JPEG 500x375", torchvision=[1.699], ours=[1.0])
    assert goals.summary({near["title"]: near}, on_gpu=False)[-1].endswith("| >= 1.70 | 1.699 | missed |")


def test_the_overview_compares_with_every_other_program():
    record = a_record("step ViT-B_16 224 fp32 cpu", timm=[3.0, 3.0, 3.0], torchvision=[1.0, 2.0, 3.0], ours=[2.0, 2.0, 2.0])
    lines = report.overview({record["title"]: record})
    assert lines[0] == "| task | timm | transformers | torchvision | vit-pytorch (lucidrains) | ViT-pytorch scripts |"
    assert lines[2:] == ["| training step, ViT-B/16, all in float32 | **1.50** | - | 1.00 | - | - |"]
    assert all(record["title"].startswith(tuple(report.GROUPS)) for record in [STEP, record])


def test_the_overview_compares_whole_commands_by_their_pairs():
    def run(contender: str, last: float, cpu: float, draw: int) -> dict:
        return {"contender": contender, "set": "s", "draw": draw, "per_class": "5", "last": last, "cpu": cpu}

    runs = [run(name, last, cpu, draw) for draw in (1, 2) for name, last, cpu in (
        ("auto", 60.0, 10.0), ("timm-own", 58.0, 25.0), ("transformers-own", 61.0, 5.0))]
    said = report.accuracy(runs)
    assert "1 small photo sets, 2 splits" in said[0] and "train.py: +2.0 ± 0.0 points" in said[2] and "2.50 times" in said[2]
    assert "Trainer: -1.0 ± 0.0 points" in said[3] and "0.50 times" in said[3] and not report.accuracy(runs[:1])


def test_a_record_replaces_an_older_one(tmp_path, capsys):
    file = tmp_path / "results" / "m.json"
    harness.report(STEP | {"date": "1999-01-01"}, file)
    harness.report(a_record("load", timm=[1.0]), file)
    harness.report(STEP, file)
    kept = json.loads(file.read_text())
    assert sorted(kept) == ["load", STEP["title"]] and kept[STEP["title"]]["date"] == "2000-01-01"
    assert STEP["title"] in capsys.readouterr().out
    page = report.page({"m": kept}, [])
    assert "## All figures: Some CPU, 2 cores" in page and "### Loading weights\n" in page and "#### load\n" in page
    assert "| training step in bf16, compared with timm |" in page and "No GPU has been measured" in page


def test_the_results_page_matches_the_json_files():
    machines = {file.stem: json.loads(file.read_text()) for file in sorted(report.RESULTS.glob("*.json"))}
    assert report.PAGE.read_text() == report.page(machines, report.small_sets()), "python -m benchmarks.report"


def test_help_shows_only_defaults_that_exist(capsys):
    with pytest.raises(SystemExit):
        harness.options("Something.", ["--help"], flags=["compile"], models="ViT-B_16", threads=0, contenders="", data_dir=None,
                        rounds=3)
    text = " ".join(capsys.readouterr().out.split())
    assert "default ViT-B_16" in text and "default None" not in text and "default all --" in text and "torch.compile" in text


FORMULATION = "--contenders=ViT-pytorch formulation,ours"


@pytest.mark.slow
@pytest.mark.parametrize(("question", "flags", "titles"), [
    (step, [FORMULATION, "--precision", "bf16"], ["step ViT-Nano_2 8 bf16 cpu"]),
    (evaluation, [FORMULATION, "--precision", "fp32"], ["evaluation ViT-Nano_2 8 fp32 cpu"]),
    (memory, [FORMULATION, "--precision", "fp32"], ["memory ViT-Nano_2 8 fp32 cpu"]),
    (attention, ["--precision", "bf16"], ["attention ViT-Nano_2 8 bf16 cpu"]),
    (optimizer, [], ["optimizer ViT-Nano_2"]),
    (load, ["--contenders=ours"], ["load ViT-Nano_2"]),
    (checkpoint, [], ["checkpoint ViT-Nano_2"]),
    (input_question, [], ["input JPEG 40x30", "input arrays 32x32"]),
], ids=lambda value: getattr(value, "__name__", ""))
def test_every_question_runs_with_a_tiny_model(tmp_path, question, flags, titles):
    """In another process: counting operations leaves threads behind, after which forked processes cannot run a backward pass."""
    file = tmp_path / "x.json"
    process = FORK.Process(target=question.main, args=(["--quick", "--json", str(file), *flags],))
    process.start()
    process.join()
    assert process.exitcode == 0
    records = json.loads(file.read_text())
    assert list(records) == titles
    for record in records.values():
        ours = [costs for name, costs in record["costs"].items() if name.startswith("ours")]
        assert ours and all(len(costs) == 2 and min(costs) > 0 for costs in ours)


def test_whole_commands_label_photographs(tmp_path, monkeypatch):
    """Larger numbers of photographs are copies of a few. A command that writes no file has failed."""
    monkeypatch.setattr(predict, "DISTINCT", 2)
    monkeypatch.setattr(predict, "SIZE", (40, 30))
    photos = predict.photographs(tmp_path / "p", 3)
    files = sorted(photos.glob("x/*.jpg"))
    assert len(files) == 3 and files[0].read_bytes() == files[2].read_bytes() != files[1].read_bytes()
    both = predict.contenders(tmp_path, tmp_path / "w.pth", photos, "DeiT-Ti_16", tmp_path / "inference.py", "cpu")
    assert [each.name for each in both] == [predict.PEER, "ours"] and all(str(photos) in each.given["words"] for each in both)
    output = str(tmp_path / "out")
    assert predict.command([sys.executable, "-S", "-c", f"open({output!r}, 'w')"], output)() > 0
    with pytest.raises(RuntimeError, match="ended with code 0"):
        predict.command([sys.executable, "-S", "-c", ""], output)()


@pytest.mark.slow
def test_figures_of_whole_runs_come_from_their_logs(tmp_path):
    given = ["--dataset", "digits", "--pretrained_dir", "none", "--num_steps", "5", "--train_batch_size", "16", "--device", "cpu"]
    found = runs.training(given, processes=1, threads=1)()
    assert set(found) == {"step", "data wait"} and 0 <= found["data wait"] < found["step"]
