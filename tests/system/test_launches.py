"""docs/promises.md, through train.sh and torchrun: kills, signals, restarts."""

import contextlib
import itertools
import os
import random
import signal
import sys
import time
from pathlib import Path

import pytest
import rig
from runs import make_tree

from utils.data import datasets

FLAGS = ("--num_workers", "1", "--num_steps", "40", "--save_every", "10")


def wait_for_a_step(folder: Path) -> None:
    log = folder / "output" / "run" / "log.jsonl"
    rig.until(lambda: log.exists() and '"train"' in log.read_text(), 300, "the first step")


def forked(folder: Path) -> dict[str, str]:
    """Run, or resume, the same run on two processes without torchrun. Return its final state."""
    def all_digits(rank: int) -> None:
        datasets.DATASETS["digits"] = datasets.digits

    return rig.run(folder, *FLAGS, ranks=2, before=all_digits)


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    """Return the final state of an uninterrupted run."""
    return forked(tmp_path_factory.mktemp("whole"))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
@pytest.mark.contract("P3")
def test_kills_under_torchrun(tmp_path, whole, tries, figure):
    """MAX_RESTARTS restarts a lost process. After a kill of the launcher the test starts the script again."""
    chance, kills = random.Random(3), {"agent": 0, "ranks": 0}
    kinds = list(itertools.islice(itertools.cycle(["ranks", "agent"]), tries(1, 30)))
    for number, kind in enumerate(kinds):
        folder = tmp_path / str(number)
        launched = rig.script(folder, *FLAGS, NPROC=2, MAX_RESTARTS=1)
        rig.until(lambda: rig.newest(folder) >= 10 or launched.poll() is not None, what="a checkpoint")   # noqa: B023
        time.sleep(chance.uniform(0, 1.0))
        processes = rig.processes_of_run(launched, 2)
        victims = processes[kind]
        if not victims:
            continue
        os.kill(chance.choice(victims), signal.SIGKILL)
        kills[kind] += 1
        if kind == "agent":
            launched.wait(60)
            below = [*processes["ranks"], *processes["workers"]]
            rig.until(lambda: not any(map(rig.command_of, below)), 60, "the end of the processes")     # noqa: B023
            launched = rig.script(folder, *FLAGS, NPROC=2)
        assert launched.wait(120) == 0, (folder / "out.txt").read_text()[-3000:]
        assert rig.end_of(folder) == whole
    figure("kill -9 of torchrun: no process is left, the next start reaches the same end", kills["agent"])
    figure("kill -9 of one of two processes: torchrun restarts both, which reach the same end", kills["ranks"])


CASES = [("everyone", signal.SIGTERM), ("script", signal.SIGUSR1), ("ranks", signal.SIGTERM),
         ("agent", signal.SIGTERM), ("script", signal.SIGINT),
         ("script", signal.SIGTERM), ("script", signal.SIGHUP), ("ranks", signal.SIGUSR1), ("group", signal.SIGINT),
         ("agent", signal.SIGINT)]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
@pytest.mark.contract("P9")
def test_signals_to_script_launcher_and_processes(tmp_path, whole, tries, figure):
    """Whichever process gets the signal, the run is saved, train.sh exits with 143, and the resumed run has the same result.

    "group": Ctrl-C at a terminal; "everyone": what a batch system does."""
    chance, slowest = random.Random(9), 0.0
    wanted = tries(1, 24)
    for number, (whom, what) in enumerate(itertools.islice(itertools.cycle(CASES), wanted)):
        folder = tmp_path / str(number)
        launched = rig.script(folder, *FLAGS, NPROC=2)
        wait_for_a_step(folder)
        time.sleep(chance.uniform(0, 0.5))
        processes = rig.processes_of_run(launched, 2) | {"script": [launched.pid]}
        begun = time.monotonic()
        if whom == "group":
            os.killpg(launched.pid, what)
        else:
            for process in itertools.chain(*processes.values()) if whom == "everyone" else processes[whom][-1:]:
                # On a busy machine one of many may have ended after the signals to the others.
                with contextlib.suppress(*[ProcessLookupError] * (whom == "everyone")):
                    os.kill(process, what)
        code = launched.wait(60)
        slowest = max(slowest, time.monotonic() - begun)
        printed = (folder / "out.txt").read_text()
        assert code == 143, (whom, what, code, printed[-3000:])
        steps = [event["step"] for event in rig.events(folder) if event["event"] == "train"]
        assert rig.newest(folder) == steps[-1] > 0, (whom, what, printed[-3000:])
        assert not any(rig.command_of(process) for process in itertools.chain(*processes.values()) if process != launched.pid)
        assert forked(folder) == whole
    figure(f"signals to train.sh, torchrun, one process, all of them: saved, code 143 (slowest end after {slowest:.1f} s)",
           wanted)


# Flags with which a run of the rig spends nearly all its time in one phase.
PHASES = {"step": ("--eval_every", "100000", "--save_every", "100000"),
          "evaluation": ("--eval_every", "1", "--eval_batch_size", "1", "--save_every", "100000"),
          "save": ("--eval_every", "100000", "--save_every", "1", "--hidden_size", "512", "--num_heads", "8", "--mlp_dim", "2048",
                   "--train_batch_size", "4")}
