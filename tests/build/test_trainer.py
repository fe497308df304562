"""The trainer of a resumed run, and which weights decide attention."""

import dataclasses

import torch
from building import ALONE, build_objects, write_checkpoint

from models import create_model
from utils import build
from utils.build.trainer import decides_attention


def test_a_resumed_trainer_has_the_state_of_the_checkpoint(tmp_path):
    """And releases it: a second copy of optimizer and weights would stay for the whole run."""
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


def test_what_the_attention_of_the_last_sigmoid_layer_depends_on():
    model = create_model("ViT-Nano_2", sigmoid_attention="2")
    deciding = [name for name, _ in model.named_parameters() if decides_attention(model, name)]
    last = [name for name in deciding if name.startswith("blocks.1.")]
    assert {"cls_token", "pos_embed", "patch_embed.proj.weight", "blocks.0.mlp.fc2.bias"} < set(deciding)
    assert last == [f"blocks.1.{name}" for name in ("norm1.weight", "norm1.bias", "attn.qkv.weight", "attn.qkv.bias")]
    assert not any(name.startswith(("blocks.2.", "norm.", "head.")) for name in deciding)
