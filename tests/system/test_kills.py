"""docs/promises.md: a run that is killed at any instant and resumed ends with the same result, bit for bit."""

import os
import random
import signal
import time
from pathlib import Path

import pytest
import rig
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from utils.run import checkpoint


def slow_disk(rank: int) -> None:
    """Slow down every write of a checkpoint, so that some kills happen during a write."""
    sync = os.fsync
    os.fsync = lambda descriptor: (time.sleep(0.06), sync(descriptor), time.sleep(0.06))


def ended(process: int) -> bool:
    return os.waitid(os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def training(folder: Path) -> list[dict]:
    """Return steps and evaluations of the log, without the values that differ from session to session."""
    return [{key: value for key, value in event.items() if key not in ("images_per_second", "seconds", "data_wait")}
            for event in rig.events(folder) if event["event"] in ("train", "eval")]


def board(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Return the curves that TensorBoard shows."""
    reader = EventAccumulator(str(folder / "logs" / "run"), size_guidance={"scalars": 0})
    reader.Reload()
    return {tag: [(event.step, event.value) for event in reader.Scalars(tag)] for tag in reader.Tags()["scalars"]
            if not tag.endswith(("images_per_second", "data_wait"))}


@pytest.mark.slow
@pytest.mark.contract("P1")
@pytest.mark.parametrize("workers", [2, 0])
def test_kill_at_any_instant(workers, tmp_path, uninterrupted, tries, figure):
    if not workers and not tries(0, 1):
        pytest.skip("only with workers, unless --full")
    flags, chance = ("--gradient_accumulation_steps", 2, "--num_workers", workers), random.Random(workers)
    whole, untouched = uninterrupted("--gradient_accumulation_steps", "2", "--num_workers", "0")
    kills = inside = runs = lost = 0
    wanted = tries(3, 100)
    while kills < wanted:
        folder, runs = tmp_path / f"run{runs}", runs + 1
        for _ in range(min(40, wanted - kills)):
            before = rig.newest(folder)
            children = rig.start(folder, *flags, before=slow_disk)
            deadline = time.monotonic() + chance.uniform(0.1, 2.5)
            while time.monotonic() < deadline and not ended(children[0]):
                time.sleep(0.002)
            rig.kill(children)
            if rig.wait(children) == [0]:
                break
            kills += 1
            home = folder / "output" / "run"
            inside += bool(list(home.glob("*.tmp")))
            assert rig.newest(folder) >= before, "a checkpoint was lost"
            if rig.newest(folder):
                assert not checkpoint.open_newest(home).skipped
                reached = max((event["step"] for event in rig.events(folder) if event["event"] == "train"), default=0)
                lost = max(lost, reached - rig.newest(folder))
        else:
            assert rig.run(folder, *flags)
        assert rig.end_of(folder) == whole
        assert training(folder) == training(untouched)
        assert board(folder) == board(untouched)
        assert not list((folder / "output" / "run").glob("*.tmp"))
    assert lost <= 6, lost       # the steps since the last checkpoint, and those while one was written in the background
    figure(f"kill -9 of a run with {workers} loader workers ({inside} inside a write; {runs} runs compared; at most {lost} steps "
           "done again)", kills)
    figure("log and TensorBoard without gaps or doubles after the kills", runs)


@pytest.mark.slow
@pytest.mark.contract("P4")
def test_loader_workers_change_nothing(tmp_path, uninterrupted, tries, figure):
    whole, _ = uninterrupted("--num_workers", "0")
    counts = [3, 1][:tries(1, 2)]
    for workers in counts:
        assert rig.run(tmp_path / str(workers), "--num_workers", workers) == whole
    figure("whole runs with other numbers of workers", len(counts))


@pytest.mark.slow
@pytest.mark.contract("P1")
@pytest.mark.parametrize("ranks", [2, 4])
def test_a_group_resumes_bit_for_bit(ranks, tmp_path, uninterrupted, tries, figure):
    """With four processes plain DistributedDataParallel would not: it orders its buckets by the first step of each process."""
    if ranks > 2 and not tries(0, 1):
        pytest.skip("only with two processes, unless --full")
    flags = ("--num_steps", "15")
    whole, _ = uninterrupted(*flags, ranks=ranks)
    chance, kills = random.Random(ranks), 0
    for attempt in range(tries(1, 10)):
        folder = tmp_path / str(attempt)
        for _ in range(20):
            begun = rig.newest(folder)
            children = rig.start(folder, *flags, ranks=ranks)
            more = chance.choice([1, 4])
            while rig.newest(folder) < begun + more and not ended(children[0]):
                time.sleep(0.002)
            rig.kill(children)
            if rig.wait(children) == [0] * ranks:
                break
            kills += 1
        assert rig.end_of(folder) == whole
    assert kills
    figure(f"kill -9 of {ranks} processes", kills)


@pytest.mark.slow
@pytest.mark.contract("P5")
def test_exact_is_the_same_on_1_2_and_4_processes(tmp_path, uninterrupted, figure, tries):
    """Four micro-batches a step, 12 steps in pieces of three on changing numbers of processes."""
    flags = ("--exact", "--num_steps", "12", "--eval_every", "12")
    one, folder = uninterrupted(*flags, "--gradient_accumulation_steps", "4")
    ways = [(4, 1, 2, 4), (2, 1, 4, 2), (1, 4, 2, 1), (2, 2, 2, 2), (4, 4, 4, 4)][:tries(1, 5)]
    for way in ways:
        place = tmp_path / "".join(map(str, way))
        for piece, ranks in enumerate(way):
            accumulation = ("--gradient_accumulation_steps", 4 // ranks) if piece == 0 else ()
            stop_at = 3 * (piece + 1)
            stopped = rig.stopping_after(stop_at) if stop_at < 12 else None
            codes = rig.wait(rig.start(place, *flags, *accumulation, ranks=ranks, before=stopped))
            assert set(codes) <= {0, 143}, (place / "out.txt").read_text()[-3000:]
        assert rig.end_of(place) == one, way
        steps = [[event for event in training(run) if event["event"] == "train"] for run in (place, folder)]
        assert steps[0] == steps[1]
    listed = ", ".join(" -> ".join(map(str, way)) for way in ways)
    figure(f"steps with --exact on changing numbers of processes ({listed}): the same weights and logged losses, bit for bit",
           12 * len(ways))


@pytest.mark.slow
@pytest.mark.contract("P5")
def test_other_numbers_of_processes_keep_samples_and_losses(tmp_path, uninterrupted, tries, figure):
    """Including mixing, dropout and augmentation: the micro-batches stay the same."""
    _, untouched = uninterrupted("--gradient_accumulation_steps", "2", "--num_workers", "0")
    wanted = [event["loss"] for event in training(untouched) if event["event"] == "train"]
    ways = [(2, 1), (1, 2, 1)][:tries(1, 2)]
    worst = 0.0
    for way in ways:
        folder = tmp_path / "".join(map(str, way))
        for piece, ranks in enumerate(way):
            accumulation = ("--gradient_accumulation_steps", 2 // ranks) if piece == 0 else ()
            before = rig.stopping_after(10 * (piece + 1)) if piece < len(way) - 1 else None
            rig.wait(rig.start(folder, *accumulation, ranks=ranks, before=before))
        printed = (folder / "out.txt").read_text()
        assert f"changed: {way[1]} processes (were {way[0]}), {2 // way[1]} micro-steps each (were {2 // way[0]})\n" in printed
        assert [event["world_size"] for event in rig.events(folder) if event["event"] in ("start", "resume")] == list(way)
        found = [event["loss"] for event in training(folder) if event["event"] == "train"]
        assert len(found) == len(wanted)
        worst = max(worst, *(abs(a - b) for a, b in zip(found, wanted)))
    assert worst <= 1e-5
    figure(f"steps compared on changing numbers of processes (largest difference of a loss: {worst:.1e})",
           len(wanted) * len(ways))


@pytest.mark.slow
@pytest.mark.contract("P9")
def test_a_request_to_stop_saves_the_last_step(tmp_path, uninterrupted, tries, figure):
    """SIGTERM, SIGINT, SIGUSR1 or SIGHUP at any instant of training, evaluating and saving: nothing is lost, code 143."""
    whole, untouched = uninterrupted("--num_workers", "0")
    chance, asked, slowest, wanted, runs = random.Random(9), 0, 0.0, tries(2, 24), 0
    while asked < wanted:
        folder, runs = tmp_path / f"run{runs}", runs + 1
        workers = ("--num_workers", 2 * (runs % 2))
        for _ in range(min(40, wanted - asked)):
            children = rig.start(folder, *workers, before=slow_disk)
            time.sleep(chance.uniform(0.3, 2.0))
            begun = time.monotonic()
            os.kill(children[0], chance.choice([signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP]))
            code, = rig.wait(children)
            if code == 0:
                break
            printed = (folder / "out.txt").read_text()[-3000:]
            assert code == 143 and "Traceback" not in printed, printed
            asked, slowest = asked + 1, max(slowest, time.monotonic() - begun)
            if (folder / "output" / "run" / "log.jsonl").exists():
                steps = [event["step"] for event in rig.events(folder) if event["event"] == "train"]
                assert rig.newest(folder) == (steps[-1] if steps else 0), "the last step was not saved"
        else:
            assert rig.run(folder, *workers)
        assert rig.end_of(folder) == whole
        assert training(folder) == training(untouched)
    figure(f"requests to stop, the last step saved each time (slowest end after {slowest:.1f} s; {runs} runs compared)", asked)


@pytest.mark.slow
def test_a_second_request_leaves_at_once(tmp_path):
    def stuck(rank: int) -> None:
        checkpoint.save = lambda path, state: time.sleep(600)

    children, log = rig.start(tmp_path, before=stuck), tmp_path / "output" / "run" / "log.jsonl"
    rig.until(lambda: log.exists() and '"step": 3' in log.read_text(), what="a write that hangs")
    os.kill(children[0], signal.SIGTERM)
    time.sleep(0.5)
    os.kill(children[0], signal.SIGTERM)
    assert rig.wait(children) == [143]
    assert "stopped at once" in (tmp_path / "out.txt").read_text()
