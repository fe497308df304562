"""CaiT: the published code's numbers, its two kinds of layers, recording, initial values."""

import pytest
import reference
import torch
from torch import nn

from configs import META, MODELS, architecture
from models import CaiT, create_model, record_attention
from models.attention import AttendTalking

SMALL = architecture(4, 32, 64, 4, 3, img_size=16, class_layers=2, layer_scale=1e-2, **META)


def published_model():
    state = reference.torch_state("cait")
    model = create_model(reference.TORCH_ROWS["cait"], len(state["head.bias"])).eval()
    model.load_state_dict(state)                                                   # strict: the names are theirs
    return model


def random_model(img_size=None, **overrides):
    """With a head that is not zero, and branches that are large enough to be seen."""
    torch.manual_seed(0)
    model = create_model(SMALL, 5, img_size, **{"layer_scale": 0.5} | overrides).eval()
    nn.init.normal_(model.head.weight)
    return model


def images_of(model, count: int = 2):
    return torch.randn(count, 3, *model.img_size, generator=torch.Generator().manual_seed(1))


def hooks(model) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


# ------------------------------------------------------------------------------------ the published numbers


@torch.inference_mode()
def test_the_published_numbers():
    """Features, logits, and the maps of both kinds of layers."""
    expected, images = reference.torch_expected("cait"), reference.torch_images("cait")
    model = published_model()
    assert type(model) is CaiT
    assert (model.forward_features(images)[:, 0] - expected["features"]).abs().max() < 1e-5
    with record_attention(model) as maps:
        assert (model(images) - expected["logits"]).abs().max() < 1e-5
    talking, of_class = torch.stack(maps[:3]), torch.stack(maps[3:])
    assert talking.shape == (3, 2, 4, 16, 16) and of_class.shape == (2, 2, 4, 1, 17)
    assert (talking - expected["talking_heads_attn_after_proj_w"]).abs().max() < 1e-5
    assert (of_class - expected["class_attn"]).abs().max() < 1e-5


def test_the_fixture_s_factors_are_seen():
    """Its layer scale is far from the initial 1e-5, so that a branch without its factor would show."""
    state = reference.torch_state("cait")
    assert all(value.std() > 0.01 for name, value in state.items() if "gamma" in name)


# ------------------------------------------------------------------------------------------------- the layers


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_weights_times_values_is_the_forward_pass_of_talking_heads(dtype):
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 4, 9, 8, dtype=dtype)
    mixers = [nn.Linear(4, 4, dtype=dtype) for _ in range(2)]
    attend = AttendTalking(dropout_rate=0.5).eval()
    weights = attend.weights(q, k, *mixers)
    assert weights.dtype == dtype and weights.shape == (2, 4, 9, 9)
    assert (weights @ v - attend(q, k, v, *mixers)).abs().max() < 1e-6
    assert (weights.sum(-1) - 1).abs().max() > 0.1 and (weights < 0).any()        # proj_w is any linear layer


def test_dropout_acts_on_the_weights_of_talking_heads():
    """With the identity in place of v, the output is the weights: some are zero, the others divided by 1 - rate."""
    torch.manual_seed(0)
    q, k = torch.randn(2, 2, 4, 9, 8)
    mixers = [nn.Linear(4, 4) for _ in range(2)]
    attend, identity = AttendTalking(dropout_rate=0.25), torch.eye(9).expand(2, 4, 9, 9)
    ratio = attend(q, k, identity, *mixers) / attend.weights(q, k, *mixers)
    assert 0.15 < (ratio == 0).float().mean() < 0.35
    torch.testing.assert_close(ratio[ratio != 0], torch.full_like(ratio[ratio != 0], 1 / 0.75))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_of_talking_heads_in_half_precision_are_float32(dtype):
    q, k = torch.randn(2, 2, 4, 9, 8).to(dtype)
    mixers = [nn.Linear(4, 4).to(dtype) for _ in range(2)]
    weights = AttendTalking.weights(q, k, *mixers)
    assert weights.dtype == torch.float32
    torch.testing.assert_close(weights, AttendTalking.weights(q.float(), k.float(), *(mixer.float() for mixer in mixers)))


