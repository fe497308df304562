"""DeiT, plain and distilled: the published code's numbers, the two heads, initial values."""

import pytest
import reference
import torch
from filling import published_model
from torch import nn

from configs import META, architecture
from models import DistilledVisionTransformer, VisionTransformer, create_model, record_attention

SMALL = architecture(4, 32, 64, 2, 2, img_size=16, distilled=True, **META)


def random_heads(model):
    for name in model.head_names():
        nn.init.normal_(model.get_parameter(name))
    return model


@torch.inference_mode()
def test_deit_is_the_published_one():
    expected, images = reference.torch_expected("deit"), reference.torch_images("deit")
    model = published_model("deit")
    assert type(model) is VisionTransformer
    assert (model.forward_features(images)[:, 0] - expected["features"]).abs().max() < 1e-5
    with record_attention(model) as maps:
        assert (model(images) - expected["logits"]).abs().max() < 1e-5
    assert (torch.stack(maps) - expected["attn"]).abs().max() < 1e-5


@torch.inference_mode()
def test_distilled_deit_is_the_published_one():
    expected, images = reference.torch_expected("deit_dist"), reference.torch_images("deit_dist")
    model = published_model("deit_dist")
    assert type(model) is DistilledVisionTransformer
    assert (model(images) - expected["logits"]).abs().max() < 1e-5
    model.train().distilling = True
    cls, dist = model(images)
    assert (cls - expected["logits_cls"]).abs().max() < 1e-5 and (dist - expected["logits_dist"]).abs().max() < 1e-5
    assert (cls - dist).abs().max() > 0.1


def test_both_heads_are_returned_only_while_distilling_in_training():
    model, images = random_heads(create_model(SMALL, 5)), torch.randn(2, 3, 16, 16)
    assert model.training and not model.distilling
    mean = model(images)
    model.distilling = True
    cls, dist = model(images)
    assert cls.shape == dist.shape == mean.shape == (2, 5)
    torch.testing.assert_close(mean, (cls + dist) / 2)
    torch.testing.assert_close(model.eval()(images), mean)


def test_every_parameter_has_a_gradient_from_either_output():
    """Also from the mean of both heads: DistributedDataParallel finds no unused parameter."""
    model, images = random_heads(create_model(SMALL, 5)), torch.randn(2, 3, 16, 16)
    for distilling in (False, True):
        model.distilling = distilling
        model.zero_grad(set_to_none=True)
        logits = model(images)
        sum(part.square().sum() for part in (logits if distilling else [logits])).backward()
        assert all(parameter.grad is not None and parameter.grad.any() for parameter in model.parameters())


@pytest.mark.parametrize("distilled", [False, True])
def test_initial_values(distilled):
    """As in the published code, but heads are zero: normal with 0.02 for dense layers, tokens and positions, zero biases."""
    torch.manual_seed(0)
    model = create_model(architecture(4, 256, 512, 4, 2, img_size=64, distilled=distilled, **META), 10)
    state = model.state_dict()
    dense = {f"blocks.{i}.{layer}.weight" for i in (0, 1) for layer in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")}
    tokens = {"cls_token", "dist_token"} if distilled else {"cls_token"}
    for name in dense | tokens | {"pos_embed"}:
        spread = 4 * state[name].numel() ** -0.5
        assert abs(state[name].std() / 0.02 - 1) < spread and abs(state[name].mean()) < 0.02 * spread, name
    weight = state["patch_embed.proj.weight"]                                  # PyTorch's: uniform up to 1 / sqrt(fan-in)
    assert 0.99 * 48 ** -0.5 < weight.abs().max() <= 48 ** -0.5
    zeros = {name for name in state if name.endswith("bias") and name != "patch_embed.proj.bias"} | set(model.head_names())
    ones = {name for name in state if ".norm" in f".{name}" and name.endswith("weight")}
    assert all(not state[name].any() for name in zeros) and all((state[name] == 1).all() for name in ones)
    assert zeros | ones | dense | tokens | {"pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias"} == set(state)
