"""Whole runs of train.py for the tests of docs/promises.md: forked, so that each takes two seconds, without a start-up.

`start` forks this process, which has already loaded PyTorch, and calls train.main in the child: a tiny ViT on digits with
everything that draws random numbers or has a state. Several processes form a gloo group, without torchrun.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
import traceback
from pathlib import Path

import torch
import torch.utils.tensorboard

# Imported here so that the children have already loaded what a run imports.
import models.create  # noqa: F401
import train
from utils.data import datasets
from utils.data.splits import Subset
from utils.report import plots
from utils.run import checkpoint
from utils.training import trainer

ROOT = Path(__file__).resolve().parents[2]
STEPS = 30
UNSET = ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "VIT_LAUNCH")      # variables that are unset for scripts
# Augmentation, mixing, dropout, averaged weights, a schedule; a checkpoint every third step, an evaluation every seventh.
FLAGS = ("--device cpu --pretrained_dir none --patch_size 8 --hidden_size 64 --mlp_dim 128 --num_heads 2 --num_layers 2 "
         "--img_size 32 --dropout_rate 0.1 --drop_path_rate 0.1 --optimizer adamw --learning_rate 1e-3 --weight_decay 0.05 "
         "--ema_decay 0.9 --augmentation crop --randaugment_ops 2 --random_erasing 0.3 --mixup_alpha 0.8 --cutmix_alpha 1 "
         "--label_smoothing 0.1 "
         f"--train_batch_size 16 --num_steps {STEPS} --save_every 3 --eval_every 7 "
         "--warmup_steps 5 --output_dir output --log_dir logs --name run --resume_path auto").split()


def start(folder: Path, *flags: str, ranks: int = 1, before=None, log: str = "out.txt") -> list[int]:
    """Start a run -> its processes, each the leader of a process group. `before(rank)` runs in the child, to break something.

    `flags` override FLAGS. The child appends its output to `log` in the folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    sys.stdout.flush()
    sys.stderr.flush()
    children = []
    for rank in range(ranks):
        child = os.fork()
        if child == 0:
            _live(folder, [*FLAGS, *map(str, flags)], rank, ranks, port, before, log)
        children.append(child)
    return children


def _live(folder: Path, argv: list[str], rank: int, ranks: int, port: int, before, log: str) -> None:
    """Run in the child; never return to pytest."""
    code = 1
    try:
        os.setsid()
        os.chdir(folder)
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(output, 1)
        os.dup2(output, 2)
        sys.stdout, sys.stderr = open(1, "w", buffering=1, closefd=False), open(2, "w", buffering=1, closefd=False)
        group = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1",
                 "MASTER_PORT": port}
        group |= {"TORCHELASTIC_RUN_ID": "rig"}
        for name in ("VIT_LAUNCH", *group):
            os.environ.pop(name, None)
        if ranks > 1:
            os.environ |= {name: str(value) for name, value in group.items()}
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        plots.save = lambda figure, path: Path(path).touch()
        # Few images to evaluate on, and so few to train on that the run takes more than one epoch.
        splits, few = datasets.digits(""), lambda split, count: Subset(split, range(count))
        datasets.DATASETS["digits"] = lambda _: dataclasses.replace(
            splits, train=few(splits.train, 200), val=few(splits.val, 40), test=few(splits.test, 40))
        if before is not None:
            before(rank)
        code = train.main(argv)
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(BaseException):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def stopping_after(step: int):
    """Return a before(rank) that requests a stop after this step."""
    def install(rank: int) -> None:
        original = trainer.Trainer.train_step

        def train_step(self, *arguments, **keywords):
            if self.step == step - 1:
                os.kill(os.getpid(), signal.SIGUSR1)
            return original(self, *arguments, **keywords)

        trainer.Trainer.train_step = train_step
    return install


