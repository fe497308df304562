"""Optimizers compared with their formulas, groups and schedules with the reference's (fixtures/train), and freezing."""

import math
import sys
from pathlib import Path

import families
import numpy as np
import pytest
import torch
from torch import nn

import models
from tests import reference_door
from utils.training.optimizer import (
    OptimizerError,
    build_optimizer,
    choose_trainable,
    load_state,
    lr_multiplier,
    parameter_groups,
    set_learning_rate,
    update,
)

FIXTURES = Path(__file__).parents[1] / "fixtures" / "train"
RATES = [0.1, 0.2, 0.05]
NAMES = ["sgd", "adamw", "adam"]


def trajectory(name: str, weight_decay: float, start=(2.0,), **options) -> list[float]:
    """Return the (first) weight after each step on gradients 1, 2, ... (times 1, 2, ... for each further weight)."""
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
    """Momentum 0.9 without Nesterov, decay as part of the gradient, momentum not scaled by the rate."""
    weight, momentum, expected = 2.0, 0.0, []
    for gradient, rate in enumerate(RATES, start=1):
        momentum = options.get("momentum", 0.9) * momentum + gradient + decay * weight
        weight -= rate * momentum
        expected.append(weight)
    assert trajectory("sgd", decay, **options) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("name", ["adamw", "adam"])
def test_adam(name, decay):
    """Betas 0.9 and 0.999, eps 1e-8. Decay is not part of the moments (adamw), or part of the gradient (adam)."""
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
    """Algorithm 2 of arXiv 1904.00962 with the identity as phi, no trust ratio for weights without decay, no clipping."""
    pytest.importorskip("timm")
    weight, first, second, expected = np.array([2.0, 30.0]), 0.0, 0.0, []
    for step, rate in enumerate(RATES, start=1):
        gradient = step * np.array([1.0, 2.0])          # its norm is above 1: timm would clip it by default
        first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient ** 2
        change = (first / (1 - 0.9 ** step)) / (np.sqrt(second / (1 - 0.999 ** step)) + 1e-6) + decay * weight
        trust = np.linalg.norm(weight) / np.linalg.norm(change) if decay else 1
        weight = weight - rate * trust * change
        expected.append(weight[0])
    assert trajectory("lamb", decay, start=(2.0, 30.0)) == pytest.approx(expected, rel=1e-6)


@pytest.mark.reference
def test_a_resumed_lamb_keeps_its_count_of_steps():
    """The count is stored in the groups. For other keys of the groups the optimizer's values win over the saved ones."""
    pytest.importorskip("timm")
    weight = nn.Parameter(torch.ones(2))
    old, optimizer = (build_optimizer("lamb", [weight], 0.1) for _ in range(2))
    weight.grad = torch.ones(2)
    for _ in range(3):
        old.step()
    load_state(optimizer, old.state_dict())
    assert optimizer.param_groups[0]["step"] == 3


