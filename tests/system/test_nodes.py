"""Two nodes: what each prints, its exit code, and the seconds until it ends or continues (docs/several_nodes.md)."""

import contextlib
import dataclasses
import os
import platform
import re
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import rig

FLAGS = ("--num_steps", "40", "--save_every", "10", "--num_workers", "0")
PATIENCE_S = 90
RANK_TIMEOUT_S = 8


@dataclasses.dataclass(frozen=True)
class Fault:
    what: str                       # a method of Pair
    node: int                       # that has it
    restarts: int                   # MAX_RESTARTS of both
    shared: bool = True             # whether the nodes share the folder of the run
    codes: tuple = (0, 0)           # with which the nodes end; None: the node was not started

    def __str__(self) -> str:
        words = {"process": f"a process of node {self.node} is killed", "launcher": f"node {self.node} is killed",
                 "launcher_again": f"node {self.node} is killed and started again",
                 "alone": f"node {self.node} waits for the other at the start; asked to stop (SIGTERM)",
                 "survivor": f"node {1 - self.node} is killed, node {self.node} waits for it; asked to stop (Ctrl-C)",
                 "resume": "`RESUME_PATH` names a run that only node 0 has", "power": "the power of node 0 is cut",
                 "power_again": "the power of node 0 is cut; it comes back and is started again"}[self.what]
        restarts = f"; `MAX_RESTARTS={self.restarts}`" if self.restarts else ""
        return words + restarts + ("" if self.shared else "; no shared folder")


FAULTS = [
    Fault("process", 1, 1), Fault("process", 0, 1), Fault("process", 1, 0, codes=(8, 8)), Fault("process", 0, 0, codes=(8, 8)),
    Fault("process", 1, 1, shared=False, codes=(2, 2)), Fault("process", 0, 1, shared=False, codes=(2, 2)),
    Fault("launcher_again", 1, 1), Fault("launcher_again", 0, 1), Fault("launcher_again", 1, 1, shared=False, codes=(2, 2)),
    Fault("launcher_again", 0, 1, shared=False, codes=(2, 2)), Fault("launcher", 1, 0, codes=(8, -9)),
    Fault("launcher", 0, 0, codes=(-9, 8)), Fault("alone", 0, 0, codes=(143, None)), Fault("alone", 1, 0, codes=(None, 143)),
    Fault("survivor", 0, 1, codes=(143, -9)), Fault("survivor", 1, 1, codes=(-9, 143)),
    Fault("resume", 1, 1, shared=False, codes=(2, 2)), Fault("power", 0, 0, codes=(-9, 8)), Fault("power_again", 0, 1)]


