"""docs/promises.md: a long run takes no more memory, files, threads or shared memory than a short one."""

import json
import multiprocessing
import os
import sys
from pathlib import Path
from statistics import median

import pytest
import rig

PROMISE = ("P23", "memory, file descriptors, threads and shared memory stay flat")
# The smallest run of the rig, so that a step consists mostly of the program around the model.
SMALL = ("--hidden_size", 16, "--mlp_dim", 16, "--num_layers", 1, "--randaugment_ops", 0, "--patch_size", 16, "--num_workers", 1,
         "--eval_batch_size", 20)
BATCH = 16 * 3 * 32 * 32          # bytes of the images of a step, as they are loaded


def resident() -> int:
    """Return the bytes in memory of this process, with those shared with its workers, without pages of libraries."""
    lines = Path("/proc/self/status").read_text().splitlines()
    sizes = {line.split(":")[0]: int(line.split()[1]) for line in lines if line.startswith(("RssAnon", "RssShmem"))}
    return 1024 * sum(sizes.values())


def shared_files() -> list[str]:
    """Return PyTorch's files in /dev/shm of processes of this group. Other groups may have files there too."""
    group, found = os.getpgid(0), []
    for name in os.listdir("/dev/shm"):
        owner = name.split("_")[1:2] if name.startswith("torch_") else []
        try:
            if owner and os.getpgid(int(owner[0])) == group:
                found.append(name)
        except (ValueError, ProcessLookupError):
            found += [name] if owner and owner[0] in WORKERS else []
    return found


WORKERS: set[str] = set()         # every loader process so far


def observed(file: Path, every: int):
    """Return before(rank), which writes a line about the process to the file every `every` steps."""
    def install(rank: int) -> None:
        from utils.training import trainer
        original = trainer.Trainer.train_step
        stream = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

        def train_step(self, *arguments, **more):
            metrics = original(self, *arguments, **more)
            WORKERS.update(str(process.pid) for process in multiprocessing.active_children())
            if self.step % every == 0:
                os.write(stream, json.dumps({
                    "step": self.step, "bytes": resident(), "files": len(os.listdir("/proc/self/fd")),
                    "threads": len(os.listdir("/proc/self/task")), "shared": len(shared_files())}).encode() + b"\n")
            return metrics

        trainer.Trainer.train_step = train_step
    return install


def slope(points: list[tuple[float, float]]) -> float:
    """Return the Theil-Sen slope of the points, the median over all pairs, which a single jump does not change."""
    thin = points[::max(1, len(points) // 200)]
    return median((b - a) / (y - x) for i, (x, a) in enumerate(thin) for y, b in thin[i + 1:])


def growth(rows: list[dict]) -> tuple[float, dict[str, int]]:
    """Return (bytes a step, the rise of the lowest counts of files, threads and shared files) after a warm-up.

    The lowest count of a quarter of the run is used: at a single step some may be about to be closed.
    """
    rows = rows[len(rows) // 4:]
    quarter = max(1, len(rows) // 4)
    rise = {what: min(row[what] for row in rows[-quarter:]) - min(row[what] for row in rows[:quarter])
            for what in ("files", "threads", "shared")}
    return slope([(row["step"], row["bytes"]) for row in rows]), rise


def soak(folder: Path, steps: int, evaluations: int) -> tuple[float, dict[str, int]]:
    """Run training, in which every evaluation starts new loader workers. Return the growth."""
    notes = folder / "notes.jsonl"
    children = rig.start(folder, *SMALL, "--num_steps", steps, "--eval_every", steps // evaluations, "--save_every",
                         steps // evaluations, before=observed(notes, max(1, steps // 1000)))
    assert rig.wait(children, timeout=3600) == [0], (folder / "out.txt").read_text()[-3000:]
    printed = (folder / "out.txt").read_text()
    assert printed.count("accuracy") > evaluations, printed[-3000:]
    return growth([json.loads(line) for line in notes.read_text().splitlines()])


@pytest.mark.slow          # forked runs come first: counting operations in other tests leaves threads behind, that prevent it
@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
@pytest.mark.contract(*PROMISE)
def test_a_long_run_takes_no_more_than_a_short_one(tmp_path, tries, figure):
    """A short run does not show a slow leak, but does show a leak of a quarter of a batch a step."""
    steps, evaluations = tries(160, 5000), tries(8, 50)
    grown, rise = soak(tmp_path, steps, evaluations)
    assert grown < tries(BATCH / 4, 1000), f"{grown:.0f} bytes a step"
    assert rise == {"files": 0, "threads": 0, "shared": 0}
    figure(f"steps with {evaluations} evaluations and saves: no more files, threads or shared memory, and {grown / 1000:.2f} MB "
           "of memory every 1,000 steps", steps)


def test_a_leak_is_found():
    """By `growth`, in the numbers of a run whose memory varies by some MB."""
    def rows(**rising: float) -> list[dict]:
        found = []
        for step in range(1, 161):
            swing = 3_000_000 * (step % 7 == 0) + 2_000_000 * (step > 20)       # a buffer at times, one that stays
            found.append({"step": step, "bytes": int(440e6 + swing + rising.get("bytes", 0) * step), **{
                what: 20 + step % 2 + int(rising.get(what, 0) * ((step + 20) // 40)) for what in ("files", "threads", "shared")}})
        return found

    assert growth(rows()) == (0, {"files": 0, "threads": 0, "shared": 0})
    assert growth(rows(bytes=BATCH))[0] == pytest.approx(BATCH, rel=0.05)
    assert growth(rows(bytes=BATCH / 2))[0] > BATCH / 4
    for what in ("files", "threads", "shared"):
        assert growth(rows(**{what: 1}))[1][what] > 0, "one more from time to time"
