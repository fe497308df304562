"""The base class: forward passes in two parts, recording and editing by methods of the model, the order of layers."""

import copy
import pickle

import families
import filling
import pytest
import torch

from configs import META, architecture
from models import create_model, edit_attention, record_attention, record_patch_logits

TINY = {"patch_size": 4, "hidden_size": 12, "mlp_dim": 16, "num_heads": 3, "num_layers": 2}
FAMILIES = {"vit": {}, "gap": {"classifier": "gap"}, "mae": {"classifier": "patch_mean"},
            "deit": {"distilled": True, **META}, "cait": {"class_layers": 1, "layer_scale": 0.1, **META}}


def random_model(family: str, **overrides):
    return filling.random_model(architecture(**TINY | FAMILIES[family]), 3, (8, 12), std=0.5, **overrides).eval()


FAMILIES |= {name: row for name, (_, row, _) in families.LATER_FAMILIES.items()}
HOOKED = {**FAMILIES, "hybrid": {"patch_size": 1, "resnet_layers": (1,), "resnet_width": 32}, "sigmoid": {}}


@pytest.mark.filterwarnings("ignore")                      # torch.ao.quantization is deprecated, and people use it
@pytest.mark.parametrize("family", HOOKED)
@torch.no_grad()
def test_copies_state_pickles_and_quantized_layers_work(family):
    """Quantization to eight bits changes logits only slightly."""
    row = architecture(**TINY | HOOKED[family])
    model = filling.random_model(row, 3, (8, 12), std=0.2, **{"sigmoid_attention": "last"} if family == "sigmoid" else {}).eval()
    images = torch.randn(2, 3, 8, 12)
    expected = model(images)
    assert torch.equal(copy.deepcopy(model)(images), expected)
    state = pickle.loads(pickle.dumps(model.state_dict()))
    again = create_model(row, 3, (8, 12)).eval()
    again.load_state_dict(state)
    assert torch.equal(again(images), expected)
    quantized = torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, dtype=torch.qint8)
    difference = (quantized(images) - expected).abs().max()
    assert 0 < difference < 0.1 * expected.abs().max()


@pytest.mark.parametrize("family", ["mae", "cait", "dino", "pe", "mean"])
@torch.no_grad()
def test_a_compiled_model_computes_the_same(family):
    model, images = random_model(family), torch.randn(2, 3, 8, 12)
    torch.compiler.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert torch.equal(compiled(images), model(images))


@pytest.mark.parametrize("family", ["dino", "mean", "pe"])
@torch.no_grad()
def test_an_exported_graph_computes_the_same(family):
    """For any batch size."""
    model, images = random_model(family), torch.randn(3, 3, 8, 12)
    graph = torch.export.export(model, (images[:2],), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},)).module()
    for count in (1, 3):
        torch.testing.assert_close(graph(images[:count]), model(images[:count]))


@pytest.mark.parametrize("first", [0, 1, 2])
@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_a_forward_pass_in_two_parts_is_the_whole(family, first):
    """Also while recording the layers of the second part; their maps are those of the whole model."""
    model, images = random_model(family), torch.randn(2, 3, 8, 12)
    with record_attention(model) as maps:
        whole = model(images)
    tokens = model.forward_to(images, first)
    assert torch.equal(model.forward_from(tokens, first), whole)
    assert not torch.allclose(model.forward_from(tokens + 0.1 * torch.randn_like(tokens), first), whole, atol=1e-5)
    if maps[first:]:
        with model.recording(first) as end:
            model.forward_from(tokens, first)
        assert len(end) == len(maps) - first and all(torch.equal(a, b) for a, b in zip(end, maps[first:]))


@torch.no_grad()
def test_a_model_records_and_edits_itself():
    """Its methods do the same as the functions of the package."""
    model, images = random_model("deit", sigmoid_attention="last"), torch.randn(2, 3, 8, 12)
    values, edited = torch.rand(1, 2, 3), torch.rand(1, 2, 3) < 0.5
    with model.recording() as maps, model.recording_patch_logits() as logits, model.editing(values, edited):
        output = model(images)
    with record_attention(model) as want, record_patch_logits(model) as want_logits, edit_attention(model, values, edited):
        assert torch.equal(model(images), output)
    assert all(torch.equal(a, b) for a, b in zip([*maps, *logits], [*want, *want_logits], strict=True))
    assert not torch.equal(model(images), output)


@pytest.mark.parametrize("family, row, layers", [
    ("vit", {"representation_size": 8}, {"cls_token": 0, "pos_embed": 0, "patch_embed": 0, "blocks.0": 1, "blocks.1": 2,
                                         "norm": 3, "pre_logits": 3, "head": 3}),
    ("mae", {}, {"cls_token": 0, "pos_embed": 0, "patch_embed": 0, "blocks.0": 1, "blocks.1": 2, "fc_norm": 3, "head": 3}),
    ("deit", {}, {"cls_token": 0, "dist_token": 0, "pos_embed": 0, "patch_embed": 0, "blocks.0": 1, "blocks.1": 2, "norm": 3,
                  "head": 3, "head_dist": 3}),
    ("cait", {"class_layers": 2}, {"cls_token": 0, "pos_embed": 0, "patch_embed": 0, "blocks.0": 1, "blocks.1": 2,
                                   "blocks_token_only.0": 3, "blocks_token_only.1": 4, "norm": 5, "head": 5}),
    ("pe", {}, {"cls_token": 0, "reg_token": 0, "pos_embed": 0, "patch_embed": 0, "norm_pre": 0, "blocks.0": 1, "blocks.1": 2,
                "norm": 3, "attn_pool": 3, "head": 3}),
])
def test_layer_index_of_every_parameter(family, row, layers):
    """CaiT's class-attention layers come after the others. For MAE 0.75 ** (depth - index) are its code's learning rates."""
    model, found = random_model(family, **row), {}
    for name, _ in model.named_parameters():
        part, *rest = name.split(".")
        found.setdefault(f"{part}.{rest[0]}" if part.startswith("blocks") else part, set()).add(model.layer_index(name))
    assert found == {name: {index} for name, index in layers.items()} and model.depth == max(layers.values())
    heads = [f"{head}.{kind}" for head in ("head", "head_dist") if head in layers for kind in ("weight", "bias")]
    assert model.head_names() == heads
    with pytest.raises(AssertionError):
        model.layer_index("module.head.bias")
