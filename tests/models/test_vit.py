"""The model, compared with the numbers of Google's code; image sizes, initial values, dropout, depth."""

import math

import pytest
import reference
import torch
from torch import nn

from configs import architecture
from models import create_model

SMALL = architecture(4, 32, 64, 2, 2, img_size=16)
HYBRID = architecture(1, 32, 64, 2, 1, img_size=16, resnet_layers=(1, 1), resnet_width=32)


def google_model(case: str, **overrides):
    return create_model(reference.ROWS[case], pretrained=reference.weights(case), head="keep", **overrides).eval()


@pytest.mark.parametrize("gelu, array", [("tanh", "logits"), ("erf", "logits_erf")])
@pytest.mark.parametrize("case", reference.ROWS)
@torch.inference_mode()
def test_logits_are_google_s(case, gelu, array):
    logits = google_model(case, gelu=gelu)(reference.images(reference.ROWS[case].img_size))
    difference = (logits - reference.expected(case)[array]).abs().max()
    assert difference < reference.tolerance(case)


@pytest.mark.parametrize("case", reference.ROWS)
@torch.inference_mode()
def test_intermediate_tensors_are_google_s(case):
    """Patch embedding, tokens, every block, the last norm and the head's input: they show where a difference starts."""
    expected, model = reference.expected(case), google_model(case)
    seen = {}
    for layer in (model.patch_embed, *model.blocks, model.norm, model.head):
        layer.register_forward_hook(lambda layer, inputs, output: seen.update({layer: (inputs[0], output)}))
    model(reference.images(reference.ROWS[case].img_size))

    ours = {"tokens_in": seen[model.blocks[0]][0], "blocks": torch.stack([seen[block][1] for block in model.blocks]),
            "encoded": seen[model.norm][1], "pre_logits": seen[model.head][0]}
    if "embedding" in expected:
        ours["embedding"] = seen[model.patch_embed][1].view(expected["embedding"].shape)      # (B, h * w, D) -> (B, h, w, D)
    atol = 1e-4 if case in reference.HYBRIDS else 3e-5                          # values are up to 20
    for name, value in ours.items():
        want = expected[name]
        if value.dim() > 2:
            value = value[..., : want.shape[-2], :]       # some cases hold only the first tokens
        torch.testing.assert_close(value, want, atol=atol, rtol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("case", reference.FINE_TUNED)
@torch.inference_mode()
def test_fine_tuning_starts_where_google_s_does(case):
    """For another image size and head, positions are resized, and the old head and its pre_logits are dropped."""
    source, side = reference.FINE_TUNED[case]
    expected, images = reference.expected(case), reference.images(side)
    for gelu, array in (("tanh", "logits"), ("erf", "logits_erf")):
        model = create_model(reference.ROWS[source], len(expected["head_bias"]), side, reference.weights(source), gelu=gelu)
        assert (model.pos_embed - expected["pos_embedding"]).abs().max() < 1e-5
        model.head.weight.copy_(expected["head_kernel"].t())
        model.head.bias.copy_(expected["head_bias"])
        assert (model.eval()(images) - expected[array]).abs().max() < reference.tolerance(case)


@pytest.mark.parametrize("row, img_size, grid", [
    (SMALL, None, (4, 4)),
    (SMALL, 24, (6, 6)),
    (architecture(4, 32, 64, 2, 1, img_size=16, classifier="gap"), (8, 20), (2, 5)),
    (architecture(4, 32, 64, 2, 1, img_size=16, classifier="patch_mean"), (8, 20), (2, 5)),
    (architecture(1, 32, 64, 2, 1, resnet_layers=(1, 1), resnet_width=32), (16, 24), (2, 3)),
    (architecture(2, 32, 64, 2, 1, resnet_layers=(), resnet_width=32), (16, 24), (2, 3)),
])
def test_image_sizes(row, img_size, grid):
    """A side or (height, width), square or not."""
    model = create_model(row, 5, img_size)
    height, width = model.img_size
    assert model.grid == grid
    assert model.forward_features(torch.randn(2, 3, height, width)).shape == (
        2, math.prod(grid) + (row.classifier != "gap"), 32)
    assert model(torch.randn(2, 3, height, width)).shape == (2, 5)


@pytest.mark.parametrize("shape", [(2, 3, 16, 20), (2, 3, 20, 16), (2, 1, 16, 16), (3, 16, 16)])
def test_images_of_another_shape_are_refused(shape):
    with pytest.raises(ValueError, match=r"expected \(B, 3, 16, 16\)"):
        create_model(SMALL)(torch.zeros(shape))


@pytest.mark.parametrize("channels", [1, 5])
@pytest.mark.parametrize("row", [SMALL, HYBRID], ids=["transformer", "hybrid"])
def test_other_channels(row, channels):
    model = create_model(row, 5, in_channels=channels)
    assert model(torch.randn(2, channels, *model.img_size)).shape == (2, 5)


def test_initial_values_are_google_s():
    torch.manual_seed(0)
    model = create_model(architecture(1, 128, 512, 4, 2, img_size=64, resnet_layers=(1, 1), resnet_width=32), 10)
    state = model.state_dict()

    def uniform(weight, fan_in, fan_out):
        bound = math.sqrt(6 / (fan_in + fan_out))
        assert bound * 0.98 < weight.abs().max() <= bound and abs(weight.std() / bound * math.sqrt(3) - 1) < 0.05

    def normal(weight, std):
        spread = 4 * weight.numel() ** -0.5
        assert abs(weight.std() / std - 1) < spread and abs(weight.mean()) < spread * std

    for i in range(2):
        for part in state[f"blocks.{i}.attn.qkv.weight"].chunk(3):
            uniform(part, 128, 128)
        uniform(state[f"blocks.{i}.attn.proj.weight"], 128, 128)
        uniform(state[f"blocks.{i}.mlp.fc1.weight"], 128, 512)
        uniform(state[f"blocks.{i}.mlp.fc2.weight"], 512, 128)
        normal(state[f"blocks.{i}.mlp.fc1.bias"], 1e-6)
        normal(state[f"blocks.{i}.mlp.fc2.bias"], 1e-6)
    normal(state["pos_embed"], 0.02)
    normal(state["patch_embed.proj.weight"], 256 ** -0.5)
    normal(state["patch_embed.backbone.stem.conv.weight"], (3 * 49) ** -0.5)
    normal(state["patch_embed.backbone.stages.1.blocks.0.conv2.weight"], (64 * 9) ** -0.5)
    zeros = {"cls_token", "head.weight", "head.bias"} | {
        name for name in state if name.endswith("bias") and ".mlp." not in name}
    ones = {name for name in state if ".norm" in f".{name}" and name.endswith("weight")}
    assert all(not state[name].any() for name in zeros) and all((state[name] == 1).all() for name in ones)


@pytest.mark.parametrize("place", ["pos_drop", "blocks.0.attn.drop", "blocks.0.mlp.drop", "blocks.0.attn.attend"])
def test_dropout_acts_only_in_training(place):
    """In each place separately: after positions, the attention's output and both MLP layers, and on the attention weights."""
    torch.manual_seed(0)
    model, images = create_model(SMALL, dropout_rate=0.5, attention_dropout_rate=0.5), torch.randn(2, 3, 16, 16)
    without = create_model(SMALL)
    without.load_state_dict(model.state_dict())
    for name, module in model.named_modules():
        if isinstance(module, nn.Dropout) and name != place:
            module.p = 0.0
        elif hasattr(module, "dropout_rate") and name != place:
            module.dropout_rate = 0.0
    assert not torch.equal(model.forward_features(images), model.forward_features(images))
    model.eval(), without.eval()
    assert torch.equal(model.forward_features(images), without.forward_features(images))


@pytest.mark.parametrize("layers, rates", [(1, [0.0]), (2, [0.0, 0.3]), (4, [0.0, 0.1, 0.2, 0.3])])
def test_the_rate_of_stochastic_depth_rises_to_the_last_block(layers, rates):
    model = create_model(SMALL, 5, num_layers=layers, drop_path_rate=0.3)
    assert [block.drop_path.p for block in model.blocks] == pytest.approx(rates)
