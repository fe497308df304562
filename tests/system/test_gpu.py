"""Tests that need a GPU. They are skipped where there is none."""

import json
import os
import signal
import time
from pathlib import Path

import pytest
import rig
import torch
from runs import load_state

import predict

pytestmark = pytest.mark.gpu
FLAGS = ("--device", "cuda", "--num_steps", 6, "--eval_every", 3, "--eval_batch_size", 100)


def losses(folder: str) -> list[float]:
    events = [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]
    return [event["loss"] for event in events if event["event"] == "train"]


@pytest.mark.parametrize(("flags", "tolerance"), [
    (["--precision", "fp32"], 1e-4), (["--precision", "bf16"], 0.02), (["--fp16", "--fp16_opt_level", "O1"], 0.02)])
def test_losses_are_those_of_the_cpu(run_train, flags, tolerance):
    assert run_train("--name", "cpu", "--num_steps", 6, "--eval_every", 3, "--precision", "fp32") == 0
    assert run_train("--name", "gpu", *FLAGS, *flags) == 0
    for cpu, gpu in zip(losses("output/cpu"), losses("output/gpu"), strict=True):
        assert gpu == pytest.approx(cpu, rel=tolerance)


# Only features whose random numbers are not drawn on the device: crops, RandAugment and erasing use the CPU, mixing numpy.
EVERYTHING = [
    "--augmentation", "crop", "--randaugment_ops", 2, "--random_erasing", 0.5, "--mixup_alpha", 0.8, "--cutmix_alpha", 1,
    "--label_smoothing", 0.1, "--class_weights", "balanced", "--ema_decay", 0.5, "--layer_decay", 0.8, "--distillation", "soft",
    "--teacher", "output/teacher", "--precision", "fp32", "--optimizer", "sgd"]


def test_mixing_averaging_and_distilling_are_those_of_the_cpu(run_train):
    """The images are mixed on the device, where the teacher runs too."""
    assert run_train("--name", "teacher", "--learning_rate", 0.01) == 0
    assert run_train("--name", "cpu", "--num_steps", 6, "--eval_every", 3, *EVERYTHING) == 0
    assert run_train("--name", "gpu", *FLAGS, *EVERYTHING) == 0
    assert losses("output/gpu") == pytest.approx(losses("output/cpu"), rel=1e-4)
    cpu, gpu = (load_state(Path(f"output/{name}/step-00000006.pt")) for name in ("cpu", "gpu"))
    for name, weight in cpu.ema.items():
        assert gpu.ema[name].device.type == "cpu"
        torch.testing.assert_close(gpu.ema[name], weight, rtol=0, atol=1e-3)


@pytest.mark.parametrize("more", [[], ["--ema_decay", 0.5, "--mixup_alpha", 1, "--drop_path_rate", 0.3, "--dropout_rate", 0.1]],
                         ids=["plain", "with an average, mixing and dropout"])
def test_a_run_on_the_gpu_resumes(run_train, more):
    flags = [*FLAGS, "--fp16", "--save_every", 3, *more]
    assert run_train("--name", "whole", *flags) == 0
    assert run_train("--name", "parts", *flags) == 0
    Path("output/parts/step-00000006.pt").unlink()
    assert run_train("--resume_path", "output/parts", "--device", "cuda") == 0
    assert losses("output/parts") == pytest.approx(losses("output/whole"), rel=1e-3)
    assert load_state(Path("output/parts/step-00000006.pt")).step == 6


def test_labels_are_those_of_the_cpu(run_train):
    assert run_train("--name", "r", "--num_steps", 20, "--eval_every", 20) == 0
    for device in ("cpu", "cuda"):
        assert predict.main(["output/r", "--split", "val", "--precision", "fp32", "--device", device, "--output", device]) == 0
    rows = [[line.split(",") for line in Path(device).read_text().splitlines()[1:]] for device in ("cpu", "cuda")]
    assert [row[:3] for row in rows[0]] == [row[:3] for row in rows[1]]
    assert [float(row[3]) for row in rows[0]] == pytest.approx([float(row[3]) for row in rows[1]], abs=1e-3)


@pytest.mark.slow
def test_the_script_uses_the_gpus(run_script):
    done = run_script("train.sh", "--num_steps", "4", "--eval_every", "4")
    assert done.returncode == 0 and torch.cuda.get_device_name() in done.stdout, done.stderr


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize(("fault", "words"), [
    (signal.SIGKILL, "has ended"), (signal.SIGSTOP, "did not answer within 20 s (--rank_timeout)")], ids=["killed", "stopped"])
def test_a_lost_process_is_named_and_leaves_its_code(tmp_path, fault, words):
    """NCCL's watchdog would abort the other process, after minutes and without an exit code of ours."""
    launched = rig.script(tmp_path, "--device", "cuda", "--num_steps", "1000000", "--rank_timeout", "20", NPROC=2, GPUS="0,1")
    log = tmp_path / "output" / "run" / "log.jsonl"
    rig.until(lambda: log.exists() and '"train"' in log.read_text(), 300, "the first step")
    victim = rig.processes_of_run(launched, 2)["ranks"][1]
    os.kill(victim, fault)
    began = time.monotonic()
    code, printed = launched.wait(120), (tmp_path / "out.txt").read_text()
    errors = [line for line in printed.splitlines() if line.startswith("train.py: error: ")]
    assert code == 8 and len(errors) == 1 and words in errors[0], printed[-5000:]
    if fault == signal.SIGKILL:
        assert f"(pid {victim})" in errors[0] and time.monotonic() - began < 20
