"""docs/reliability.md, through train.sh and torchrun: kills, signals, restarts."""

import itertools
import os
import random
import signal
import sys
import time

import pytest
import rig

import train

FLAGS = ("--num_workers", "1", "--num_steps", "40", "--save_every", "10")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The end of the same run on two processes, which nobody touches."""
    folder = tmp_path_factory.mktemp("whole")
    assert rig.script(folder, *FLAGS, NPROC=2).wait(120) == 0, (folder / "out.txt").read_text()[-3000:]
    return rig.end_of(folder)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
@pytest.mark.contract("P3")
def test_kills_under_torchrun(tmp_path, whole, tries, figure):
    """MAX_RESTARTS brings a lost process back; after a kill of the launcher the script is started again."""
    chance, kills = random.Random(3), {"agent": 0, "ranks": 0}
    kinds = list(itertools.islice(itertools.cycle(["ranks", "agent"]), tries(2, 30)))
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
            launched.wait(30)
            below = [*processes["ranks"], *processes["workers"]]
            rig.until(lambda: not any(map(rig.command_of, below)), 10, "the end of the processes")     # noqa: B023
            launched = rig.script(folder, *FLAGS, NPROC=2)
        assert launched.wait(120) == 0, (folder / "out.txt").read_text()[-3000:]
        assert rig.end_of(folder) == whole
    figure("kill -9 of torchrun: nobody is left after 10 s, the next start goes on to the same end", kills["agent"])
    figure("kill -9 of one of two processes: torchrun restarts both, the same end", kills["ranks"])


CASES = [("everyone", signal.SIGTERM), ("script", signal.SIGUSR1), ("ranks", signal.SIGTERM),
         ("agent", signal.SIGTERM), ("script", signal.SIGINT),
         ("script", signal.SIGTERM), ("script", signal.SIGHUP), ("ranks", signal.SIGUSR1), ("group", signal.SIGINT),
         ("agent", signal.SIGINT)]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
@pytest.mark.contract("P9")
def test_signals_to_script_launcher_and_processes(tmp_path, whole, tries, figure):
    """Wherever a request comes in, the run is saved, train.sh ends with 143, and the next start goes on to the same end.

    "group": Ctrl-C at a terminal; "everyone": what a batch system does."""
    chance, slowest = random.Random(9), 0.0
    wanted, resumed = tries(2, 24), tries(1, 24)
    for number, (whom, what) in enumerate(itertools.islice(itertools.cycle(CASES), wanted)):
        folder = tmp_path / str(number)
        launched = rig.script(folder, *FLAGS, NPROC=2)
        log = folder / "output" / "run" / "log.jsonl"
        rig.until(lambda: log.exists() and '"train"' in log.read_text(), what="the first step")          # noqa: B023
        time.sleep(chance.uniform(0, 0.5))
        processes = rig.processes_of_run(launched, 2) | {"script": [launched.pid]}
        begun = time.monotonic()
        if whom == "group":
            os.killpg(launched.pid, what)
        else:
            for process in itertools.chain(*processes.values()) if whom == "everyone" else processes[whom][-1:]:
                os.kill(process, what)
        code = launched.wait(60)
        slowest = max(slowest, time.monotonic() - begun)
        said = (folder / "out.txt").read_text()
        assert code == 143, (whom, what, code, said[-3000:])
        steps = [event["step"] for event in rig.events(folder) if event["event"] == "train"]
        assert rig.newest(folder) == steps[-1] > 0, (whom, what, said[-3000:])
        assert not any(rig.command_of(process) for process in itertools.chain(*processes.values()) if process != launched.pid)
        if number < resumed:
            assert rig.script(folder, *FLAGS, NPROC=2).wait(120) == 0
            assert rig.end_of(folder) == whole
    assert slowest <= 20
    figure(f"signals to train.sh, torchrun, one process, all of them: saved, code 143 (slowest end after {slowest:.1f} s)",
           wanted)


@pytest.mark.slow
def test_twice_asked_the_script_leaves_at_once(tmp_path):
    launched = rig.script(tmp_path, "--num_steps", "100000", "--num_workers", "1", "--train_batch_size", "4096",
                          NPROC=1)
    rig.until(lambda: (tmp_path / "output" / "run" / "log.jsonl").exists(), what="the start")
    processes = list(itertools.chain(*rig.processes_of_run(launched, 1).values()))
    os.kill(launched.pid, signal.SIGTERM)
    time.sleep(3.2)
    os.kill(launched.pid, signal.SIGTERM)
    assert launched.wait(8) == 143
    assert "Killed" not in (tmp_path / "out.txt").read_text()
    rig.until(lambda: not any(rig.command_of(process) for process in processes), 8, "the end of the processes")


@pytest.mark.slow
def test_a_request_while_the_run_is_set_up_is_not_taken_for_a_loss(tmp_path):
    """torchrun would start the process anew, and it would train on."""
    launched = rig.script(tmp_path, *FLAGS, NPROC=1, MAX_RESTARTS=1)
    rig.until(lambda: rig.processes_of_run(launched, 1)["ranks"], what="the process")
    time.sleep(1.0)
    os.kill(launched.pid, signal.SIGTERM)
    assert launched.wait(30) == 143
    said = (tmp_path / "out.txt").read_text()
    assert "step 1/" not in said and not list(tmp_path.glob("output/run/*.pt")), said


def test_a_closed_output_ends_no_run(tmp_path):
    """bash train.sh | head"""
    reader, writer = os.pipe()
    stream = train._Outlives(open(writer, "w", buffering=1))
    os.close(reader)
    for _ in range(3):
        assert stream.write("a line\n") == 7
        stream.flush()
    assert not stream.isatty()
