"""Optimizers against their formulas, groups against MAE's (fixtures/train), and what is frozen."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from utils.training.optimizer import (
    OptimizerError,
    build_optimizer,
    choose_trainable,
    load_state,
    parameter_groups,
    set_learning_rate,
    update,
)

RATES = [0.1, 0.2, 0.05]
NAMES = ["sgd", "adamw", "adam"]


def trajectory(name: str, weight_decay: float, start=(2.0,), **options) -> list[float]:
    """The (first) weight after each step on gradients 1, 2, ... (times 1, 2, ... for each further weight)"""
    weight = nn.Parameter(torch.tensor(start, dtype=torch.float64))
    optimizer = build_optimizer(name, [{"params": [weight], "weight_decay": weight_decay}], 123.0, **options)
    weights = []
    for number, rate in enumerate(RATES, start=1):
        weight.grad = number * torch.arange(1.0, len(start) + 1, dtype=torch.float64)
        set_learning_rate(optimizer, rate)
        optimizer.step()
        weights.append(weight[0].item())
    return weights


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("options", [{}, {"momentum": 0.5}])
def test_sgd(decay, options):
    """momentum 0.9 without Nesterov, decay inside the gradient, the momentum not scaled by the rate"""
    weight, momentum, expected = 2.0, 0.0, []
    for gradient, rate in enumerate(RATES, start=1):
        momentum = options.get("momentum", 0.9) * momentum + gradient + decay * weight
        weight -= rate * momentum
        expected.append(weight)
    assert trajectory("sgd", decay, **options) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("name", ["adamw", "adam"])
def test_adam(name, decay):
    """betas 0.9 and 0.999, eps 1e-8; decay outside the moments (adamw), or inside the gradient"""
    weight, first, second, expected = 2.0, 0.0, 0.0, []
    for step, rate in enumerate(RATES, start=1):
        gradient = step + (decay * weight if name == "adam" else 0)
        first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient ** 2
        weight *= 1 - (rate * decay if name == "adamw" else 0)
        weight -= rate * (first / (1 - 0.9 ** step)) / ((second / (1 - 0.999 ** step)) ** 0.5 + 1e-8)
        expected.append(weight)
    assert trajectory(name, decay) == pytest.approx(expected, rel=1e-9)


@pytest.mark.reference
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_lamb(decay):
    """Algorithm 2 of arXiv 1904.00962, phi the identity; the trust ratio is left out for weights without decay"""
    pytest.importorskip("timm")
    weight, first, second, expected = np.array([2.0, 30.0]), 0.0, 0.0, []
    for step, rate in enumerate(RATES, start=1):
        gradient = step * np.array([1.0, 2.0])          # of norm > 1: nothing clips it
        first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient ** 2
        update = (first / (1 - 0.9 ** step)) / (np.sqrt(second / (1 - 0.999 ** step)) + 1e-6) + decay * weight
        trust = np.linalg.norm(weight) / np.linalg.norm(update) if decay else 1
        weight = weight - rate * trust * update
        expected.append(weight[0])
    assert trajectory("lamb", decay, start=(2.0, 30.0)) == pytest.approx(expected, rel=1e-6)


@pytest.mark.reference
def test_lamb_is_not_clipped_by_timm():
    pytest.importorskip("timm")
    assert build_optimizer("lamb", [nn.Parameter(torch.zeros(1))], 0.1).defaults["max_grad_norm"] is None


def test_lamb_without_timm(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm.optim", None)
    with pytest.raises(OptimizerError, match="pip install timm") as caught:
        build_optimizer("lamb", [nn.Parameter(torch.zeros(1))], 0.1)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_is_optimised_and_has_the_rate(name):
    model = nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3))
    for given in (model.parameters(), parameter_groups(model.named_parameters(), weight_decay=0.0)):
        optimizer = build_optimizer(name, given, 0.5)
        assert {id(p) for group in optimizer.param_groups for p in group["params"]} == {id(p) for p in model.parameters()}
        assert {group["weight_decay"] for group in optimizer.param_groups} == {0}
        assert {group["lr"] for group in optimizer.param_groups} == {0.5}
        set_learning_rate(optimizer, 0.25)
        assert {group["lr"] for group in optimizer.param_groups} == {0.25}


@pytest.mark.parametrize("name", NAMES)
def test_float16_weights_without_gradient_stay_finite(name):
    weight = nn.Parameter(torch.ones(3, dtype=torch.float16))
    optimizer = build_optimizer(name, [{"params": [weight], "weight_decay": 0.0}], 0.1)
    weight.grad = torch.zeros_like(weight)
    optimizer.step()
    assert torch.equal(weight.detach(), torch.ones(3, dtype=torch.float16))


def test_unknown_name():
    with pytest.raises(OptimizerError, match="'adagrad': sgd, adamw, adam, lamb") as caught:
        build_optimizer("adagrad", [nn.Parameter(torch.zeros(1))], 0.1)
    assert isinstance(caught.value, ValueError)


# ------------------------------------------------------------------------------------------------------ groups


def reference() -> dict[str, np.ndarray]:
    with np.load(Path(__file__).parents[1] / "fixtures" / "train" / "fine_tuning.npz") as file:
        return {part: file[f"mae_layer_decay/{part}"] for part in ("names", "lr_scale", "weight_decay", "depth_decay")}


def parameters() -> list[tuple[str, nn.Parameter]]:
    """Of a ViT with 3 blocks, in the order of the fixture, of the right number of dimensions"""
    def shape(name: str) -> tuple[int, ...]:
        if name in ("cls_token", "pos_embed", "patch_embed.proj.weight"):
            return (1, 2, 3)
        return (2,) if "norm" in name or name.endswith("bias") else (2, 2)

    return [(name, nn.Parameter(torch.ones(shape(name)))) for name in reference()["names"].tolist()]


def depth_of(name: str) -> int:
    part, *rest = name.split(".")
    return int(rest[0]) + 1 if part == "blocks" else 4 if part in ("norm", "head") else 0


def by_name(groups: list[dict], named: list[tuple[str, nn.Parameter]], key: str) -> dict[str, float]:
    values = {id(parameter): group[key] for group in groups for parameter in group["params"]}
    return {name: values[id(parameter)] for name, parameter in named if id(parameter) in values}


def test_groups_are_mae_s():
    expected, named = reference(), parameters()
    blocks, layer_decay = expected["depth_decay"].tolist()
    groups = parameter_groups(named, weight_decay=0.05, decay_matrices_only=True, layer_decay=layer_decay,
                              depth_of=depth_of, depth=int(blocks) + 1)
    for key in ("lr_scale", "weight_decay"):
        got = by_name(groups, named, key)
        assert got == pytest.approx(dict(zip(expected["names"].tolist(), expected[key].tolist())), rel=1e-12)
    assert sum(len(group["params"]) for group in groups) == len(named) == 44
    assert len(groups) == 2 * 5                         # 5 depths, with and without decay
    order = [(group["lr_scale"], group["weight_decay"]) for group in groups]
    assert order == list(dict.fromkeys((scale, decay) for scale, decay in zip(
        by_name(groups, named, "lr_scale").values(), by_name(groups, named, "weight_decay").values())))


def test_by_default_all_parameters_are_one_group():
    named = parameters()
    group, = parameter_groups(named, weight_decay=0.1)
    assert [id(p) for p in group["params"]] == [id(p) for _, p in named]
    assert (group["lr_scale"], group["weight_decay"]) == (1, 0.1)


def test_head_scale():
    named = parameters()
    heads = ["head.weight", "head.bias"]
    got = by_name(parameter_groups(named, weight_decay=0.0, head_names=heads, head_scale=10.0), named, "lr_scale")
    assert {name for name, scale in got.items() if scale == 10} == set(heads)
    got = by_name(parameter_groups(named, weight_decay=0.0, head_names=heads, head_scale=10.0, layer_decay=0.5,
                                   depth_of=depth_of, depth=5), named, "lr_scale")
    assert (got["head.bias"], got["norm.bias"], got["blocks.0.norm1.bias"]) == (5, 0.5, 0.0625)


def test_frozen_parameters_are_in_no_group():
    named = parameters()
    named[3][1].requires_grad_(False)
    got = by_name(parameter_groups(named, weight_decay=0.1, decay_matrices_only=True), named, "lr_scale")
    assert list(got) == [name for name, _ in named[:3] + named[4:]]


def test_a_parameter_given_twice_is_a_mistake():
    named = parameters()[:2]
    with pytest.raises(AssertionError):
        parameter_groups([*named, ("again", named[0][1])], weight_decay=0.1)


@pytest.mark.parametrize("name", NAMES)
def test_scales_act_on_the_weights(name):
    """One step of a parameter with lr_scale 0.25 is a step with a quarter of the rate; decay only where it is asked for."""
    def step(groups: list[dict], rate: float) -> None:
        optimizer = build_optimizer(name, groups, 123.0)
        set_learning_rate(optimizer, rate)
        for parameter in (parameter for group in groups for parameter in group["params"]):
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()

    matrix, vector, lone_matrix, lone_vector = (nn.Parameter(torch.full(shape, 2.0)) for shape in ((2, 2), (2,)) * 2)
    step(parameter_groups([("a", vector), ("b", matrix)], weight_decay=0.5, decay_matrices_only=True, layer_decay=0.25,
                          depth_of={"a": 0, "b": 1}.get, depth=1), 0.1)
    step([{"params": [lone_vector], "weight_decay": 0.0}], 0.025)
    step([{"params": [lone_matrix], "weight_decay": 0.5}], 0.1)
    assert torch.equal(vector, lone_vector) and torch.equal(matrix, lone_matrix)
    assert not torch.equal(vector, torch.full((2,), 2.0))


def test_scales_survive_saving():
    named = parameters()

    def build():
        return build_optimizer("sgd", parameter_groups(named, weight_decay=0.1, layer_decay=0.5, depth_of=depth_of, depth=4), 1.0)

    optimizer = build()
    load_state(optimizer, build().state_dict())
    set_learning_rate(optimizer, 0.8)
    assert [group["lr"] for group in optimizer.param_groups] == [0.05, 0.1, 0.2, 0.4, 0.8]


@pytest.mark.parametrize("name", NAMES)
def test_a_state_saved_before_there_were_groups_and_fused_kernels_still_loads(name):
    weight = nn.Parameter(torch.zeros(2))
    kinds = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW, "adam": torch.optim.Adam}
    old = kinds[name]([weight], lr=0.3, **({"momentum": 0.9} if name == "sgd" else {}))
    weight.grad = torch.ones(2)
    old.step()
    optimizer = build_optimizer(name, parameter_groups([("weight", weight)], weight_decay=0.0), 0.1)
    load_state(optimizer, old.state_dict())
    set_learning_rate(optimizer, 0.2)
    group = optimizer.param_groups[0]
    assert (group["lr"], group["fused"], group["lr_scale"]) == (0.2, True, 1.0)
    assert all(value.equal(old.state[weight][key]) for key, value in optimizer.state[weight].items())


def test_a_state_without_momentum_begins_it_at_zero():
    """Of a run whose updates were all skipped, by an optimizer that makes its momentum with the first."""
    weight = nn.Parameter(torch.ones(2))
    optimizer = build_optimizer("sgd", [weight], 0.1)
    load_state(optimizer, torch.optim.SGD([weight], lr=0.1, momentum=0.9).state_dict())
    assert optimizer.state[weight]["momentum_buffer"].tolist() == [0, 0]


# ------------------------------------------------------------------------------------------------------- a step

GRADIENTS = [torch.tensor([[3.0, -1.0], [0.5, 2.0]]), torch.tensor([4.0, 0.25])]


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize(("max_norm", "scale"), [(1.0, 1.0), (1.0, 1024.0), (100.0, 8.0), (0.0, 8.0)])
@pytest.mark.parametrize("name", NAMES)
def test_update_is_unscaling_clipping_and_a_step(name, max_norm, scale, fused):
    """Of torch's clip_grad_norm_ and unfused optimizer."""
    ours, theirs = ([nn.Parameter(torch.ones_like(gradient)) for gradient in GRADIENTS] for _ in range(2))
    optimizer = build_optimizer(name, ours, 0.1)
    optimizer.param_groups[0]["fused"] = fused
    reference = build_optimizer(name, theirs, 0.1)
    reference.param_groups[0]["fused"] = False
    for number in (1, 2, 3):
        for one, other, gradient in zip(ours, theirs, GRADIENTS):
            one.grad, other.grad = gradient * number * scale, gradient * number
        norm = nn.utils.get_total_norm([parameter.grad for parameter in ours])
        update(optimizer, norm, torch.tensor(False), torch.tensor(scale), max_norm)
        if max_norm:
            nn.utils.clip_grad_norm_(theirs, max_norm)
        reference.step()
    for one, other in zip(ours, theirs):
        torch.testing.assert_close(one, other, rtol=2e-6, atol=0)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_an_update_that_is_not_finite_leaves_no_trace(name, fused):
    """Neither as the first, before there is any state, nor later."""
    weights, others = [nn.Parameter(torch.ones(3))], [nn.Parameter(torch.ones(3))]
    spoilt, sound = build_optimizer(name, weights, 0.1), build_optimizer(name, others, 0.1)
    for optimizer in (spoilt, sound):
        optimizer.param_groups[0]["fused"] = fused

    def step(optimizer, parameter, value):
        parameter.grad = torch.tensor([value, 1.0, 2.0])
        norm = parameter.grad.norm()
        update(optimizer, norm, ~norm.isfinite(), torch.tensor(1.0), 1.0)

    for value in (float("inf"), 1.0, float("nan"), 2.0):
        step(spoilt, weights[0], value)
        if value in (1.0, 2.0):
            step(sound, others[0], value)
    assert weights[0].equal(others[0])
    assert all(value.equal(sound.state[others[0]][key]) for key, value in spoilt.state[weights[0]].items())


