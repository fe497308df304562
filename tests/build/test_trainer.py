"""The trainer of a resumed run, and which weights attention depends on."""

import dataclasses
import types

import pytest
import torch
from building import ALONE, build_objects, write_checkpoint

from models import create_model
from utils import build
from utils.build import trainer as build_trainer_module
from utils.build.trainer import decides_attention
from utils.training import optimizer as optim


def test_a_resumed_trainer_has_the_state_of_the_checkpoint(tmp_path):
    """The state is released: otherwise a second copy of optimizer and weights would stay in memory for the whole run."""
    objects = build_objects("--optimizer", "sgd", "--ema_decay", 0.5, "--fp16", "--fp16_opt_level", "O1")
    write_checkpoint(tmp_path / "best.pt")
    state = build.saved_run({"resume_path": str(tmp_path), "eval_only": True}, ALONE).state
    optimizer = objects.trainer.optimizer.state_dict()
    optimizer["state"] = {number: {"momentum_buffer": torch.full_like(each["momentum_buffer"], 4.0)}
                          for number, each in optimizer["state"].items()}
    average = {name: torch.full_like(each, 3.0) for name, each in state.model.items()}
    scaler = objects.trainer.scaler.state_dict() | {"scale": 32.0, "_growth_tracker": 5}
    state = dataclasses.replace(state, optimizer=optimizer, ema=average, scaler=scaler, step=7, updates=6, skips=1)
    trainer = build.build_trainer(objects.config, state, ALONE, objects.built, objects.data)
    assert trainer.progress == (7, 6, 1) and trainer.scaler.state_dict() == scaler
    assert {each.unique().item() for each in trainer.ema.model.state_dict().values()} == {3}
    assert {each["momentum_buffer"].unique().item() for each in trainer.optimizer.state.values()} == {4}
    assert (state.model, state.optimizer, state.ema) == ({}, {}, {})


def saved_state(config, optimizer) -> types.SimpleNamespace:
    return types.SimpleNamespace(optimizer=optimizer.state_dict(), scaler={}, ema={}, model={}, step=1, updates=1, skips=0,
                                 rules=2, config=config.to_dict())


@pytest.mark.parametrize("flags", [
    ["--head_learning_rate", 2e-3], ["--head_learning_rate", 5e-4, "--layer_decay", 0.5], ["--head_learning_rate", 1e-3]])
def test_a_new_learning_rate_on_resume_may_equal_that_of_the_head(capsys, flags):
    """Started at 1e-3 and resumed at 2e-3, for this version and one that distinguished groups only by their numbers."""
    objects = build_objects("--optimizer", "adamw", "--learning_rate", 1e-3, *flags)
    named = dict(objects.model.named_parameters())
    resumed = objects.config.replace(learning_rate=2e-3)
    for by_value in (False, True):
        groups = build_trainer_module._parameter_groups(objects.config, objects.model, by_value)
        saved = optim.build_optimizer("adamw", groups, 1e-3)
        for number, parameter in enumerate(named.values()):
            parameter.grad = torch.full_like(parameter, number + 1.0)
        saved.step()
        trainer = build.build_trainer(resumed, saved_state(objects.config, saved), ALONE, objects.built, objects.data)
        for parameter in named.values():
            assert torch.equal(trainer.optimizer.state[parameter]["exp_avg"], saved.state[parameter]["exp_avg"])
    assert "changed:" not in capsys.readouterr().out


def test_a_change_of_eps_is_printed_when_a_run_is_resumed_in_float16(capsys):
    objects, half = (build_objects("--optimizer", "adamw", "--precision", *precision)
                     for precision in (["fp32"], ["fp16", "--fp16_opt_level", "O3"]))
    state = saved_state(objects.config, objects.trainer.optimizer)
    state.updates = 0                                    # before its first update an optimizer has no state
    trainer = build.build_trainer(half.config, state, ALONE, half.built, half.data)
    assert trainer.optimizer.param_groups[0]["eps"] == 1e-4
    assert capsys.readouterr().out.count("changed: the optimizer's eps is 0.0001 (was 1e-08)") == 1


def test_which_weights_the_attention_of_the_last_sigmoid_layer_depends_on():
    model = create_model("ViT-Nano_2", sigmoid_attention="2")
    deciding = [name for name, _ in model.named_parameters() if decides_attention(model, name)]
    last = [name for name in deciding if name.startswith("blocks.1.")]
    assert {"cls_token", "pos_embed", "patch_embed.proj.weight", "blocks.0.mlp.fc2.bias"} < set(deciding)
    assert last == [f"blocks.1.{name}" for name in ("norm1.weight", "norm1.bias", "attn.qkv.weight", "attn.qkv.bias")]
    assert not any(name.startswith(("blocks.2.", "norm.", "head.")) for name in deciding)
    pooled = create_model("ViT-Nano_2", sigmoid_attention="last", classifier="attention", registers=1, qk_norm=True)
    others = [name for name, _ in pooled.named_parameters() if not decides_attention(pooled, name)]
    assert pooled.sigmoid_layers == (5,) and others == [name for name, _ in pooled.named_parameters() if name.startswith(
        ("attn_pool.proj.", "attn_pool.norm.", "attn_pool.mlp.", "head."))]
    pooled.sigmoid_layers = (4,)
    assert {"blocks.3.attn.q_norm.weight", "blocks.3.attn.k_norm.bias"} <= {
        name for name, _ in pooled.named_parameters() if decides_attention(pooled, name)}