def test_blocks_are_the_formula():
    model = random_model()
    block, of_class = model.blocks[0], model.blocks_token_only[0]
    for layer in (block, of_class):
        nn.init.normal_(layer.gamma_1)
        nn.init.normal_(layer.gamma_2)
    x, cls = torch.randn(2, 16, 32), torch.randn(2, 1, 32)
    middle = x + block.gamma_1 * block.attn(block.norm1(x))
    torch.testing.assert_close(block(x), middle + block.gamma_2 * block.mlp(block.norm2(middle)))
    middle = cls + of_class.gamma_1 * of_class.attn(of_class.norm1(torch.cat([cls, x], dim=1)))
    torch.testing.assert_close(of_class(cls, x), middle + of_class.gamma_2 * of_class.mlp(of_class.norm2(middle)))


def test_the_cls_token_enters_late_and_without_a_position():
    model = random_model()
    patches = model.blocks(model.patch_embed(images_of(model)) + model.pos_embed)
    assert model.pos_embed.shape == (1, 16, 32) and patches.shape == (2, 16, 32)
    first, second = model.blocks_token_only
    cls = second(first(model.cls_token.expand(2, -1, -1), patches), patches)
    features = model.forward_features(images_of(model))
    assert features.shape == (2, 1 + 16, 32)
    torch.testing.assert_close(features, model.norm(torch.cat([cls, patches], dim=1)))
    torch.testing.assert_close(model(images_of(model)), features[:, 0] @ model.head.weight.t() + model.head.bias)


def test_stochastic_depth_and_dropout_stand_in_the_talking_heads_layers_alone():
    """One rate in all of them, as in the published code."""
    model = create_model(SMALL, 5, drop_path_rate=0.2, dropout_rate=0.1, attention_dropout_rate=0.3)
    assert [block.stochastic_depth.p for block in model.blocks] == [0.2] * 3
    assert [block.attn.attend.dropout_rate for block in model.blocks] == [0.3] * 3
    assert all(block.attn.drop.p == block.mlp.drop.p == 0.1 for block in model.blocks) and model.pos_drop.p == 0.1
    for block in model.blocks_token_only:
        assert block.stochastic_depth is None and block.attn.attend.dropout_rate == block.attn.drop.p == block.mlp.drop.p == 0
    images, plain, x = images_of(model), create_model(SMALL, 5), torch.randn(2, 16, 32)
    plain.load_state_dict(model.state_dict())
    assert not torch.equal(model.forward_features(images), model.forward_features(images))
    assert torch.equal(model.eval().forward_features(images), plain.eval().forward_features(images))
    model.train().blocks[0].stochastic_depth.p = 1.0
    assert torch.equal(model.blocks[0](x), x)                                                  # both branches are gone


def test_non_square_images():
    model = random_model((8, 20))
    assert (model.grid, model.num_prefix_tokens, model.pos_embed.shape) == ((2, 5), 0, (1, 10, 32))
    with torch.no_grad(), record_attention(model) as maps:
        assert model(images_of(model)).shape == (2, 5)
    assert [map.shape for map in maps] == [(2, 4, 10, 10)] * 3 + [(2, 4, 1, 11)] * 2


# ------------------------------------------------------------------------------------------------- recording


def test_recording_changes_nothing():
    model = random_model()
    images = images_of(model)
    with torch.no_grad():
        before = model(images)
        with record_attention(model) as maps:
            during = model(images)
        assert torch.equal(before, during) and torch.equal(before, model(images))
    assert hooks(model) == 0
    for map in maps:
        assert map.dtype == torch.float32 and not map.requires_grad
    for map in maps[3:]:
        torch.testing.assert_close(map.sum(-1), torch.ones(2, 4, 1))


