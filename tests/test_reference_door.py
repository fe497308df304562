"""The three functions of reference_door.py compared with the numbers of the original scripts."""

import copy
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from configs import architecture
from models import create_model
from tests.reference_door import learning_rates, resize_positions, to_input, train, train_trace

FIXTURES = Path(__file__).parent / "fixtures"
# Absolute. Losses and weights agree within 1e-6, gradient norms (up to 3) within 2e-6. The final logits agree within 7e-6 on
# processors with vector instructions, within 1.5e-5 without them (ATEN_CPU_CAPABILITY=default).
TOLERANCE = {"final_logits_first16": 3e-5}
OTHER_TOLERANCES = 1e-5
TRACES = [f"zh{head}_{rest}" for head in (0, 1) for rest in (
    "cosine_wd0_acc1", "cosine_wd0_acc4", "cosine_wd0.01_acc1", "linear_wd0_acc1", "linear_wd0.01_acc1")]


@pytest.mark.parametrize("tag", TRACES)
def test_train_trace(tag):
    zero_head, decay, weight_decay, accumulation = re.fullmatch(r"zh(\d)_(\w+)_wd([\d.]+)_acc(\d)", tag).groups()
    with np.load(FIXTURES / "train" / "train.npz") as file:
        expected = {name.split("/")[2]: file[name] for name in file.files if name.startswith(f"train/jeon_{tag}/")}
        side, patch, hidden, mlp, heads, layers, classes = file["train/cfg"].tolist()
        warmup, total, peak = file["train/warmup_total_lr"].tolist()
        images, labels = torch.from_numpy(file["train/images"]), torch.from_numpy(file["train/labels"])
    row = architecture(patch, hidden, mlp, heads, layers, img_size=side, gelu="erf")
    model = create_model(row, classes, pretrained=FIXTURES / "train" / "train_init.npz", head="keep")
    if zero_head == "1":
        nn.init.zeros_(model.head.weight)
        nn.init.zeros_(model.head.bias)
    arguments = (images, labels, 16, int(total), int(warmup), peak, decay, float(weight_decay), int(accumulation), 1.0)
    other = copy.deepcopy(model)
    metrics = train(model, *arguments)
    model.eval()
    with torch.no_grad():
        logits = model(to_input(images[:16].permute(0, 3, 1, 2)))
    got = {"loss": [step.loss for step in metrics], "lr": [step.learning_rate for step in metrics],
           "grad_norm_before_clip": [step.grad_norm for step in metrics], "final_logits_first16": logits.numpy(),
           "final_head_weight": model.head.weight.detach().numpy(),
           "final_qw0_row0": model.blocks[0].attn.qkv.weight[0].detach().numpy()}
    assert got.keys() == expected.keys()
    for name in got:
        np.testing.assert_allclose(got[name], expected[name], rtol=0, atol=TOLERANCE.get(name, OTHER_TOLERANCES), err_msg=name)
    assert [step.step for step in metrics] == list(range(1, 21))
    assert expected["loss"][0] - expected["loss"][-1] > 0.5          # the model learns: the losses are not constant
    if tag == TRACES[0]:
        assert train_trace(other, *arguments) == got["loss"]


@pytest.mark.parametrize("decay", ["cosine", "linear"])
def test_learning_rates(decay):
    with np.load(FIXTURES / "train" / "train.npz") as file:
        updates, expected = (file[f"lr/jeon_{decay}_w10_T100/{part}"] for part in ("update", "lr"))
    got = learning_rates(decay, 10, 100, 0.03)
    assert len(got) == 100
    np.testing.assert_allclose([got[update - 1] for update in updates], expected, rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize(("case", "source", "rule", "old", "new"), [
    ("14to24x24", "google", "bilinear", (14, 14), (24, 24)), ("distilled7to12", "deit_mae_bicubic", "bicubic", (7, 7), (12, 12))])
def test_resize_positions(case, source, rule, old, new):
    with np.load(FIXTURES / "posemb.npz") as file:
        table, expected = torch.from_numpy(file[f"{case}/in"]), torch.from_numpy(file[f"{case}/{source}"])
    assert (resize_positions(table, old, new, rule) - expected).abs().max() < 2e-5
