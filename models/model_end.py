"""The end of a model, run again and again on what comes into it: the blocks before it need to run once.

`model`: any of ours (blocks, pos_drop, pos_embed, embed_patches). N tokens, D width.
"""

import copy

import torch
from torch import Tensor, nn


def tokens_before(model: nn.Module, first: int, images: Tensor) -> Tensor:
    """-> (B, N, D), what comes into block `first` (from 0) when the model looks at images (B, channels, height, width)"""
    kept, before = [], model.blocks[first - 1] if first else model.pos_drop
    with torch.inference_mode():
        handle = before.register_forward_hook(lambda module, inputs, output: kept.append(output))
        model(images)
        handle.remove()
    return kept[0]


def cut(model: nn.Module, first: int) -> nn.Module:
    """The model from block `first` on, with its parameters: takes the tokens (1, N, D) that come into that block."""
    rest, given = copy.copy(model), []
    rest._modules = dict(model._modules)               # or the blocks would be taken from both
    rest.blocks = nn.Sequential(*model.blocks[first:])

    def embed(tokens: Tensor) -> Tensor:
        given.append(tokens)
        return model.pos_embed[:, model.num_prefix_tokens:]       # of the right shape; the tokens take its place below

    rest.embed_patches = embed
    rest.blocks.register_forward_pre_hook(lambda module, inputs: given.pop())
    return rest
