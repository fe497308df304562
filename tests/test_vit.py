"""The model against Google's numbers, its sizes, its initial values, and what create_model accepts."""

import math

import pytest
import reference
import torch
from torch import nn

from configs import MODELS, architecture
from models import ModelError, create_model, list_models

SMALL = architecture(4, 32, 64, 2, 2, img_size=16)
PARAMETERS = {
    "ViT-Ti_16": 5_717_416,
    "ViT-S_16": 22_050_664,
    "ViT-S_32": 22_878_952,
    "ViT-B_8": 86_576_872,
    "ViT-B_16": 86_567_656,
    "ViT-B_32": 88_224_232,
    "ViT-L_16": 304_326_632,
    "ViT-L_32": 306_535_400,
    "ViT-H_14": 632_045_800,
    "R-ViT-Ti_16": 6_337_704,
    "R26-ViT-S_32": 36_431_912,
    "R26-ViT-B_32": 101_383_976,
    "R50-ViT-B_16": 98_659_112,
    "R50-ViT-L_32": 328_994_856,
    "ViT-Nano_2": 267_048,
}


def google_model(case: str, **overrides):
    return create_model(reference.ROWS[case], pretrained=reference.weights(case), head="keep", **overrides).eval()


def record(module: nn.Module, store: list, inputs: bool = False) -> None:
    """Appends to `store` what goes through `module`."""
    if inputs:
        module.register_forward_pre_hook(lambda _, args: store.append(args[0]))
    else:
        module.register_forward_hook(lambda _, args, output: store.append(output))


# ----------------------------------------------------------------------------------------- Google's numbers


@pytest.mark.parametrize("gelu, array", [("tanh", "logits"), ("erf", "logits_erf")])
@pytest.mark.parametrize("case", reference.ROWS)
@torch.inference_mode()
def test_logits_are_google_s(case, gelu, array):
    logits = google_model(case, gelu=gelu)(reference.images(reference.ROWS[case].img_size))
    difference = (logits - reference.expected(case)[array]).abs().max()
    assert difference < reference.tolerance(case)


