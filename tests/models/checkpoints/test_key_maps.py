"""The tables of names, compared with the layouts of the published files."""

import pytest
import reference
import torch

from configs import MODELS
from models import create_model
from models.checkpoints import key_maps, timm_names, towers
from models.checkpoints.conversions import CONVERSIONS, google_rows, transformers_rows
from models.checkpoints.key_maps import GOOGLE_BLOCKS, TRANSFORMERS_BLOCKS
from models.families import FAMILIES

PRE_LINEN = GOOGLE_BLOCKS["MultiHeadDotProductAttention_1"]
LAYOUTS = reference.published_layouts()
TABLES = [value for name, value in vars(key_maps).items()
          if name.endswith(("_EMBEDDING", "_HEAD", "GOOGLE_STEM", "GOOGLE_UNIT", "GOOGLE_PROJECTION"))]


def our_model(published: str):
    """Return the model of a published layout, with pre_logits, on the meta device."""
    with torch.device("meta"):
        if published == "ViT-S_16-gap-norep":
            return create_model("ViT-S_16", classifier="gap", representation_size=384)
        row = MODELS[published.replace("+", "-")]
        return create_model(row, representation_size=row.hidden_size)


@pytest.mark.parametrize("published", LAYOUTS)
def test_names_and_shapes_of_every_published_model(published):
    """Our export would have exactly the published file's arrays and shapes."""
    model = our_model(published)
    ours = {}
    for name, sources, conversion in google_rows(model, PRE_LINEN):
        for part, source in enumerate(sources):
            assert source not in ours
            ours[source] = tuple(CONVERSIONS[conversion].to_file(model.get_parameter(name), model, part).shape)
    assert ours == LAYOUTS[published]


def test_layouts_of_all_google_models_exist():
    models = {name.replace("+", "-") for name in LAYOUTS}
    google = {name for name in MODELS if not name.startswith(("DeiT", "CaiT", "MAE")) and name not in FAMILIES}
    assert models == (google - {"ViT-Nano_2"}) | {"ViT-S_16-gap-norep"}


@pytest.mark.parametrize("name", [name for name in MODELS if name not in FAMILIES])
def test_every_parameter_of_a_supported_kind_has_a_name(name):
    """Google's layout lacks CaiT's, the second token's and MAE's norm; transformers lacks CaiT, MAE's norm and the ResNets."""
    with torch.device("meta"):
        model = create_model(name)
    parameters = set(model.state_dict())
    cait_and_mae = ("blocks_token_only", "gamma", "proj_l", "proj_w", "fc_norm")
    for rows, foreign in (
            (google_rows(model, PRE_LINEN), (*cait_and_mae, "dist_token", "head_dist")),
            (transformers_rows(model, TRANSFORMERS_BLOCKS["attention.attention.query"]), (*cait_and_mae, "backbone"))):
        named = [ours for ours, _, _ in rows]
        assert len(named) == len(set(named)) and set(named) <= parameters
        assert all(any(word in ours for word in foreign) for ours in parameters - set(named))
        sources = [source for _, row_sources, _ in rows for source in row_sources]
        assert len(sources) == len(set(sources))


@pytest.mark.parametrize("blocks, joined", [(GOOGLE_BLOCKS, "/{}/"), (TRANSFORMERS_BLOCKS, ".{}.")])
def test_a_variant_s_mark_is_only_in_its_own_names(blocks, joined):
    for mark in blocks:
        holding = [other for other, rows in blocks.items()
                   if any(joined.format(mark) in source for _, sources, _ in rows for source in sources)]
        assert holding == [mark]


def test_every_conversion_is_known_and_used():
    blocks = [*GOOGLE_BLOCKS.values(), *TRANSFORMERS_BLOCKS.values()]
    blocks += [rows for tower in towers.TOWERS for rows in (tower.outside, tower.block)] + [key_maps.GOOGLE_POOLING]
    timm = (*timm_names.QKV_SPLIT, *timm_names.QV_BIAS, *timm_names.MASKED_BIAS, *timm_names.GATE_SPLIT, *timm_names.POOL_PACKED)
    used = {conversion for table in (*TABLES, *blocks, timm) for _, _, conversion in table}
    assert used | {"fold", "patches", "patches_dense"} == set(CONVERSIONS)
