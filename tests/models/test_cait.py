"""CaiT: numbers of the published code, talking heads, where dropout acts, initial values, sizes."""

import pytest
import reference
import torch
from filling import published_model
from torch import nn

from configs import META, architecture
from models import CaiT, create_model, record_attention
from models.attention import AttendTalking

SMALL = architecture(4, 32, 64, 4, 3, img_size=16, class_layers=2, layer_scale=1e-2, **META)


@torch.inference_mode()
def test_outputs_are_those_of_the_published_code():
    """Features, logits, and the attention maps of both kinds of layers."""
    expected, images = reference.torch_expected("cait"), reference.torch_images("cait")
    model = published_model("cait")
    assert type(model) is CaiT
    assert (model.forward_features(images)[:, 0] - expected["features"]).abs().max() < 1e-5
    with record_attention(model) as maps:
        assert (model(images) - expected["logits"]).abs().max() < 1e-5
    talking, of_class = torch.stack(maps[:3]), torch.stack(maps[3:])
    assert talking.shape == (3, 2, 4, 16, 16) and of_class.shape == (2, 2, 4, 1, 17)
    assert (talking - expected["talking_heads_attn_after_proj_w"]).abs().max() < 1e-5
    assert (of_class - expected["class_attn"]).abs().max() < 1e-5


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
    """If v is the identity, the output is the weights: some are zero, the others divided by 1 - rate."""
    torch.manual_seed(0)
    q, k = torch.randn(2, 2, 4, 9, 8)
    mixers = [nn.Linear(4, 4) for _ in range(2)]
    attend, identity = AttendTalking(dropout_rate=0.25), torch.eye(9).expand(2, 4, 9, 9)
    ratio = attend(q, k, identity, *mixers) / attend.weights(q, k, *mixers)
    assert 0.15 < (ratio == 0).float().mean() < 0.35
    torch.testing.assert_close(ratio[ratio != 0], torch.full_like(ratio[ratio != 0], 1 / 0.75))


def test_stochastic_depth_and_dropout_act_only_in_the_talking_heads_layers():
    """With the same rate in all of them, as in the published code."""
    model = create_model(SMALL, 5, drop_path_rate=0.2, dropout_rate=0.1, attention_dropout_rate=0.3)
    assert [block.drop_path.p for block in model.blocks] == [0.2] * 3
    assert [block.attn.attend.dropout_rate for block in model.blocks] == [0.3] * 3
    assert all(block.attn.drop.p == block.mlp.drop.p == 0.1 for block in model.blocks) and model.pos_drop.p == 0.1
    for block in model.blocks_token_only:
        assert block.drop_path.p == block.attn.attend.dropout_rate == block.attn.drop.p == block.mlp.drop.p == 0
    images, plain = torch.randn(2, 3, 16, 16), create_model(SMALL, 5)
    plain.load_state_dict(model.state_dict())
    assert not torch.equal(model.forward_features(images), model.forward_features(images))
    assert torch.equal(model.eval().forward_features(images), plain.eval().forward_features(images))


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
