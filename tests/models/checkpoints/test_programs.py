"""Exported programs take any batch size, and are compared with the model. (ONNX: tests/system/test_export.py.)"""

import json

import pytest
import torch
from families import CLASSES, FAMILIES, family_model
from filling import refused

from models.checkpoints import programs

VIEW = {"interpolation": "bicubic", "eval_crop": 0.875}


@pytest.mark.parametrize("family", [*FAMILIES, "DINOv3", "PE", "AIMv2"])
@torch.no_grad()
def test_every_family_exports_with_a_free_batch(family):
    """With one block (and CaiT's class-attention layers), some at a size that is not square."""
    model = family_model(family, num_layers=1, **{"sigmoid_attention": "last"} if family in ("cait", "mae") else {}).eval()
    images = torch.randn(5, model.config.in_channels, *model.img_size)
    program = torch.export.export(model, (images[:2].clone(),), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},)).module()
    for count in (1, 5):
        assert (program(images[:count]) - model(images[:count])).abs().max() < 1e-5


def test_metadata_of_a_program():
    facts = programs.facts_of(family_model("grey"), CLASSES, VIEW | {"exif": "off"})
    seen = json.loads(facts["preprocessing"])
    assert json.loads(facts["classes"]) == CLASSES and (seen["size"], seen["channels"]) == ([16, 24], 1)
    assert (seen["mean"], seen["eval_crop"], seen["exif"]) == ([0.5], 0.875, "off")
    assert "0.875 of the shorter side" in seen["resize"]
    whole = programs.facts_of(family_model("vit"), CLASSES, VIEW | {"eval_crop": 0.0})
    assert "without keeping the aspect ratio" in whole["preprocessing"]


def test_a_program_that_computes_something_else_is_refused():
    model = family_model("vit").eval()
    assert programs._compare(model, model).endswith("logits differ by 0e+00 at most")
    refused("does not compute what the model does: for 1 images, logits differ by 0.1", programs._compare, model,
            lambda images: model(images) + 0.1)
    refused("differ by inf", programs._compare, model, lambda images: model(images)[:2] if len(images) > 1 else model(images))
    refused("differ by nan", programs._compare, model, lambda images: model(images) * float("nan"))


def test_a_model_in_another_type_is_not_changed():
    model = family_model("gap").double()
    assert programs._plain(model).pos_embed.dtype == torch.float32 and model.pos_embed.dtype == torch.float64
    plain = model.float()
    assert programs._plain(plain) is plain and not plain.training
