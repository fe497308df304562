"""An optimizer's state in a checkpoint: the run's own is accepted, any other is refused before PyTorch loads it."""

import copy
import types

import pytest
import torch

from utils.training.optimizer import OptimizerError, build_optimizer, load_state
from utils.training.saved_optimizer import checked_state

UPDATES = 2


def trained(kind: str, updates: int = UPDATES, dtype=torch.float32, **more) -> types.SimpleNamespace:
    """Return the optimizer after some updates, and the names of its parameters."""
    torch.manual_seed(0)
    parameters = [torch.nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in ((3, 4), (4,), ())]
    groups = [{"params": parameters[:2], "lr_scale": 0.5, "weight_decay": 0.1}, {"params": parameters[2:], "lr_scale": 1.0,
                                                                                 "weight_decay": 0.0}]
    optimizer = build_optimizer(kind, groups, 0.1, **more)
    for _ in range(updates):
        for parameter in parameters:
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
    return types.SimpleNamespace(optimizer=optimizer, names=dict(zip(parameters, "abc")))


def fault(kind: str, change, updates: int = UPDATES) -> str:
    run = trained(kind)
    state = copy.deepcopy(run.optimizer.state_dict())
    state = change(state) or state
    with pytest.raises(OptimizerError) as caught:
        checked_state(run.optimizer, state, updates, run.names)
    text = str(caught.value)
    assert text.startswith("optimizer state: ") and text.endswith(". Use an earlier checkpoint") and len(text) < 150
    return text.removeprefix("optimizer state: ").removesuffix(". Use an earlier checkpoint")


@pytest.mark.parametrize("kind", ["sgd", "adam", "adamw", "lamb"])
def test_the_state_of_the_run_itself_is_accepted(kind):
    if kind == "lamb":
        pytest.importorskip("timm")
    for updates in (0, UPDATES):
        run, other = trained(kind, updates), trained(kind, 0)
        state = run.optimizer.state_dict()
        load_state(other.optimizer, checked_state(other.optimizer, copy.deepcopy(state), updates, other.names))
        loaded = other.optimizer.state_dict()
        assert state["state"].keys() <= loaded["state"].keys()
        for index, slots in state["state"].items():
            assert all(torch.equal(slots[name], loaded["state"][index][name]) for name in slots)


def test_states_of_other_sessions_are_accepted():
    """Another learning rate or kernel, keys that other PyTorch versions add or lack, float16 weights, SGD without momentum."""
    run = trained("adamw")
    state = copy.deepcopy(run.optimizer.state_dict())
    for group in state["param_groups"]:
        group |= {"lr": 7.0, "lr_scale": 3.0, "fused": None, "eps": 1e-4}
        del group["decoupled_weight_decay"], group["amsgrad"]
    checked_state(run.optimizer, state, UPDATES, run.names)
    half = trained("adam", dtype=torch.float16)
    checked_state(half.optimizer, copy.deepcopy(half.optimizer.state_dict()), UPDATES, half.names)
    half.optimizer.state_dict()["state"][0]["exp_avg_sq"][0, 0] = float("inf")                  # squares overflow in float16
    checked_state(half.optimizer, half.optimizer.state_dict(), UPDATES, half.names)
    plain = trained("sgd", momentum=0.0)
    checked_state(plain.optimizer, plain.optimizer.state_dict(), UPDATES, plain.names)


def test_options_of_another_version_that_are_off_are_removed():
    run = trained("adamw")
    state = copy.deepcopy(run.optimizer.state_dict())
    for group in state["param_groups"]:
        group |= {"caution": False, "schedule": None}
    taken = checked_state(run.optimizer, state, UPDATES, run.names)
    assert taken["param_groups"] == run.optimizer.state_dict()["param_groups"]


class Lamb(torch.optim.Adam):
    """Counts its updates in the groups, as timm's Lamb does."""

    def state_dict(self):
        state = super().state_dict()
        for slots in state["state"].values():
            del slots["step"]
        return state


@pytest.mark.parametrize(("count", "words"), [
    (2, None), (2.0, None), (torch.tensor(2.0), None), (torch.tensor(2), None),
    (None, "a group lacks step, after 2 updates"), (3, "step 3 after 2 updates"), (torch.tensor(1.0), "step 1.0 after 2 updates"),
    (True, "step True after 2 updates"), ("2", "step '2' after 2 updates"),
    (torch.ones(2), "step an array of shape (2,) after 2 updates")], ids=repr)
def test_a_count_of_a_group(count, words):
    run = trained("adam")
    optimizer = Lamb(run.optimizer.param_groups)
    optimizer.state.update(run.optimizer.state)
    state = copy.deepcopy(optimizer.state_dict())
    for group in state["param_groups"] if count is not None else ():
        group["step"] = count
    if words is None:
        assert [group["step"] for group in checked_state(optimizer, state, UPDATES, run.names)["param_groups"]] == [2, 2]
    else:
        with pytest.raises(OptimizerError) as caught:
            checked_state(optimizer, state, UPDATES, run.names)
        assert str(caught.value) == f"optimizer state: {words}. Use an earlier checkpoint"


