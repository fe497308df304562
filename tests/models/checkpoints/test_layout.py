"""The arrays of a file under the names of one key map."""

import torch
from originals import KINDS, arrays_of, in_memory

from models import create_model


def layout_of(case: str):
    return in_memory(arrays_of(case, create_model(KINDS[case].row, 3))).layout


def test_shapes_are_those_of_our_parameters():
    layout = layout_of("eva02")
    assert layout.sizes("blocks.0.attn.qkv.weight") == (144, 48) and layout.sizes("blocks.0.mlp.fc1.bias") == (128,)
    assert layout.sizes("reg_token") == () and layout.table() == 17
    pe = layout_of("pe")
    assert pe.sizes("cls_token") == (1, 1, 48) and pe.sizes("pos_embed") == (1, 17, 48)
    assert pe.read_view("cls_token").shape == (1, 1, 48)


def test_a_folded_table_has_one_row_less():
    layout = layout_of("dinov2_reg")
    assert layout.shape("pos_embed") == (1, 17, 48) and layout.table() == 16
    with torch.device("meta"):
        rows = layout.rows(create_model(KINDS["dinov2_reg"].row, 3))
    assert [row.sources for row in rows if row.conversion == "fold"] == [("cls_token", "pos_embed")]


def test_arrays_are_reported_with_the_file_s_names():
    layout = layout_of("deit3")
    assert layout.called("blocks.0.ls1.gamma") == "blocks.0.gamma_1" and layout.called("norm.weight") == "norm.weight"
    assert layout_of("tips").called("norm.weight") == "norm.weight"                   # without the prefix
    pe = layout_of("pe")
    assert "attn_pool.qkv.weight" in pe.under("attn_pool") and len(pe.under("attn_pool")) == 11


def test_a_file_is_described_in_words():
    assert layout_of("dinov2_reg").describe() == "width 48, 1 blocks, patch 8, 4 registers, LayerScale"
    assert layout_of("dinov3").describe() == "width 48, 1 blocks, patch 8, 4 registers, LayerScale, no positions"
    assert layout_of("pe").describe() == "width 48, 1 blocks, patch 8, a norm before the blocks, pooling by attention"