class Pair:
    """The two nodes of a run. `networks`: each is in a network namespace of its own."""

    def __init__(self, folder: Path, fault: Fault, networks: bool = False):
        folder.mkdir()
        self.folder, self.fault = folder, fault
        self.home = folder if fault.shared else folder / "node-0"
        self.launched: dict[int, subprocess.Popen] = {}
        self.names = [f"vit{os.getpid()}{side}" for side in "ab"] if networks else []
        self.address, self.port = ("10.77.0.1", 29500) if networks else ("127.0.0.1", free_port())
        self.flags = (*FLAGS, "--rank_timeout", str(RANK_TIMEOUT_S)) if networks else FLAGS
        # --resume_path auto. Without it only node 0 sees, after a restart, that there is a run; a node 0 that is started again
        # needs it to resume.
        self.auto = networks or (fault.what == "launcher_again" and fault.node == 0)

    def __enter__(self) -> "Pair":
        if self.names:
            first, second = self.names
            ip(f"netns add {first}", f"netns add {second}",
               f"link add {first} netns {first} type veth peer {second} netns {second}",
               f"-n {first} addr add 10.77.0.1/24 dev {first}", f"-n {second} addr add 10.77.0.2/24 dev {second}",
               *(f"-n {name} link set {device} up" for name in self.names for device in ("lo", name)))
        return self

    def __exit__(self, *_) -> None:
        for number in list(self.launched):
            self.kill(number)
        with contextlib.suppress(subprocess.CalledProcessError):
            ip(*(f"netns del {name}" for name in self.names))

    def start(self, *numbers: int, **variables) -> None:
        for number in numbers:
            before = ("ip", "netns", "exec", self.names[number]) if self.names else ()
            variables |= {"GLOO_SOCKET_IFNAME": self.names[number]} if self.names else {}
            self.launched[number] = rig.node(
                self.folder, number, self.port, *self.flags, output=self.home / "output" if self.fault.shared else "output",
                before=before, auto=self.auto, MAX_RESTARTS=self.fault.restarts, MASTER_ADDR=self.address, **variables)

    def start_and_save(self) -> None:
        self.start(0, 1)
        rig.until(lambda: rig.newest(self.home) >= 10 or any(each.poll() is not None for each in self.launched.values()),
                  PATIENCE_S, "a checkpoint")

    def printed(self, number: int) -> str:
        return (self.folder / f"out-{number}.txt").read_text() if (self.folder / f"out-{number}.txt").exists() else ""

    def kill(self, number: int) -> None:
        """train.sh and torchrun; their processes end with them."""
        launched = self.launched[number]
        for process in [launched.pid, *rig.processes_of_run(launched, 1)["agent"]]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        launched.wait()

    def waits(self, number: int) -> None:
        rig.until(lambda: "is waiting for" in self.printed(number), PATIENCE_S, "the report of who is missing")

    # ------------------------------------------------------------------- the faults; each returns the time at which it happened

    def process(self, number: int) -> float:
        self.start_and_save()
        os.kill(*rig.processes_of_run(self.launched[number], 1)["ranks"], signal.SIGKILL)
        return time.monotonic()

    def launcher(self, number: int) -> float:
        self.start_and_save()
        self.kill(number)
        return time.monotonic()

    def launcher_again(self, number: int) -> float:
        self.launcher(number)
        self.waits(1 - number)
        self.start(number)
        return time.monotonic()

    def alone(self, number: int) -> float:
        self.start(number)
        self.waits(number)
        self.launched[number].send_signal(signal.SIGTERM)
        return time.monotonic()

    def survivor(self, number: int) -> float:
        self.launcher(1 - number)
        self.waits(number)
        os.killpg(self.launched[number].pid, signal.SIGINT)
        return time.monotonic()

    def resume(self, _: int) -> float:
        self.start_and_save()
        for launched in self.launched.values():
            assert launched.wait(PATIENCE_S) == 0
        for file in self.folder.glob("out-*.txt"):
            file.unlink()
        self.start(0, 1, RESUME_PATH="output/run")
        return time.monotonic()

    def power(self, _: int) -> float:
        self.start_and_save()
        ip(f"-n {self.names[0]} link set {self.names[0]} down")         # no process that is killed now can close its connections
        self.kill(0)
        return time.monotonic()

    def power_again(self, _: int) -> float:
        self.power(0)
        self.waits(1)
        ip(f"-n {self.names[0]} link set {self.names[0]} up")
        self.start(0)
        return time.monotonic()

    # ------------------------------------------------------------------------------------------------------ the outcome

    def has_resumed(self) -> bool:
        names = [event["event"] for event in rig.events(self.home)]
        return "resume" in names and "train" in names[len(names) - names[::-1].index("resume"):]

    def outcome(self, begun: float) -> dict:
        """Return a row of the table: what each node printed after the fault, its exit code, the seconds."""
        resumes = self.fault.codes == (0, 0)
        if resumes:
            rig.until(self.has_resumed, PATIENCE_S, "the next step")
        seconds = time.monotonic() - begun
        codes = {number: launched.wait(PATIENCE_S) for number, launched in self.launched.items()}
        seconds = seconds if resumes else time.monotonic() - begun
        assert tuple(map(codes.get, (0, 1))) == self.fault.codes, (str(self.fault), codes, self.printed(0)[-3000:],
                                                                  self.printed(1)[-3000:])
        return {"fault": str(self.fault), "printed": [self.lines(0), self.lines(1)], "codes": [codes.get(0), codes.get(1)],
                "seconds": round(seconds, 1)}

    def lines(self, number: int) -> list[str]:
        """Return the printed lines, with placeholders for what differs between runs: processes, ports, steps."""
        found = [line for line in self.printed(number).splitlines()
                 if re.match(r"train\.(sh|py): (?!.*SIG)", line) and "Paths" not in line]
        for pattern, shown in ((r"pid \d+", "pid N"), (r":\d{5}\b", ":29500"), (r"step \d+:", "step N:"), (r"\]:\d+", "]:N"),
                               (platform.node(), "b"), (re.escape(str(self.folder)) + "/", "")):
            found = [re.sub(pattern, shown, line) for line in found]
        return [textwrap.shorten(line, 140, placeholder=" ...") for line in dict.fromkeys(found)]


def ip(*commands: str) -> None:
    for command in commands:
        subprocess.run(["ip", *command.split()], check=True, capture_output=True)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def has_namespaces() -> bool:
    name = f"vit{os.getpid()}"
    try:
        ip(f"netns add {name}", f"netns del {name}")
    except (OSError, subprocess.CalledProcessError):
        return False
    return True


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
@pytest.mark.contract("P25", "two nodes continue after a loss, or both end with one code and a line that names the cause")
def test_faults_of_two_nodes(tmp_path, tries, figure):
    ends = []                           # of the runs that continue, and of an uninterrupted one ("resume")
    for number, fault in enumerate(FAULTS[:tries(1, len(FAULTS))]):
        networks = fault.what.startswith("power")
        if networks and not (shutil.which("ip") and has_namespaces()):
            continue
        with Pair(tmp_path / str(number), fault, networks) as pair:
            outcome = pair.outcome(getattr(pair, fault.what)(fault.node))
            printed = [pair.printed(number) for number in (0, 1)]
        assert not re.search("Traceback|FAILED", "".join(printed)), (str(fault), printed)
        for code, text in zip(fault.codes, printed):
            assert text.count(f"node 1 (host {platform.node()}): ") == (code == 2), (str(fault), text[-3000:])
        if fault.codes == (0, 0):
            steps = [event["step"] for event in rig.events(pair.home) if event["event"] == "train"]
            assert steps == list(range(1, 41)), str(fault)
        if fault.codes == (0, 0) or fault.what == "resume":
            ends.append(rig.end_of(pair.home))
        figure(f"two nodes: {fault}", 1, nodes=outcome)
    assert all(end == ends[0] for end in ends), ends