def test_recording_in_training_keeps_gradients_and_random_numbers():
    model = random_model(dropout_rate=0.2, attention_dropout_rate=0.2, drop_path_rate=0.2).train()
    images, results = images_of(model), []
    for recording in (False, True):
        torch.manual_seed(3)
        model.zero_grad()
        if recording:
            with record_attention(model) as maps:
                logits = model(images)
        else:
            logits = model(images)
        logits.square().sum().backward()
        results.append([logits.detach()] + [parameter.grad.clone() for parameter in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*results)) and not any(map.requires_grad for map in maps)


def test_differentiable_lets_gradients_reach_the_maps():
    """Checked against a finite difference in a map of either kind."""
    model = random_model().double()
    images = images_of(model).double()
    with record_attention(model, differentiable=True) as maps:
        logits = model(images)
    torch.testing.assert_close(logits, model(images))
    slopes = torch.autograd.grad(logits[0, 2], maps)
    assert [slope.shape for slope in slopes] == [(2, 4, 16, 16)] * 3 + [(2, 4, 1, 17)] * 2
    assert all(slope[0].any() and not slope[1].any() for slope in slopes)
    for index, layer in ((1, model.blocks[1]), (4, model.blocks_token_only[1])):
        changed = maps[index].detach().clone()
        changed[0, 1, 0, 5] += 1e-6
        handle = layer.attn.attend.register_forward_hook(lambda attend, inputs, output, map=changed: map @ inputs[2])
        measured = (model(images)[0, 2] - logits[0, 2]) / 1e-6
        handle.remove()
        torch.testing.assert_close(measured, slopes[index][0, 1, 0, 5], atol=1e-6, rtol=1e-5)


def test_under_autocast():
    """The forward pass runs in half precision, the recorded maps do not, and they say the same."""
    model = random_model()
    images = images_of(model)
    with torch.no_grad(), record_attention(model) as wide:
        model(images)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16), record_attention(model) as maps:
        assert model(images).dtype == torch.bfloat16
    for map, want in zip(maps, wide):
        assert map.dtype == torch.float32
        torch.testing.assert_close(map, want, atol=0.02, rtol=0.05)


def test_a_compiled_model_is_one_graph():
    """Nothing that serves recording breaks the graph."""
    model = random_model()
    images = images_of(model)
    torch.compiler.reset()
    try:
        with torch.no_grad():
            torch.testing.assert_close(torch.compile(model, backend="eager", fullgraph=True)(images), model(images))
    finally:
        torch.compiler.reset()


# ------------------------------------------------------------------------------------------ initial values, sizes


def test_initial_values():
    torch.manual_seed(0)
    row = architecture(4, 256, 512, 4, 2, img_size=64, class_layers=2, layer_scale=1e-4, **META)
    model = create_model(row, 10)
    for name, parameter in model.named_parameters():
        if "gamma" in name:
            assert (parameter == 1e-4).all()
        elif name.startswith("head.") or (name.endswith("bias") and "norm" not in name and "patch_embed" not in name):
            assert not parameter.any(), name
        elif name in ("cls_token", "pos_embed") or (parameter.dim() == 2 and "norm" not in name):
            spread = 4 * parameter.numel() ** -0.5
            assert abs(parameter.std() / 0.02 - 1) < spread + 0.02, name


def test_rows_are_the_published_sizes():
    """Table 3 of the paper: width, heads and layers; 48 channels a head, two class-attention layers."""
    sizes = {"CaiT-XXS24": (192, 24), "CaiT-XXS36": (192, 36), "CaiT-XS24": (288, 24), "CaiT-S24": (384, 24),
             "CaiT-S36": (384, 36), "CaiT-M36": (768, 36), "CaiT-M48": (768, 48)}
    for name, (width, layers) in sizes.items():
        row = MODELS[name]
        assert (row.hidden_size, row.num_heads, row.mlp_dim, row.num_layers) == (width, width // 48, 4 * width, layers)
        assert row.class_layers == 2 and row.gelu == "erf" and row.position_resize == "bicubic"