@contextlib.contextmanager
def files_no_larger_than(size: int):
    """Simulate a full disk: a write beyond `size` is cut off, and the next one is an error."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def wait(children: list[int], timeout: float = 300) -> list[int]:
    """-> exit codes, -9 after SIGKILL. Kills processes that still run after `timeout` seconds, and fails."""
    ends, deadline = {}, time.monotonic() + timeout
    while len(ends) < len(children):
        for child in children:
            if child not in ends:
                found, status = os.waitpid(child, os.WNOHANG)
                if found:
                    ends[child] = os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            kill(children)
            raise AssertionError(f"still running after {timeout} s")
        time.sleep(0.005)
    return [ends[child] for child in children]


def kill(children: list[int]) -> None:
    """Kill whole process groups with SIGKILL, with their loader workers."""
    for child in children:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)


def run(folder: Path, *flags: str, ranks: int = 1, before=None) -> dict[str, str]:
    """Do a run, which must succeed -> the hashes of its end"""
    codes = wait(start(folder, *flags, ranks=ranks, before=before))
    assert codes == [0] * ranks, (codes, (folder / "out.txt").read_text()[-3000:])
    return end_of(folder)


def end_of(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of each part of the newest checkpoint: weights, averages, optimizer, scaler, counters, best."""
    state = checkpoint.open_run_checkpoint(checkpoint.step_files(folder / "output" / "run")[0]).state()

    def words(value, name=""):
        if isinstance(value, torch.Tensor):
            yield f"{name}{value.dtype}{tuple(value.shape)}".encode()
            yield value.reshape(-1).view(torch.uint8).numpy().tobytes()
        elif isinstance(value, (dict, list, tuple)):
            for key, inside in value.items() if isinstance(value, dict) else enumerate(value):
                yield from words(inside, f"{name}/{key}")
        else:
            yield f"{name}={value!r}".encode()

    parts = ("step", "updates", "skips", "model", "ema", "optimizer", "scaler", "best", "first")
    return {name: hashlib.sha256(b"".join(words(getattr(state, name)))).hexdigest()[:16] for name in parts}


def events(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "output" / "run" / "log.jsonl").read_text().splitlines()]


def newest(folder: Path) -> int:
    """Return the step of the newest checkpoint file, 0 without one."""
    home = folder / "output" / "run"
    steps = checkpoint.step_files(home) if home.is_dir() else []
    return int(checkpoint.STEP_FILE.fullmatch(steps[0].name)[1]) if steps else 0


# ------------------------------------------------------------------------------------------- through torchrun and train.sh


def script(folder: Path, *flags: str, script: str = "train.sh", **variables) -> subprocess.Popen:
    """Start `bash train.sh` (or another script) with the rig's run, in a new session."""
    folder.mkdir(parents=True, exist_ok=True)
    words = [*FLAGS, *map(str, flags)]
    words[words.index("output")], words[words.index("logs")] = str(folder / "output"), str(folder / "logs")
    environment = {name: value for name, value in os.environ.items() if name not in UNSET}
    environment |= {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1"} | {name: str(value) for name, value in variables.items()}
    return subprocess.Popen(["bash", str(ROOT / script), *words], start_new_session=True, stdin=subprocess.DEVNULL,
                            stdout=open(folder / "out.txt", "a"), stderr=subprocess.STDOUT, env=environment)


def node(folder: Path, number: int, port: int, *flags: str, output: str | Path = "output", before: tuple[str, ...] = (),
         auto: bool = True, **variables) -> subprocess.Popen:
    """Start `bash train.sh` for node `number` of two, with one process, in a new session; its output is in folder/out-NUMBER.txt.

    It runs in its own tree, node-NUMBER: a relative `output` is only this node's, an absolute one is shared by the nodes.
    before: words in front of the command, such as `ip netns exec X`. auto: whether to add --resume_path auto.
    """
    tree = folder / f"node-{number}"
    if not tree.exists():
        tree.mkdir(parents=True)
        for name in ("utils", "models", "assets", "configs.py", "train.py", "requirements.txt"):
            (tree / name).symlink_to(ROOT / name)
        shutil.copy(ROOT / "train.sh", tree)
    words = [*FLAGS, *map(str, flags)]
    words[words.index("output")] = str(output)
    if not auto:
        first = words.index("--resume_path")
        del words[first:first + 2]
    environment = {name: value for name, value in os.environ.items() if name not in UNSET}
    own = {"NNODES": 2, "NODE_RANK": number, "NPROC": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port} | variables
    environment |= {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1"} | {name: str(value) for name, value in own.items()}
    return subprocess.Popen([*before, "bash", str(tree / "train.sh"), *words], start_new_session=True, stdin=subprocess.DEVNULL,
                            stdout=open(folder / f"out-{number}.txt", "a"), stderr=subprocess.STDOUT, env=environment)


def until(condition, seconds: float = 180, what: str = "it") -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not happen within {seconds} s"
        time.sleep(0.05)


def command_of(process: int) -> str:
    try:
        return Path(f"/proc/{process}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:
        return ""


def processes_of_run(launched: subprocess.Popen, processes: int) -> dict[str, list[int]]:
    """-> {"agent": torchrun, "ranks": the processes that train, "workers": their loader workers}"""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, parent = path.read_text().rpartition(")")[2].split()[:2]
            if state != "Z":
                parents.setdefault(int(parent), []).append(int(path.parent.name))
    descendants = list(parents.get(launched.pid, []))
    for process in descendants:                            # parents before their children
        descendants += parents.get(process, [])
    found = {"agent": [], "ranks": [], "workers": []}
    for process in descendants:
        words = command_of(process)
        if "utils.distributed.torchrun" in words:
            found["agent"].append(process)
        elif "train.py" in words:
            found["ranks" if len(found["ranks"]) < processes else "workers"].append(process)
    return found