def test_a_file_may_have_other_groups():
    """An earlier version divided the parameters differently."""
    run = trained("adamw")
    parameters = list(run.names)
    other = build_optimizer("adamw", [{"params": parameters, "lr_scale": 1.0, "weight_decay": 0.1}], 0.1)
    other.load_state_dict({"state": run.optimizer.state_dict()["state"], "param_groups": other.state_dict()["param_groups"]})
    state = other.state_dict()
    with pytest.raises(OptimizerError, match="1 groups of parameters in place of 2"):
        checked_state(run.optimizer, state, UPDATES, run.names)
    checked_state(run.optimizer, state, UPDATES, run.names, [{"params": parameters, "lr_scale": 1.0, "weight_decay": 0.1}])
    with pytest.raises(OptimizerError, match=r"weight_decay 0\.1 in place of 0\.2"):
        checked_state(run.optimizer, state, UPDATES, run.names, [{"params": parameters, "lr_scale": 1.0, "weight_decay": 0.2}])


@pytest.mark.parametrize("shape", [(1,), (11,), (4, 3), (12,), (1, 3, 4), ()], ids=str)
@pytest.mark.parametrize("slot", ["exp_avg", "exp_avg_sq"])
def test_an_array_of_another_shape_is_named(slot, shape):
    def change(state):
        state["state"][0][slot] = torch.ones(shape)

    assert fault("adamw", change) == f"{slot} of a is an array of shape {shape}, not of shape (3, 4)"


def put(*path):
    """Return a function that sets the last item of `path` as the value at the keys before it."""
    def change(state):
        *keys, last, value = path
        for key in keys:
            state = state[key]
        state[last] = value

    return change


CASES = {
    "a setting": (put("param_groups", 0, "maximize", True), "maximize True in place of False"),
    "weight decay": (put("param_groups", 1, "weight_decay", 0.2), "weight_decay 0.2 in place of 0.0"),
    "capturable": (put("param_groups", 0, "capturable", True), "capturable True in place of False"),
    "betas": (put("param_groups", 0, "betas", (0.9, 0.5)), "betas (0.9, 0.5) in place of (0.9, 0.999)"),
    "eps": (put("param_groups", 0, "eps", 0.0), "eps 0.0"),
    "a setting of a tensor": (put("param_groups", 0, "amsgrad", torch.zeros(2)),
                              "amsgrad an array of shape (2,) in place of False"),
    "eps of a tensor": (put("param_groups", 0, "eps", torch.zeros(2)), "eps an array of shape (2,)"),
    "a setting that there is not": (put("param_groups", 0, "nesterov", True),
                                    "nesterov True of a group, written by another version of timm or PyTorch"),
    "a count that there is not": (put("param_groups", 0, "step", 2),
                                  "step 2 of a group, written by another version of timm or PyTorch"),
    "parameters": (put("param_groups", 0, "params", [1, 0]), "a group's parameters are a list of 2, not 0 to 1"),
    "a parameter too many": (put("state", 3, {}), "it has a parameter 3, of 3"),
    "a slot that there is not": (put("state", 0, "max_exp_avg_sq", torch.ones(3, 4)),
                                 "max_exp_avg_sq of a, which AdamW does not keep"),
    "nothing of a parameter": (lambda state: state["state"].pop(1) and None, "it lacks exp_avg of b"),
    "a slot less": (lambda state: {**state, "state": {**state["state"], 1: {"step": torch.tensor(2.0)}}},
                    "it lacks exp_avg of b"),
    "a setting less": (lambda state: state["param_groups"][0].pop("betas") and None, "a group lacks betas"),
    "no learning rate": (lambda state: state["param_groups"][1].pop("lr") and None, "a group lacks lr"),
    "a group less": (lambda state: state["param_groups"].pop() and None, "1 groups of parameters in place of 2"),
    "no state": (lambda state: {"param_groups": state["param_groups"]}, "it lacks state"),
    "steps": (put("state", 2, "step", torch.tensor(1.0)), "step 1.0 of c after 2 updates"),
    "steps of an array": (put("state", 2, "step", torch.ones(3)), "step an array of shape (3,) of c after 2 updates"),
    "whole numbers": (put("state", 1, "exp_avg", torch.ones(4, dtype=torch.int64)), "exp_avg of b is of int64"),
    "nan": (put("state", 1, "exp_avg", torch.full((4,), torch.nan)), "exp_avg of b is not finite"),
    "squares below 0": (put("state", 1, "exp_avg_sq", torch.tensor([1.0, 1, -1, 1])),
                        "exp_avg_sq of b has numbers below 0, or NaN"),
    "no squares": (put("state", 1, "exp_avg_sq", torch.full((4,), torch.nan)), "exp_avg_sq of b has numbers below 0, or NaN"),
}


@pytest.mark.parametrize("case", CASES)
def test_a_state_that_is_not_the_runs_own_is_refused(case):
    change, words = CASES[case]
    assert fault("adamw", change) == words


def test_two_arrays_in_the_same_memory_are_refused():
    def change(state):
        state["state"][0]["exp_avg_sq"] = state["state"][0]["exp_avg"].abs_()

    assert fault("adamw", change) == "two of its arrays are the same memory"


def test_arrays_with_other_strides_are_made_contiguous():
    """The fused kernels process all arrays in the order of memory."""
    run = trained("adamw")
    state = copy.deepcopy(run.optimizer.state_dict())
    average = state["state"][0]["exp_avg"]
    state["state"][0]["exp_avg"] = average.t().contiguous().t()
    taken = checked_state(run.optimizer, state, UPDATES, run.names)["state"][0]["exp_avg"]
    assert taken.is_contiguous() and torch.equal(taken, average)
