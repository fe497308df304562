"""The head that starts from a logistic regression."""

import dataclasses
from unittest import mock

import numpy as np
import pytest
import torch
from building import ALONE, build_objects

from models import create_model
from utils import build
from utils.build import head
from utils.build.head import extract, spread
from utils.build.model import Built
from utils.data.loader import Batch
from utils.training.precision import choose

START = ("--hidden_size", 64, "--num_layers", 4, "--mlp_dim", 256, "--num_heads", 4, "--precision", "fp32",
         "--pretrained_dir", "assets/ViT-Nano_2-letters.npz")
SMALL = {"img_size": 32, "hidden_size": 16, "mlp_dim": 32, "num_heads": 2, "num_layers": 2}


@pytest.fixture(autouse=True)
def few_images(monkeypatch):
    monkeypatch.setattr(head, "MAX_IMAGES", 200)


def accuracy(objects) -> float:
    split = objects.data.splits.train
    images = torch.stack([objects.data.eval_transform(split.source(index)[0]) for index in range(300)])
    with torch.no_grad():
        predicted = objects.model.eval()(objects.built.normalize(images)).argmax(1)
    return (predicted == torch.as_tensor(split.targets[:300])).double().mean().item()


def test_a_run_begins_with_what_the_features_tell():
    fitted, zero = build_objects(*START, "--head", "logistic"), build_objects(*START)
    assert accuracy(fitted) > 0.8 and zero.model.head.weight.abs().max() == 0
    own = dict(zero.model.named_parameters())
    assert all(torch.equal(each, own[name]) for name, each in fitted.model.named_parameters() if not name.startswith("head."))


def test_averages_start_from_it_and_resumed_runs_keep_theirs():
    objects = build_objects(*START, "--head", "logistic", "--ema_decay", 0.9)
    assert torch.equal(objects.trainer.ema.model.head.weight, objects.model.head.weight)
    with mock.patch.object(head, "_fit", side_effect=AssertionError):
        build.start_head(objects.config, object(), ALONE, objects.built, objects.data)


def test_one_of_several_ranks_computes_it_for_all(monkeypatch):
    """The others take what it sends; the number of ranks is no part of it."""
    alone, objects = build_objects(*START, "--head", "logistic"), build_objects(*START, "--head", "logistic")
    sent = {}

    def broadcast(ranks, compute):
        if ranks.is_main:
            sent.update(compute())
        return sent

    monkeypatch.setattr(head.distributed, "broadcast_from_main", broadcast)
    for rank in (0, 1):
        for parameter in (objects.model.head.weight, objects.model.head.bias):
            torch.nn.init.zeros_(parameter)
        build.start_head(objects.config, None, dataclasses.replace(ALONE, rank=rank, size=2), objects.built, objects.data)
        assert torch.equal(objects.model.head.weight, torch.from_numpy(sent["head.weight"]).float())
    assert torch.equal(alone.model.head.weight, objects.model.head.weight)


@pytest.mark.parametrize("weights", ["none", "balanced"])
def test_class_weights_count_in_it(weights):
    objects = build_objects(*START, "--head", "logistic", "--class_weights", weights)
    with mock.patch.object(head.logistic, "fit", wraps=head.logistic.fit) as fit:
        build.start_head(objects.config, None, ALONE, objects.built, objects.data)
    given = fit.call_args.args[3]
    assert given is None if weights == "none" else (len(np.unique(given)) > 1 and abs(given.mean() - 1) < 0.1)


def test_images_are_spread_over_the_classes():
    targets = np.repeat([0, 1, 2], [500, 30, 4])
    chosen = spread(targets, 60, seed=1)
    assert np.bincount(targets[chosen]).tolist() == [28, 28, 4] and (np.diff(chosen) > 0).all()
    assert chosen.tolist() == spread(targets, 60, seed=1).tolist() != spread(targets, 60, seed=2).tolist()
    assert spread(targets, 1000, seed=1).tolist() == list(range(534))


@pytest.mark.parametrize(("name", "mirrored"), [("ViT-Ti_16", False), ("ViT-Ti_16", True), ("DeiT-Ti_16-distilled", False),
                                                ("CaiT-XXS24", False)])
def test_what_enters_each_head_is_read(name, mirrored):
    keys = SMALL | ({"class_layers": 1} if name.startswith("CaiT") else {})
    model = create_model(name, 3, **keys)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    built = Built(model, choose("fp32", "O1", torch.device("cpu"))[0])
    features, targets = extract(built, [Batch(images, torch.tensor([0, 1, 2, 0]), ())], torch.device("cpu"), mirrored)
    views = torch.cat([images, images.flip(-1)]) if mirrored else images
    logits = sum(torch.from_numpy(inputs).float() @ model.get_parameter(f"{part}.weight").T + model.get_parameter(f"{part}.bias")
                 for part, inputs in features.items()) / len(features)
    assert sorted(features) == (["head", "head_dist"] if "distilled" in name else ["head"])
    assert torch.allclose(logits, model.eval()(built.normalize(views)), atol=1e-5)
    assert targets.tolist() == [0, 1, 2, 0] * (1 + mirrored)
    assert not any(module._forward_pre_hooks for module in model.modules())