# ---------------------------------------------------------------------------------------------------- freezing


def chosen(train_layers="all", freeze=(), named=None) -> tuple[list[str], list[str]]:
    return choose_trainable(named or parameters(), train_layers=train_layers, freeze=freeze, depth_of=depth_of, depth=4,
                            head_names=["head.weight", "head.bias"])


@pytest.mark.parametrize(("train_layers", "expected"), [
    ("all", lambda name: True), ("head", lambda name: name.startswith("head.")),
    ("0", lambda name: name.startswith(("norm.", "head."))),
    ("1", lambda name: name.startswith(("norm.", "head.", "blocks.2."))),
    ("2", lambda name: name.startswith(("norm.", "head.", "blocks.2.", "blocks.1."))),
    ("3", lambda name: name.startswith(("norm.", "head.", "blocks.")))])
def test_layers_to_train(train_layers, expected):
    named = parameters()
    trainable, frozen = chosen(train_layers, named=named)
    names = [name for name, _ in named]
    assert trainable == [name for name in names if expected(name)]
    assert frozen == [name for name in names if not expected(name)]
    assert [name for name, parameter in named if parameter.requires_grad] == trainable


def test_freezing_by_pattern():
    trainable, frozen = chosen(freeze=["patch_embed.*", "*.norm?.*", "cls_token"])
    assert len(frozen) == 2 + 3 * 4 + 1 and "cls_token" in frozen and "norm.weight" in trainable
    assert chosen("1", ["*.bias"])[0] == [name for name in chosen("1")[0] if not name.endswith("bias")]
    assert chosen("1", ["patch_embed.*"]) == chosen("1")         # frozen anyway: no mistake


def test_choosing_again_thaws():
    named = parameters()
    chosen("head", named=named)
    chosen("all", named=named)
    assert all(parameter.requires_grad for _, parameter in named)


@pytest.mark.parametrize(("train_layers", "freeze", "words"), [
    ("some", [], "'some': must be all, head, or a number of blocks from 1 to 3"), ("4", [], "'4': must be"),
    ("-1", [], "'-1': must be"), ("1.5", [], "'1.5': must be"), ("", [], "'': must be"),
    ("all", ["blocks.9.*"], "'blocks.9.\\*': no parameter"), ("head", ["head.*"], "nothing to train"),
    ("all", ["*"], "nothing to train"), ("all", ["Head.*"], "'Head.\\*': no parameter")])
def test_mistakes_are_told_in_one_line_and_change_nothing(train_layers, freeze, words):
    named = parameters()
    named[0][1].requires_grad_(False)
    with pytest.raises(OptimizerError, match=words) as caught:
        chosen(train_layers, freeze, named)
    assert "\n" not in str(caught.value)
    assert [parameter.requires_grad for _, parameter in named] == [False] + [True] * 43