def test_lamb_without_timm_is_reported(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm.optim", None)
    with pytest.raises(OptimizerError, match="--optimizer lamb needs timm") as caught:
        build_optimizer("lamb", [nn.Parameter(torch.zeros(1))], 0.1)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("name", NAMES)
def test_float16_weights_without_gradient_stay_finite(name):
    weight = nn.Parameter(torch.ones(3, dtype=torch.float16))
    optimizer = build_optimizer(name, [weight], 0.1)
    weight.grad = torch.zeros_like(weight)
    optimizer.step()
    assert torch.equal(weight.detach(), torch.ones(3, dtype=torch.float16))


# ------------------------------------------------------------------------------------------------------ groups


def reference() -> dict[str, np.ndarray]:
    with np.load(FIXTURES / "fine_tuning.npz") as file:
        return {part: file[f"mae_layer_decay/{part}"] for part in ("names", "lr_scale", "weight_decay", "depth_decay")}


def parameters() -> list[tuple[str, nn.Parameter]]:
    """Return parameters of a ViT with 3 blocks, in the order of the fixture, with the right numbers of dimensions."""
    def shape(name: str) -> tuple[int, ...]:
        if name in ("cls_token", "pos_embed", "patch_embed.proj.weight"):
            return (1, 2, 3)
        return (2,) if "norm" in name or name.endswith("bias") else (2, 2)

    return [(name, nn.Parameter(torch.ones(shape(name)))) for name in reference()["names"].tolist()]


def layer_index(name: str) -> int:
    part, *rest = name.split(".")
    return int(rest[0]) + 1 if part == "blocks" else 4 if part in ("norm", "head") else 0


def by_name(groups: list[dict], named: list[tuple[str, nn.Parameter]], key: str) -> dict[str, float]:
    values = {id(parameter): group[key] for group in groups for parameter in group["params"]}
    return {name: values[id(parameter)] for name, parameter in named if id(parameter) in values}


def test_groups_are_those_of_mae():
    expected, named = reference(), parameters()
    blocks, layer_decay = expected["depth_decay"].tolist()
    groups = parameter_groups(named, weight_decay=0.05, decay_matrices_only=True, layer_decay=layer_decay,
                              layer_index=layer_index, depth=int(blocks) + 1)
    for key in ("lr_scale", "weight_decay"):
        got = by_name(groups, named, key)
        assert got == pytest.approx(dict(zip(expected["names"].tolist(), expected[key].tolist())), rel=1e-12)
    assert sum(len(group["params"]) for group in groups) == len(named) == 44
    assert len(groups) == 2 * 5                         # 5 layers, with and without decay
    order = [(group["lr_scale"], group["weight_decay"]) for group in groups]
    assert order == list(dict.fromkeys((scale, decay) for scale, decay in zip(
        by_name(groups, named, "lr_scale").values(), by_name(groups, named, "weight_decay").values())))


def test_tokens_of_all_kinds_have_no_weight_decay():
    """Registers, the query of pooling by attention and positions have none, nor have parameters that are not matrices: factors
    and biases of queries and values."""
    model = families.family_model("dino", classifier="attention", positions="all", rope="")
    named = list(model.named_parameters())
    decays = by_name(parameter_groups(named, weight_decay=0.05, decay_matrices_only=True), named, "weight_decay")
    exempt = {name for name, decay in decays.items() if not decay}
    assert {name for name in exempt if dict(named)[name].ndim > 1} == {"cls_token", "reg_token", "pos_embed", "attn_pool.latent"}
    assert {"blocks.0.attn.qkv.q_bias", "blocks.1.ls2.gamma", "attn_pool.norm.weight"} < exempt
    assert decays.keys() - exempt == {name for name, each in named if each.ndim > 1 and name not in exempt}


KINDS_OF_MODELS = [
    ("vit_tiny_patch16_224", {"reg_tokens": 2, "init_values": 0.1, "pre_norm": True},
     {"registers": 2, "layer_scale": 0.1, "pre_norm": True, "patch_bias": False}),
    ("vit_tiny_patch16_224", {"global_pool": "avg", "class_token": False, "qk_norm": True}, {
        "class_token": False, "classifier": "patch_mean", "qk_norm": True}),
    ("vit_tiny_patch16_224", {"global_pool": "map", "class_token": False},
     {"class_token": False, "classifier": "attention"}),
    ("vit_tiny_patch16_dinov3_qkvb", {}, {
        "registers": 4, "positions": "none", "rope": "dinov3", "layer_scale": 1e-5, "qkv_bias": "qv"})]


@pytest.mark.reference
@pytest.mark.parametrize(("name", "own", "row"), KINDS_OF_MODELS, ids=["registers", "patch_mean", "attention", "dinov3"])
def test_groups_are_those_of_timm(name, own, row):
    """With two exceptions. timm's last norm has the rate of the last block; here norm and head have the full rate, as in the code
    of BEiT and MAE, where layer decay comes from. And timm applies weight decay to the query of pooling by attention, which is a
    token like the cls token."""
    timm = pytest.importorskip("timm")
    theirs = timm.create_model(name, num_classes=3, depth=3, **own)
    ours = models.create_model("ViT-Ti_16", 3, 224, num_layers=3, **row)
    from timm.optim import param_groups_layer_decay

    groups = param_groups_layer_decay(theirs, 0.05, no_weight_decay_list=theirs.no_weight_decay(), layer_decay=0.75)
    named = list(theirs.named_parameters())
    expected = {key: by_name(groups, named, key) for key in ("lr_scale", "weight_decay")}
    mine = parameter_groups(ours.named_parameters(), weight_decay=0.05, decay_matrices_only=True, layer_decay=0.75,
                            layer_index=ours.layer_index, depth=ours.depth, head_names=ours.head_names())
    got = {key: by_name(mine, list(ours.named_parameters()), key) for key in expected}
    names = {ours_of_timm(theirs): theirs for theirs in expected["lr_scale"]}
    assert names.keys() == got["lr_scale"].keys()
    for own_name, their_name in names.items():
        scale = expected["lr_scale"][their_name]
        assert not own_name.startswith("norm.") or scale == 0.75
        assert got["lr_scale"][own_name] == pytest.approx(1.0 if own_name.startswith("norm.") else scale), own_name
        token = own_name == "attn_pool.latent"
        assert got["weight_decay"][own_name] == (0 if token else expected["weight_decay"][their_name]), own_name


def ours_of_timm(name: str) -> str:
    """Return our name of a parameter. timm's DINOv3 has other names for its factors and separate biases next to `qkv`."""
    name = name.replace(".gamma_1", ".ls1.gamma").replace(".gamma_2", ".ls2.gamma")
    return name.replace("attn.q_bias", "attn.qkv.q_bias").replace("attn.v_bias", "attn.qkv.v_bias")


def test_head_scale_and_frozen_parameters():
    named, heads = parameters(), ["head.weight", "head.bias"]
    named[3][1].requires_grad_(False)
    got = by_name(parameter_groups(named, weight_decay=0.0, head_names=heads, head_scale=10.0), named, "lr_scale")
    assert got == {name: 10.0 if name in heads else 1.0 for name, parameter in named if parameter.requires_grad}
    got = by_name(parameter_groups(named, weight_decay=0.0, head_names=heads, head_scale=10.0, layer_decay=0.5,
                                   layer_index=layer_index, depth=5), named, "lr_scale")
    assert (got["head.bias"], got["norm.bias"], got["blocks.0.norm1.bias"]) == (5, 0.5, 0.0625)


LAYERS = {"layer_index": layer_index, "depth": 4, "head_names": ["head.weight", "head.bias"], "weight_decay": 0.1,
          "decay_matrices_only": True}
# lr_scales that happen to be equal: the head's and that of all others, of the layers behind the blocks, of the last block; all 0.
COLLISIONS = [
    {"head_scale": 1.0}, {"head_scale": 1.0, "layer_decay": 0.5}, {"head_scale": 0.5, "layer_decay": 0.5},
    {"head_scale": 0.0, "layer_decay": 1e-300}, {"head_scale": 2.0, "weight_decay": 0.0}]


@pytest.mark.parametrize("settings", COLLISIONS)
def test_groups_do_not_depend_on_the_rates(settings):
    def members(**more) -> list[list[str]]:
        return [[names[id(parameter)] for parameter in group["params"]]
                for group in parameter_groups(named, **LAYERS | settings | more)]

    named = parameters()
    names = {id(parameter): name for name, parameter in named}
    assert members() == members(head_scale=3.0, weight_decay=0.3) != members(by_value=True)


@pytest.mark.parametrize("settings", COLLISIONS)
@pytest.mark.parametrize("name", NAMES)
def test_a_state_of_groups_by_value_reaches_its_parameters(name, settings):
    """Earlier versions saved such states. The head may have another rate than in that run."""
    named = parameters()
    old = build_optimizer(name, parameter_groups(named, **LAYERS | settings, by_value=True), 0.1)
    for number, (_, parameter) in enumerate(named):
        parameter.grad = torch.full_like(parameter, number + 1.0)
    old.step()
    state = old.state_dict()
    for head_scale in (settings["head_scale"], 7.0):
        optimizer = build_optimizer(name, parameter_groups(named, **LAYERS | settings | {"head_scale": head_scale}), 0.1)
        assert not load_state(optimizer, state, lambda: parameter_groups(named, **LAYERS | settings, by_value=True))
        assert len(optimizer.state) == len(named)
        for _, parameter in named:
            assert optimizer.state[parameter].keys() == old.state[parameter].keys()
            assert all(torch.equal(value, old.state[parameter][key]) for key, value in optimizer.state[parameter].items())
        again = build_optimizer(name, parameter_groups(named, **LAYERS | settings | {"head_scale": 9.0}), 0.1)
        load_state(again, optimizer.state_dict())                                # this version assigns them by index
        assert all(torch.equal(value, old.state[parameter][key]) for _, parameter in named
                   for key, value in again.state[parameter].items())


@pytest.mark.parametrize(("before", "after", "eps"), [(torch.float32, torch.float16, 1e-4), (torch.float16, torch.float32, 1e-8)])
@pytest.mark.parametrize("name", ["adamw", "adam"])
def test_eps_fits_the_precision_in_use(name, before, after, eps):
    """In float16 an eps of 1e-8 is 0, and a weight without gradient would be NaN after one update."""
    old, weight = (nn.Parameter(torch.ones(2, dtype=dtype)) for dtype in (before, after))
    first, optimizer = build_optimizer(name, [old], 0.1), build_optimizer(name, [weight], 0.1)
    old.grad, weight.grad = torch.zeros_like(old), torch.zeros_like(weight)
    first.step()
    line = load_state(optimizer, first.state_dict())
    assert line == f"changed: the optimizer's eps is {eps} (was {first.param_groups[0]['eps']}), as the precision needs it"
    optimizer.step()
    assert optimizer.param_groups[0]["eps"] == eps and torch.equal(weight.detach(), torch.ones(2, dtype=after))
    assert {value.dtype for key, value in optimizer.state[weight].items() if key != "step"} == {after}
    assert load_state(optimizer, optimizer.state_dict()) == ""


@pytest.mark.parametrize("name", NAMES)
def test_groups_act_on_the_weights(name):
    """A step with lr_scale 0.25 is a step with a quarter of the rate, and only matrices decay. Loading keeps the scales."""
    def step(groups: list[dict], rate: float) -> None:
        optimizer = build_optimizer(name, groups, 123.0)
        load_state(optimizer, build_optimizer(name, [group | {"lr_scale": 9.0} for group in groups], 1.0).state_dict())
        set_learning_rate(optimizer, rate)
        for parameter in (parameter for group in groups for parameter in group["params"]):
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()

    matrix, vector, lone_matrix, lone_vector = (nn.Parameter(torch.full(shape, 2.0)) for shape in ((2, 2), (2,)) * 2)
    step(parameter_groups([("a", vector), ("b", matrix)], weight_decay=0.5, decay_matrices_only=True, layer_decay=0.25,
                          layer_index={"a": 0, "b": 1}.get, depth=1), 0.1)
    step([{"params": [lone_vector], "weight_decay": 0.0, "lr_scale": 1.0}], 0.025)
    step([{"params": [lone_matrix], "weight_decay": 0.5, "lr_scale": 1.0}], 0.1)
    assert torch.equal(vector, lone_vector) and torch.equal(matrix, lone_matrix)
    assert not torch.equal(vector, torch.full((2,), 2.0))


@pytest.mark.parametrize("name", NAMES)
def test_a_state_without_groups_and_fused_kernels_still_loads(name):
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
    if name == "sgd":             # a run whose updates were all skipped has no momentum yet
        load_state(optimizer, torch.optim.SGD([weight], lr=0.1, momentum=0.9).state_dict())
        assert optimizer.state[weight]["momentum_buffer"].tolist() == [0, 0]


# ------------------------------------------------------------------------------------------------------- a step

GRADIENTS = [torch.tensor([[3.0, -1.0], [0.5, 2.0]]), torch.tensor([4.0, 0.25])]


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_update_is_unscaling_clipping_and_a_step(name, fused):
    """Compared with torch's clip_grad_norm_ and unfused optimizer."""
    for max_norm, scale in ((1.0, 1.0), (1.0, 1024.0), (100.0, 8.0), (0.0, 8.0)):
        ours, theirs = ([nn.Parameter(torch.ones_like(gradient)) for gradient in GRADIENTS] for _ in range(2))
        optimizer, unfused = build_optimizer(name, ours, 0.1), build_optimizer(name, theirs, 0.1)
        optimizer.param_groups[0]["fused"], unfused.param_groups[0]["fused"] = fused, False
        for number in (1, 2, 3):
            for one, other, gradient in zip(ours, theirs, GRADIENTS):
                one.grad, other.grad = gradient * number * scale, gradient * number
            norm = nn.utils.get_total_norm([parameter.grad for parameter in ours])
            update(optimizer, norm, torch.tensor(False), torch.tensor(scale), max_norm)
            if max_norm:
                nn.utils.clip_grad_norm_(theirs, max_norm)
            unfused.step()
        for one, other in zip(ours, theirs):
            torch.testing.assert_close(one, other, rtol=2e-6, atol=0)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_a_non_finite_update_changes_nothing(name, fused):
    """As the first one, before there is any state, and later."""
    def after(*values: float) -> list[list[float]]:
        weight = nn.Parameter(torch.ones(3))
        optimizer = build_optimizer(name, [weight], 0.1)
        optimizer.param_groups[0]["fused"] = fused
        for value in values:
            weight.grad = torch.tensor([value, 1.0, 2.0])
            norm = weight.grad.norm()
            update(optimizer, norm, ~norm.isfinite(), torch.tensor(1.0), 1.0)
        return [weight.tolist(), *(value.tolist() for value in optimizer.state[weight].values())]

    assert after(float("inf"), 1.0, float("nan"), 2.0) == after(1.0, 2.0)


# ---------------------------------------------------------------------------------------------------- freezing


def choose(train_layers="all", freeze=(), named=None) -> list[str]:
    return choose_trainable(named or parameters(), train_layers=train_layers, freeze=freeze, layer_index=layer_index, depth=4,
                            head_names=["head.weight", "head.bias"])


@pytest.mark.parametrize(("train_layers", "prefixes"), [
    ("all", ("",)), ("head", ("head.",)), ("0", ("norm.", "head.")), ("1", ("norm.", "head.", "blocks.2.")),
    ("3", ("norm.", "head.", "blocks."))])
def test_layers_to_train(train_layers, prefixes):
    named = parameters()
    named[0][1].requires_grad_(False)                   # it must be trained again
    frozen = choose(train_layers, named=named)
    assert frozen == [name for name, _ in named if not name.startswith(prefixes)]
    assert [name for name, parameter in named if not parameter.requires_grad] == frozen


def test_freezing_by_pattern():
    frozen = choose(freeze=["patch_embed.*", "*.norm?.*", "cls_token"])
    assert len(frozen) == 2 + 3 * 4 + 1 and "cls_token" in frozen and "norm.weight" not in frozen
    assert set(choose("1", ["*.bias"])) == {*choose("1"), *(name for name, _ in parameters() if name.endswith("bias"))}
    assert choose("1", ["patch_embed.*"]) == choose("1")         # frozen already: not an error


@pytest.mark.parametrize(("train_layers", "freeze", "message"), [
    ("some", [], "--train_layers 'some': expected all, head, or a number of blocks from 1 to 3"), ("4", [], "'4': expected"),
    ("-1", [], "'-1': expected"), ("1.5", [], "'1.5': expected"),
    ("all", ["blocks.9.*"], "--freeze 'blocks.9.\\*' matches no parameter"), ("head", ["head.*"], "leaves nothing to train"),
    ("all", ["Head.*"], "'Head.\\*' matches no parameter")])
def test_bad_choices_are_reported_and_change_nothing(train_layers, freeze, message):
    named = parameters()
    named[0][1].requires_grad_(False)
    with pytest.raises(OptimizerError, match=message):
        choose(train_layers, freeze, named)
    assert [parameter.requires_grad for _, parameter in named] == [False] + [True] * 43


# ---------------------------------------------------------------------------------------------------- schedules

TAGS = [(decay, *rest) for decay in ("cosine", "linear") for rest in ((500, 10_000, 0.03), (10, 100, 0.03), (0, 50, 0.01))]


@pytest.mark.parametrize(("decay", "warmup", "total", "peak"), TAGS)
def test_every_update_has_the_rate_of_the_reference(decay, warmup, total, peak):
    """It is also bit for bit the rate of runs of the first version, which can be resumed."""
    with np.load(FIXTURES / "train.npz") as file:
        updates, rates = (file[f"lr/jeon_{decay}_w{warmup}_T{total}/{part}"] for part in ("update", "lr"))
    assert updates[0] == 1 and updates[-1] == total
    np.testing.assert_allclose([peak * lr_multiplier(int(number), warmup, total, decay) for number in updates], rates, rtol=1e-9,
                               atol=1e-15)
    for number in range(1, total + 1):
        if number < warmup:
            expected = number / warmup
        else:
            progress = (number - warmup) / max(1, total - warmup)
            expected = max(0.0, 0.5 * (1 + math.cos(math.pi * progress)) if decay == "cosine" else 1 - progress)
        assert lr_multiplier(number, warmup, total, decay) == expected
    assert lr_multiplier(5, 5, 5, decay) == 1                  # only warm-up


@pytest.mark.parametrize("decay", ["cosine", "linear"])
def test_all_rates_of_a_short_run_are_above_zero(decay):
    """From 10 updates on the rates are those of earlier versions. In shorter runs these had a rate of 0 for the last update."""
    for total in range(1, 10):
        for warmup in range(total + 1):
            rates = [lr_multiplier(update, warmup, total, decay) for update in range(1, total + 1)]
            assert min(rates) > 0 and max(rates) == 1, (total, warmup, rates)
            assert rates == [reference_door.learning_rates(decay, warmup, total, 1.0)[number] for number in range(total)]
            before = [lr_multiplier(update, warmup, total, decay, ends_at_floor=True) for update in range(1, total + 1)]
            assert before[-1] == (1 if warmup == total else 0)
    assert lr_multiplier(1, 0, 2, "cosine", ends_at_floor=True) == pytest.approx(0.5)
    assert lr_multiplier(10, 0, 10, decay) == 0


def test_floor_is_that_of_mae():
    """MAE's scripts set the rate at fractions of an epoch, so an update may be a fraction."""
    with np.load(FIXTURES / "fine_tuning.npz") as file:
        epochs, expected, (peak, smallest, warmup, total) = (file[f"lr/mae_{part}"] for part in ("epochs", "lr", "args"))
    got = [peak * lr_multiplier(epoch, warmup, total, "cosine", floor=smallest / peak) for epoch in epochs]
    assert len(got) == 200
    np.testing.assert_allclose(got, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize(("warmup", "total"), [(0, 10), (5, 35)])
def test_start_and_floor_are_those_of_timm(warmup, total):
    with np.load(FIXTURES / "fine_tuning.npz") as file:
        expected = file[f"lr/timm_cosine_w{warmup}_T{total}"]
    got = [1e-3 * lr_multiplier(epoch, warmup, total, "cosine", floor=1e-3, start=1e-3) for epoch in range(total + 1)]
    np.testing.assert_allclose(got, expected, rtol=1e-12, atol=0)


def test_steps_are_those_of_bit():
    """BiT-HyperRule for less than 20,000 images (bit_hyperrule.py): a factor of 0.1 for each milestone below the step."""
    milestones = [200, 300, 400]
    rates = {update: lr_multiplier(update, 100, 500, "step", milestones=milestones)
             for update in (1, 50, 99, 100, 101, 200, 201, 300, 301, 400, 401, 500)}
    assert rates == pytest.approx({1: 0.01, 50: 0.5, 99: 0.99, 100: 1, 101: 1, 200: 1, 201: 0.1, 300: 0.1, 301: 0.01,
                                   400: 0.01, 401: 0.001, 500: 0.001}, rel=1e-12)
    assert lr_multiplier(450, 100, 500, "step", milestones=milestones, floor=0.5) == pytest.approx(0.5005)
