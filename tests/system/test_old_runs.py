"""Runs that older versions of the code started resume with today's code to the same result (tests/fixtures/old_runs)."""

import hashlib
import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from runs import differences, events_of, load_state
from torch.nn import functional as F

import configs
import train
from utils.report import plots
from utils.run import checkpoint

RUNS = Path(__file__).resolve().parents[1] / "fixtures" / "old_runs"
STATE = ("step", "updates", "skips", "model", "ema", "optimizer", "scaler", "best", "first", "architecture", "classes",
         "train_images", "data")
KEY_BIAS = "blocks.0.attn.qkv.bias"          # its middle third: the softmax ignores it, so its gradient is only rounding


def numerics() -> str:
    """Return a hash of what PyTorch and Pillow compute for operations of the runs. Equal hashes mean the same bits."""
    digest = hashlib.sha256(torch.__version__.encode())
    generator = torch.Generator().manual_seed(0)
    x, w = (torch.randn(shape, generator=generator).requires_grad_() for shape in ((16, 17, 8), (24, 8)))
    for dtype in (torch.float32, torch.float16):
        q, k, v = F.linear(x.to(dtype), w.to(dtype)).view(16, 17, 3, 2, 4).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        y = F.gelu(F.layer_norm(y, (8,))).log_softmax(-1)
        gradients = torch.autograd.grad(y.float().square().mean(), (x, w), retain_graph=True)
        kernel = torch.randn(8, 3, 4, 4, generator=generator).to(dtype)
        image = F.conv2d(torch.rand(8, 3, 8, 8, generator=generator).to(dtype), kernel, stride=4)
        for tensor in (y, *gradients, image):
            digest.update(tensor.detach().float().numpy().tobytes())
    pixels = np.random.default_rng(0).integers(0, 256, (9, 9, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(jpeg := io.BytesIO(), "JPEG")
    digest.update(np.asarray(Image.open(jpeg).resize((12, 12), Image.Resampling.BILINEAR)).tobytes())
    return digest.hexdigest()


def values_of(state: checkpoint.RunState) -> dict:
    return {name: vars(state)[name] for name in STATE}


def assert_close(new, old, tolerance: float, path="") -> None:
    """Assert that nested values are equal, with every number within the tolerance."""
    if isinstance(old, (dict, list, tuple)):
        assert len(new) == len(old), path
        for key in old if isinstance(old, dict) else range(len(old)):
            assert_close(new[key], old[key], tolerance, f"{path}/{key}")
    elif isinstance(old, torch.Tensor):
        new, old = new.clone(), old.clone()
        if path.endswith(KEY_BIAS):
            new[8:16] = old[8:16] = 0
        torch.testing.assert_close(new, old, rtol=tolerance, atol=tolerance, msg=lambda text: f"{path}: {text}")
    elif isinstance(old, float):
        assert new == pytest.approx(old, rel=tolerance, abs=tolerance), path
    elif not path.endswith("/fused"):                        # the choice of the kernel may differ between sessions
        assert new == old, path


@pytest.fixture
def resume(tmp_path, monkeypatch):
    """Return resume(name) -> (training images (steps, B, C, height, width) as uint8, the final state). It works in tmp_path."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(plots, "save", lambda figure, path: Path(path).touch())

    def body(name: str) -> tuple[np.ndarray, checkpoint.RunState]:
        shutil.copytree(RUNS / name / "run", "output/r")
        shutil.copy("output/r/step-00000003.pt", "output/r/best.pt")
        if (RUNS / name / "tree").exists():
            shutil.copytree(RUNS / name / "tree", "tree")
        seen = []

        def record(module, inputs):
            if hasattr(module, "patch_embed") and module.training:
                seen.append(torch.round((inputs[0].float() + 1) * 127.5).to(torch.uint8).numpy())

        hook = torch.nn.modules.module.register_module_forward_pre_hook(record)
        try:
            assert train.main(["--device", "cpu", "--resume_path", "output/r"]) == 0
        finally:
            hook.remove()
        assert load_state(Path("output/r/best.pt")).best == load_state(Path("output/r/step-00000006.pt")).best
        return np.stack(seen), load_state(Path("output/r/step-00000006.pt"))

    return body


@pytest.mark.parametrize(("name", "tolerance"), [
    ("digits", 1e-5), ("files", 1e-4), ("held_images", 1e-5), ("fp16_overflows", 1e-3), ("before_heads", 1e-4)])
def test_an_old_run_resumes_to_its_old_end(resume, name, tolerance, capsys):
    """Bit for bit on a machine that computes the same bits as the old one, where the model sees the same pixels.

    `before_heads` comes from a version that lacked 19 of the settings and computed other last bits.
    """
    images, state = resume(name)
    printed = capsys.readouterr().out
    assert "a checkpoint of an earlier version: what it lacks (" in printed and ") has the values of that version\n" in printed
    assert ("at step 3 of 6 (2 steps made no update); loss scale " in printed) == (name == "fp16_overflows")
    bitwise = name != "before_heads" and numerics() == json.loads((RUNS / "machine.json").read_text())["numerics"]
    if name == "held_images":          # the same boxes and flips: a shift of one pixel would change far more
        pixels = np.load(RUNS / name / "expected/pixels.npy")
        difference = np.abs(images.astype(int) - pixels)
        assert images.shape == pixels.shape and difference.max() <= 2
        if difference.any():
            bitwise, tolerance = False, 1e-3
    expected = load_state(RUNS / name / "expected/step-00000006.pt")
    new, old = values_of(state), values_of(expected)
    assert dict(configs.architecture(**old["architecture"])) == state.architecture, "later keys have their defaults"
    new["architecture"] = {key: state.architecture[key] for key in old["architecture"]}
    new["data"] = new["data"] if old["data"] else ""                # a hash that older versions did not keep
    events, old_events = events_of("output/r"), events_of(RUNS / name / "expected")
    assert all(old.keys() <= event.keys() for event, old in zip(events, old_events, strict=True)), "a later metric may be added"
    events = [{key: event[key] for key in old} for event, old in zip(events, old_events)]
    if bitwise:
        assert differences(new, old) == [] and differences(events, old_events) == []
    else:
        assert_close(new, old, tolerance)
        for event, old_event in zip(events, old_events):
            assert event["step"] == old_event["step"] and event.get("skipped") == old_event.get("skipped")
            assert_close(event["loss"], old_event["loss"], 10 * tolerance)
    assert {key: state.config[key] for key in ("num_steps", "learning_rate", "optimizer", "precision")} == {
        key: expected.config[key] for key in ("num_steps", "learning_rate", "optimizer", "precision")}