LOSSES = dict.fromkeys([("O2", "stop", "step"), ("O1", "kill", "evaluation"), *itertools.product(
    ("O2", "bf16", "O0", "O1", "O3"), ("stop", "kill"), PHASES)])


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
@pytest.mark.contract("P10", "train.sh ends with code 8 within --rank_timeout + 40 s where one process is stopped or killed")
def test_lost_process_ends_the_script(tmp_path, tries, figure):
    """Also with train_fp16.sh at its default level O2, which sums gradients differently."""
    wanted, slowest, timeout_s = tries(1, len(LOSSES)), 0.0, tries(4, 10)
    for number, (level, fault, phase) in enumerate(list(LOSSES)[:wanted]):
        folder, victim = tmp_path / str(number), number // 2 % 2
        variables = {"PRECISION": "bf16"} if level == "bf16" else {} if level == "O2" else {"FP16_OPT_LEVEL": level}
        launched = rig.script(folder, "--num_steps", "100000", "--num_workers", "0", "--learning_rate", "1e-5", "--ema_decay",
                              "0", "--rank_timeout", str(timeout_s), *PHASES[phase], NPROC=2, **variables,
                              script="train.sh" if level == "bf16" else "train_fp16.sh")
        wait_for_a_step(folder)
        time.sleep(0.5)
        ranks = rig.processes_of_run(launched, 2)["ranks"]
        os.kill(ranks[victim], signal.SIGSTOP if fault == "stop" else signal.SIGKILL)
        begun = time.monotonic()
        code, printed = launched.wait(timeout_s + 40), (folder / "out.txt").read_text()
        slowest = max(slowest, time.monotonic() - begun)
        errors = [line for line in printed.splitlines() if line.startswith("train.py: error: ")]
        assert code == 8 and len(errors) == 1, "\n".join(map(str, [level, fault, phase, victim, code, printed[-5000:]]))
        assert ("did not answer within" if fault == "stop" else "has ended") in errors[0]
        assert (f"train.sh: error: process {victim} (pid {ranks[victim]}) was killed by signal 9" in printed) == (fault == "kill")
        assert not any(map(rig.command_of, ranks))
    figure(f"one of two processes stopped or killed under train.sh: code 8 (slowest end after {slowest:.0f} s)", wanted)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_a_killed_single_process_is_reported(tmp_path):
    """As the kernel does when memory runs out: the message says what to lower, and torchrun's report is not shown."""
    launched = rig.script(tmp_path, "--num_steps", "100000", "--num_workers", "0", NPROC=1)
    wait_for_a_step(tmp_path)
    victim, = rig.processes_of_run(launched, 1)["ranks"]
    os.kill(victim, signal.SIGKILL)
    code, printed = launched.wait(60), (tmp_path / "out.txt").read_text()
    assert code == 1 and f"train.sh: error: process 0 (pid {victim}) was killed by signal 9, probably" in printed, printed[-3000:]
    assert "Traceback" not in printed and "ChildFailedError" not in printed


@pytest.mark.slow
def test_error_of_one_process_gives_the_script_its_code(tmp_path):
    """The other process loses its peer, but that is not reported as the cause. torchrun restarts nothing."""
    tree = make_tree(tmp_path / "tree", images=16)
    (tree / "train" / "bee" / "2.png").write_bytes(b"not an image")
    launched = rig.script(tmp_path, "--dataset", "folder", "--data_dir", str(tree), "--num_steps", "100000", "--num_workers", "0",
                          NPROC=2, MAX_RESTARTS=1)
    code, printed = launched.wait(300), (tmp_path / "out.txt").read_text()
    errors = [line for line in printed.splitlines() if "error: " in line]
    assert code == 2 and len(errors) == 1 and f"{tree}/train/bee/2.png" in errors[0], printed[-3000:]
    assert "Traceback" not in printed


@pytest.mark.slow
def test_a_second_signal_ends_the_script_at_once(tmp_path):
    launched = rig.script(tmp_path, "--num_steps", "100000", "--num_workers", "1",
                          "--train_batch_size", "4096", NPROC=1)
    rig.until(lambda: (tmp_path / "output" / "run" / "log.jsonl").exists(), what="the start")
    processes = list(itertools.chain(*rig.processes_of_run(launched, 1).values()))
    os.kill(launched.pid, signal.SIGTERM)
    time.sleep(3.2)
    os.kill(launched.pid, signal.SIGTERM)
    assert launched.wait(60) == 143
    assert "Killed" not in (tmp_path / "out.txt").read_text()
    rig.until(lambda: not any(rig.command_of(process) for process in processes), 60, "the end of the processes")


@pytest.mark.slow
def test_a_request_to_stop_during_setup_causes_no_restart(tmp_path):
    """If torchrun took it for a failure, it would restart the process, which would continue training."""
    launched = rig.script(tmp_path, *FLAGS, NPROC=1, MAX_RESTARTS=1)
    rig.until(lambda: rig.processes_of_run(launched, 1)["ranks"], what="the process")
    time.sleep(1.0)
    os.kill(launched.pid, signal.SIGTERM)
    assert launched.wait(60) == 143
    printed = (tmp_path / "out.txt").read_text()
    assert "step 1/" not in printed and not list(tmp_path.glob("output/run/*.pt")), printed
