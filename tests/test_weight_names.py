"""The tables of names against the layouts of the published files."""

import pytest
import reference
import torch

from configs import MODELS, architecture
from models import create_model, pretrained, weight_names
from models.weight_names import GOOGLE_BLOCKS

PRE_LINEN, LINEN = GOOGLE_BLOCKS["MultiHeadDotProductAttention_1"], GOOGLE_BLOCKS["MultiHeadDotProductAttention_0"]
LAYOUTS = reference.published_layouts()
TABLES = [value for name, value in vars(weight_names).items() if name.startswith("GOOGLE_") and isinstance(value, tuple)]


def our_model(published: str):
    """The model of a published layout, with pre_logits, without memory."""
    with torch.device("meta"):
        if published == "ViT-S_16-gap-norep":
            return create_model("ViT-S_16", classifier="gap", representation_size=384)
        row = MODELS[published.replace("+", "-")]
        return create_model(row, representation_size=row.hidden_size)


@pytest.mark.parametrize("published", LAYOUTS)
def test_names_and_shapes_of_every_published_model(published):
    """The file that we would write has exactly the published file's arrays, in its shapes."""
    model = our_model(published)
    ours = {}
    for name, sources, rule in pretrained._expand(PRE_LINEN, model):
        for part, source in enumerate(sources):
            assert source not in ours
            ours[source] = tuple(pretrained._TO_FILE[rule](model.get_parameter(name), model, part).shape)
    assert ours == LAYOUTS[published]


def test_layouts_of_all_our_models_are_there():
    models = {name.replace("+", "-") for name in LAYOUTS}
    assert models == (set(MODELS) - {"ViT-Nano_2"}) | {"ViT-S_16-gap-norep"}


def test_the_linen_dialect_counts_the_modules_of_each_kind():
    """Flax's linen: LayerNorm_0, LayerNorm_1, MlpBlock_0; the older names count all modules of a block together."""
    renamed = [(ours, tuple(source.replace("LayerNorm_2", "LayerNorm_1").replace("Attention_1", "Attention_0")
                            .replace("MlpBlock_3", "MlpBlock_0") for source in sources), rule)
               for ours, sources, rule in PRE_LINEN]
    assert list(LINEN) == renamed


@pytest.mark.parametrize("mark, rows", GOOGLE_BLOCKS.items())
def test_a_dialect_s_mark_is_in_its_own_names_alone(mark, rows):
    def holds(rows):
        return any(f"/{mark}/" in source for _, sources, _ in rows for source in sources)

    assert holds(rows) and not any(holds(other) for other_mark, other in GOOGLE_BLOCKS.items() if other_mark != mark)


def test_every_rule_is_known_and_every_rule_is_used():
    used = {rule for table in (*TABLES, PRE_LINEN, LINEN) for _, _, rule in table}
    assert used == set(pretrained._TO_FILE) == set(pretrained._FROM_FILE) | {"position"}


@pytest.mark.parametrize("rule", pretrained._FROM_FILE)
def test_rules_are_inverse(rule):
    """model -> file -> model gives the same numbers, and file -> model has the parameter's shape."""
    model = create_model(architecture(2, 12, 20, 3, 1, img_size=4), 5)
    shape, parts = {
        "copy": ((7,), 1), "vector": ((7,), 1), "dense": ((5, 7), 1), "conv": ((6, 3, 2, 4), 1),
        "qkv": ((36, 12), 3), "qkv_bias": ((36,), 3), "out": ((12, 12), 1)}[rule]
    value = torch.randn(shape)
    arrays = [pretrained._TO_FILE[rule](value, model, part) for part in range(parts)]
    assert torch.equal(pretrained._FROM_FILE[rule](arrays), value)
