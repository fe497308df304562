"""Pooling by attention, compared with PyTorch's attention layer."""

import torch
from torch import nn

from configs import architecture
from models import create_model, record_attention
from models.pooling import AttentionPool


def test_pooling_is_the_published_formula():
    """y = attention of the probe, then y + mlp(norm(y)), as SigLIP's code computes it with torch.nn.MultiheadAttention."""
    torch.manual_seed(0)
    pool, tokens = AttentionPool(16, 4, 40, "tanh", nn.LayerNorm(16, eps=1e-6)).double(), torch.randn(3, 7, 16).double()
    for parameter in pool.parameters():
        nn.init.normal_(parameter, std=0.5)
    attention = nn.MultiheadAttention(16, 4, batch_first=True).double()
    attention.load_state_dict({
        "in_proj_weight": torch.cat([pool.q.weight, pool.kv.weight]), "in_proj_bias": torch.cat([pool.q.bias, pool.kv.bias]),
        "out_proj.weight": pool.proj.weight, "out_proj.bias": pool.proj.bias})
    y, weights = attention(pool.latent.expand(3, -1, -1), tokens, tokens, average_attn_weights=False)
    want = y + pool.mlp(pool.norm(y))
    torch.testing.assert_close(pool(tokens), want[:, 0], atol=1e-12, rtol=0)
    with record_attention(pool) as maps:
        pool(tokens)
    torch.testing.assert_close(maps[0], weights, atol=1e-12, rtol=0)                # (B, H, 1, N)


def test_heads_and_width_of_the_pooling_default_to_those_of_the_blocks():
    row = {"class_token": False, "classifier": "attention", "img_size": 8}
    plain, own = (create_model(architecture(4, 16, 24, 2, 1, **row, **more), 3) for more in (
        {}, {"pool_heads": 4, "pool_mlp_dim": 40}))
    assert (plain.attn_pool.num_heads, plain.attn_pool.mlp.fc1.out_features) == (2, 24)
    assert (own.attn_pool.num_heads, own.attn_pool.mlp.fc1.out_features) == (4, 40)
    images = torch.randn(2, 3, 8, 8)
    with own.recording() as maps:
        own(images)
    assert [tuple(each.shape) for each in maps] == [(2, 2, 4, 4), (2, 4, 1, 4)]