@pytest.mark.parametrize("case", reference.ROWS)
@torch.inference_mode()
def test_tensors_on_the_way_are_google_s(case):
    """Patch embedding, tokens, every block, the last norm and the head's input: they say where a difference begins."""
    expected, model = reference.expected(case), google_model(case)
    embedding, tokens, blocks, encoded, pooled = [], [], [], [], []
    record(model.patch_embed, embedding)
    record(model.blocks[0], tokens, inputs=True)
    for block in model.blocks:
        record(block, blocks)
    record(model.norm, encoded)
    record(model.head, pooled, inputs=True)
    model(reference.images(reference.ROWS[case].img_size))

    ours = {"tokens_in": tokens[0], "blocks": torch.stack(blocks), "encoded": encoded[0], "pre_logits": pooled[0]}
    if "embedding" in expected:
        ours["embedding"] = embedding[0].view(expected["embedding"].shape)      # (B, h * w, D) -> (B, h, w, D)
    atol = 1e-4 if case in reference.HYBRIDS else 3e-5                          # values are up to 20
    for name, value in ours.items():
        want = expected[name]
        if value.dim() > 2:
            value = value[..., : want.shape[-2], :]       # some cases hold the first tokens only
        torch.testing.assert_close(value, want, atol=atol, rtol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("case", reference.FINE_TUNED)
@torch.inference_mode()
def test_fine_tuning_starts_where_google_s_does(case):
    """Another image size and another head: the positions are resized, the old head and its pre_logits are gone."""
    source, side = reference.FINE_TUNED[case]
    expected, images = reference.expected(case), reference.images(side)
    for gelu, array in (("tanh", "logits"), ("erf", "logits_erf")):
        model = create_model(reference.ROWS[source], len(expected["head_bias"]), side, reference.weights(source), gelu=gelu)
        assert (model.pos_embed - expected["pos_embedding"]).abs().max() < 1e-5
        model.head.weight.copy_(expected["head_kernel"].t())
        model.head.bias.copy_(expected["head_bias"])
        assert (model.eval()(images) - expected[array]).abs().max() < reference.tolerance(case)


# --------------------------------------------------------------------------------------------------- sizes


def test_every_listed_model_has_a_golden_count():
    assert list_models() == list(MODELS) and set(list_models()) == set(PARAMETERS)


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_count(name):
    """At the row's size and 1000 classes: Google's counts (ViT-Nano_2 is ours)."""
    with torch.device("meta"):
        model = create_model(name)
    assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS[name]


@pytest.mark.parametrize("row, img_size, grid", [
    (SMALL, None, (4, 4)),
    (SMALL, 24, (6, 6)),
    (SMALL, (8, 20), (2, 5)),
    (architecture(4, 32, 64, 2, 1, img_size=16, classifier="gap"), (8, 20), (2, 5)),
    (architecture(1, 32, 64, 2, 1, resnet_layers=(1, 1), resnet_width=32), (16, 24), (2, 3)),
    (architecture(2, 32, 64, 2, 1, resnet_layers=(), resnet_width=32), (16, 24), (2, 3)),
])
def test_image_sizes(row, img_size, grid):
    """A side or (height, width), square or not."""
    model = create_model(row, 5, img_size)
    height, width = model.img_size
    assert model.grid == grid
    assert model.forward_features(torch.randn(2, 3, height, width)).shape == (
        2, math.prod(grid) + (row.classifier == "token"), 32)
    assert model(torch.randn(2, 3, height, width)).shape == (2, 5)


@pytest.mark.parametrize("name, img_size, message", [
    ("ViT-B_16", 230, "230x230: 230 is not a multiple of 16, .*; take 224 or 240$"),
    ("ViT-B_16", (224, 100), "224x100: 100 is not a multiple of 16, .*; take 96 or 112$"),
    ("ViT-H_14", (224, 256), "256 is not a multiple of 14, .*; take 252 or 266$"),
    ("ViT-B_32", 8, "8 is not a multiple of 32, .*; take 32$"),
    ("ViT-B_32", 0, "0 is not a multiple of 32, .*; take 32$"),
    ("R50-ViT-B_16", 232, "232 is not a multiple of 16, .*; take 224 or 240$"),
    ("R26-ViT-S_32", 240, "240 is not a multiple of 32, .*; take 224 or 256$"),
    ("R-ViT-Ti_16", 225, "225 is not a multiple of 32, .*; take 224 or 256$"),
])
def test_a_size_that_does_not_fit_names_its_neighbours(name, img_size, message):
    with pytest.raises(ModelError, match=message):
        create_model(name, img_size=img_size)


@pytest.mark.parametrize("shape", [(2, 3, 16, 20), (2, 3, 20, 16), (2, 1, 16, 16), (3, 16, 16)])
def test_images_of_another_shape_are_refused(shape):
    with pytest.raises(ValueError, match=r"takes \(B, 3, 16, 16\)"):
        create_model(SMALL)(torch.zeros(shape))


def test_other_channels():
    assert create_model(SMALL, 5, in_channels=1)(torch.randn(2, 1, 16, 16)).shape == (2, 5)


# ------------------------------------------------------------------------------------- what create_model takes


@pytest.mark.parametrize("arguments, message", [
    ({"name_or_config": "ViT-B_17"}, "no model is called 'ViT-B_17'; there are ViT-Ti_16, "),
    ({"droput_rate": 0.1}, "a model has no droput_rate; its keys are .*dropout_rate"),
    ({"head": "new"}, "head='new': must be 'zero' or 'keep'"),
    ({"head": "keep"}, "head='keep' needs pretrained="),
    ({"num_classes": 0}, "num_classes 0: must be 1 or more"),
    ({"num_heads": 5}, "hidden_size 32 is not divisible by num_heads 5"),
    ({"classifier": "map"}, "classifier 'map': must be 'token' or 'gap'"),
    ({"gelu": "none"}, "gelu 'none': must be 'tanh' or 'erf'"),
])
def test_wrong_arguments_are_one_line(arguments, message):
    with pytest.raises(ModelError, match=message) as error:
        create_model(**{"name_or_config": SMALL} | arguments)
    assert "\n" not in str(error.value)


def test_a_row_may_stand_for_the_name():
    row = MODELS["ViT-Nano_2"]
    by_name, by_row = create_model("ViT-Nano_2", 7), create_model(row, 7)
    assert by_name.config == by_row.config == row
    assert [p.shape for p in by_name.parameters()] == [p.shape for p in by_row.parameters()]


def test_overrides_act_on_this_model_alone():
    before = MODELS["ViT-Nano_2"].to_dict()
    model = create_model("ViT-Nano_2", num_layers=2, dropout_rate=0.25, representation_size=48)
    assert len(model.blocks) == 2 and model.pos_drop.p == 0.25 and model.pre_logits.fc.out_features == 48
    assert MODELS["ViT-Nano_2"].to_dict() == before
    assert (model.training, model.load_report, model.num_classes) == (True, None, 1000)


# ------------------------------------------------------------------------------------ initial values, dropout


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


def test_the_qkv_weight_is_one_parameter_whose_parts_differ():
    """The initial values are written into the parts: a copy of a part would leave Glorot's 3D fan-out behind."""
    torch.manual_seed(0)
    q, k, v = create_model(SMALL).blocks[0].attn.qkv.weight.chunk(3)
    assert not (q == k).any() and not (k == v).any()
    assert q.abs().max() > math.sqrt(6 / (32 + 3 * 32))


PLACES = ["pos_drop", "blocks.0.attn.drop", "blocks.0.mlp.drop", "blocks.0.attn.attend"]


@pytest.mark.parametrize("place", PLACES)
def test_dropout_acts_in_training_alone(place):
    """Each place by itself: after the positions, the attention's output, both MLP layers; on the attention weights."""
    torch.manual_seed(0)
    model, images = create_model(SMALL, dropout_rate=0.5, attention_dropout_rate=0.5), torch.randn(2, 3, 16, 16)
    without = create_model(SMALL)
    without.load_state_dict(model.state_dict())
    for module in model.modules():
        if isinstance(module, nn.Dropout) and module is not model.get_submodule(place):
            module.p = 0.0
        elif hasattr(module, "dropout_rate") and module is not model.get_submodule(place):
            module.dropout_rate = 0.0
    assert not torch.equal(model.forward_features(images), model.forward_features(images))
    model.eval(), without.eval()
    assert torch.equal(model.forward_features(images), without.forward_features(images))


def test_dropout_stands_at_these_places_and_no_other():
    model = create_model(SMALL, dropout_rate=0.5, attention_dropout_rate=0.25)
    rates = {name: module.p for name, module in model.named_modules() if isinstance(module, nn.Dropout)}
    per_block = ("attn.drop", "mlp.drop")
    assert rates == {"pos_drop": 0.5} | {f"blocks.{i}.{place}": 0.5 for i in range(2) for place in per_block}
    assert [block.attn.attend.dropout_rate for block in model.blocks] == [0.25, 0.25]


def test_gap_reads_every_token_and_token_reads_the_first():
    images = torch.randn(2, 3, 16, 16)
    for classifier, pool in (("gap", lambda tokens: tokens.mean(dim=1)), ("token", lambda tokens: tokens[:, 0])):
        model = create_model(SMALL, 5, classifier=classifier, representation_size=24).eval()
        nn.init.normal_(model.head.weight)
        pooled = pool(model.forward_features(images))
        want = model.head(torch.tanh(model.pre_logits.fc(pooled)))
        torch.testing.assert_close(model(images), want)
