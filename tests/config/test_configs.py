"""configs.py: rows of architectures."""

import pytest

import configs
from configs import MODELS


def test_an_unknown_key_in_an_architecture_is_an_error():
    with pytest.raises(KeyError):
        configs.architecture(16, 32, 64, 4, 2, droput_rate=0.1)
    with pytest.raises((KeyError, AttributeError)):
        MODELS["ViT-B_16"].droput_rate = 0.1


# Published sizes: width, MLP, heads, layers (papers: table 1 of 2010.11929, table 2 of 2106.10270).
@pytest.mark.parametrize(("letter", "sizes"), [
    ("Ti", (192, 768, 3, 12)), ("S", (384, 1536, 6, 12)), ("B", (768, 3072, 12, 12)), ("L", (1024, 4096, 16, 24)),
    ("H", (1280, 5120, 16, 32))])
def test_architectures_have_the_published_sizes(letter, sizes):
    rows = {name: row for name, row in MODELS.items() if f"ViT-{letter}_" in name}
    assert rows
    for name, row in rows.items():
        assert (row.hidden_size, row.mlp_dim, row.num_heads, row.num_layers) == sizes, name
        stride = row.patch_size if row.resnet_layers is None else row.patch_size * 4 * 2 ** max(len(row.resnet_layers) - 1, 0)
        # The name gives the stride, except for this one, which Google named by other rules.
        assert name == "R-ViT-Ti_16" or stride == int(name.partition("_")[2].partition("-")[0]), name
