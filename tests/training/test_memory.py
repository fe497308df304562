"""The memory that training needs. tests/system/test_peak_memory.py measures it."""

import pytest
import torch

import configs
from models import create_model
from utils.training.memory import Need, choose_micro_steps, need, parameters

GIB = 2 ** 30


# Each key of a row that adds or removes parameters, singly and combined.
LATER = [{"registers": 4}, {"class_token": False, "classifier": "mean"}, {"positions": "patches", "registers": 1},
         {"positions": "none", "rope": "dinov3"}, {"classifier": "token_mean"}, {"classifier": "attention"}, {"mlp": "swiglu"},
         {"classifier": "attention", "pool_heads": 8, "pool_mlp_dim": 100, "class_token": False, "norm": "rms"},
         {"norm": "rms", "pre_norm": True, "patch_norm": "after"}, {"patch_norm": "around", "patch_bias": False},
         {"qk_norm": True}, {"final_norm": False}, {"final_norm": False, "classifier": "patch_mean"}, {"qkv_bias": "qv"},
         {"attention_norm": True, "mlp_norm": True}, {"mlp": "swiglu", "mlp_norm": True, "mlp_bias": False, "norm": "rms"},
         {"qkv_bias": "none"}, {"proj_bias": False, "qk_norm": True, "norm": "rms"}, {"registers": 2, "classifier": "gap"},
         {"mlp_bias": False, "attention_norm": True, "norm": "rms"}, {"layer_scale": 1e-5}]


@pytest.mark.parametrize("name", configs.MODELS)
def test_parameters_are_counted_exactly(name):
    changes = [{"num_layers": 2} if name in configs.FAMILIES else {}]          # all of their blocks are equal
    if name == "ViT-B_16":
        changes += [{"classifier": "gap"}, {"representation_size": 768}, {"in_channels": 1}, {"classifier": "patch_mean"}, *LATER]
    for changed in changes:
        with torch.device("meta"):
            model = create_model(name, 7, initialise=False, **changed)
        counted = parameters(model.config, model.img_size, 7)
        assert counted == sum(parameter.numel() for parameter in model.parameters()), changed


def test_memory_next_to_the_model_is_counted():
    def fixed(**more) -> int:
        settings = {"precision": "fp32", "optimizer": "sgd"} | more
        return need(configs.MODELS["ViT-B_16"], (224, 224), 10, **settings).fixed

    weights = 4 * parameters(configs.MODELS["ViT-B_16"], (224, 224), 10)
    assert fixed(optimizer="adamw") - fixed() == 2 * weights              # a state, and its copy while it is written
    assert fixed(averaged=True) - fixed() == 2 * weights
    assert fixed(precision="bf16") - fixed() == weights // 2              # its copy in bfloat16
    assert fixed(precision="fp16", fp16_opt_level="O1") == fixed(precision="bf16")
    assert fixed(precision="fp16", fp16_opt_level="O0") == fixed()
    assert fixed() - fixed(precision="fp16", fp16_opt_level="O3") == 2 * weights    # of 4: weights and state, each with a copy
    assert fixed(teacher_parameters=1000) - fixed() == 4000 and fixed(cached_images=1000) - fixed() == 1000
    assert fixed(device_type="cuda") < fixed() == fixed(device_type="mps")        # checkpoints are copied to the machine's memory
    assert fixed(trained_blocks=0) < fixed()


# Peak in MiB of a whole process on 2 cores, PyTorch 2.15, by the command of tests/system/test_peak_memory.py, which without
# --full only measures the smallest model.
@pytest.mark.parametrize(("model", "images", "precision", "optimizer", "measured"), [
    ("ViT-Ti_16", 16, "fp32", "sgd", 1424), ("ViT-S_16", 16, "bf16", "sgd", 1920), ("ViT-S_16", 32, "fp32", "adamw", 3487),
    ("R26-ViT-S_32", 16, "fp32", "sgd", 3268), ("ViT-B_16", 8, "fp32", "sgd", 3247), ("ViT-Ti_16", 32, "bf16", "adamw", 1720),
    ("R26-ViT-S_32", 16, "bf16", "sgd", 2387), ("ViT-B_16", 8, "bf16", "sgd", 2980),
    ("DINOv2-S_14-reg", 16, "fp32", "sgd", 2647), ("DINOv2-S_14-reg", 16, "bf16", "sgd", 2290),
    ("DINOv3-S+_16", 16, "fp32", "sgd", 3228), ("DINOv3-S+_16", 16, "bf16", "sgd", 2458)])
def test_expected_memory_is_near_the_measured_peak(model, images, precision, optimizer, measured):
    estimate = need(configs.MODELS[model], (224, 224), 2, precision=precision, optimizer=optimizer, eval_batch_size=2)
    assert 0.8 < max(estimate.step(images), estimate.fixed + estimate.evaluation) / (measured << 20) < 1.2


@pytest.mark.parametrize(("images", "memory", "more", "steps"), [
    (512, 513, {}, 1), (512, 512, {}, 2), (512, 65, {}, 8), (509, 100, {}, 509), (512, 0.5, {}, 512), (12, 5, {}, 3),
    (12, 5, {"power_of_two": True}, 4), (12, 5, {"even": True}, 3), (12, 3.5, {"even": True}, 6), (9, 5, {"even": True}, 1)])
def test_the_fewest_micro_batches_that_fit(images, memory, more, steps):
    assert choose_micro_steps(images, Need(fixed=1, gradients=0, image=10, evaluation=0), int(memory * 10), **more) == steps


def test_the_default_for_photographs_fits_into_half_of_this_machine():
    """ViT-B/16 with a batch of 512 in one piece filled 24 GB."""
    row, size = configs.MODELS["ViT-B_16"], (224, 224)
    for precision in ("fp32", "bf16"):
        whole = need(row, size, 100, precision=precision, optimizer="sgd", eval_batch_size=64)
        assert whole.step(512) > 24 * GIB
        assert choose_micro_steps(512, whole, 12 * GIB) in (8, 16)
