"""models/families.py: the rows of its families, compared with the published sizes."""

import pytest

from configs import MODELS
from models.families import FAMILIES

# Parameters in millions without the head, at the row's own image size: those of the weights that timm publishes.
MILLIONS = {
    "DINOv2-S_14": 22.1, "DINOv2-B_14": 86.6, "DINOv2-L_14": 304.4, "DINOv2-g_14": 1136.5, "DINOv2-S_14-reg": 22.1,
    "DINOv2-B_14-reg": 86.6, "DINOv2-L_14-reg": 304.4, "DINOv2-g_14-reg": 1136.5, "DINOv3-S_16": 21.6, "DINOv3-B_16": 85.6,
    "DINOv3-L_16": 303.1, "DINOv3-S+_16": 28.7, "DINOv3-H+_16": 840.5, "DINOv3-7B_16": 6716.0, "DINOv3-S_16-qkvb": 21.6,
    "DINOv3-B_16-qkvb": 85.7, "DINOv3-L_16-qkvb": 303.1, "DINOv3-S+_16-qkvb": 28.7, "DINOv3-H+_16-qkvb": 840.6,
    "EUPE-Ti_16": 5.5, "EUPE-S_16": 21.6, "EUPE-B_16": 85.7, "LingBot-S_16": 21.6, "LingBot-B_16": 85.7, "LingBot-L_16": 303.1,
    "LingBot-g_16": 1134.5, "TIPSv2-B_14": 86.3, "TIPSv2-L_14": 304.0, "TIPSv2-SO400M_14": 413.4, "TIPSv2-g_14": 1135.9,
    "SigLIP-B_16": 92.9, "SigLIP-L_16": 316.0, "SigLIP-SO400M_16": 427.9, "SigLIP-gopt_16": 1163.2, "SigLIP-SO400M_14": 427.7,
    "SigLIP-B_32": 94.6, "CLIP-B_32": 87.5, "CLIP-B_16": 85.8, "CLIP-L_14": 303.2, "CLIP-H_14": 630.8, "CLIP-bigG_14": 1842.8,
    "OpenCLIP-B_32": 87.5, "OpenCLIP-B_16": 85.8, "OpenCLIP-B+_16": 116.6, "OpenCLIP-L_14": 303.2, "OpenCLIP-H_14": 630.8,
    "OpenCLIP-g_14": 1011.2, "OpenCLIP-bigG_14": 1842.8, "TinyCLIP-8M_16": 8.1, "TinyCLIP-39M_16": 38.3,
    "TinyCLIP-40M_32": 39.4, "TinyCLIP-61M_32": 61.1, "EVA-g_14": 1011.1, "EVA-g_14-clip": 1011.1, "EVA02-Ti_14": 5.5,
    "EVA02-S_14": 21.6, "EVA02-B_14": 85.8, "EVA02-L_14": 303.3, "EVA02-B_16-clip": 85.9, "EVA02-L_14-clip": 303.3,
    "PE-core-B_16": 92.9, "PE-core-Ti_16": 6.0, "PE-core-S_16": 23.6, "PE-core-L_14": 316.1, "PE-core-G_14": 1880.1,
    "PE-spatial-Ti_16": 5.7, "PE-spatial-S_16": 22.0, "PE-spatial-B_16": 86.4, "PE-spatial-L_14": 304.0,
    "PE-spatial-G_14": 1851.9, "PE-lang-L_14": 291.4, "PE-lang-G_14": 1740.9, "DeiT3-S_16": 21.7, "DeiT3-M_16": 38.3,
    "DeiT3-B_16": 85.8, "DeiT3-L_16": 303.3, "DeiT3-H_14": 630.8, "AIMv2-L_14": 309.2, "AIMv2-H_14": 680.9, "AIMv2-1B_14": 1235.0,
    "AIMv2-3B_14": 2720.7, "IJEPA-H_14": 630.8, "IJEPA-H_16": 631.7, "IJEPA-g_16": 1011.4, "BEiT3-B_16": 85.9,
    "BEiT3-L_16": 303.5, "InternViT-300M_14": 304.0, "C-RADIOv3-B_16": 86.5, "C-RADIOv3-L_16": 304.2, "C-RADIOv3-H_16": 632.0,
    "C-RADIOv3-g_16": 1136.0, "C-RADIOv4-SO400M_16": 413.5, "C-RADIOv4-H_16": 632.0, "ViT-Wee_16-reg1": 13.2,
    "ViT-Little_16-reg1": 22.2, "ViT-M_16-reg1": 38.4, "ViT-Betwixt_16-reg1": 59.8, "ViT-Little_16-reg4": 22.2,
    "ViT-M_16-reg4": 38.4, "ViT-MediumD_16-reg4": 63.6, "ViT-Betwixt_16-reg4": 59.8, "ViT-M_16-rope-reg1": 38.2,
    "ViT-B_16-rope-reg1": 85.7, "ViT-MediumD_16-rope-reg1": 63.4, "ViT-Betwixt_16-rope-reg4": 59.6, "ViT-SO150M_16-reg4": 133.2,
    "ViT-SO150M2_16-reg1": 135.2, "ViT-M_16-gap": 38.3,
}


def dense(inputs: int, outputs: int, bias: bool = True) -> int:
    return inputs * outputs + bias * outputs


def parameters(row) -> int:
    """Count the parameters without the head, only from the keys of the row."""
    width, hidden, norm = row.hidden_size, row.mlp_dim, row.hidden_size * (1 if row.norm == "rms" else 2)
    gated = row.mlp == "swiglu"
    block = 2 * norm + 3 * width * width + {"all": 3, "qv": 2, "none": 0}[row.qkv_bias] * width
    block += dense(width, width, row.proj_bias)
    block += dense(width, hidden * (1 + gated), row.mlp_bias) + dense(hidden, width, row.mlp_bias)
    block += row.attention_norm * norm + row.mlp_norm * 2 * hidden + 2 * width * bool(row.layer_scale)
    prefix, patches = row.class_token + row.registers, (row.img_size // row.patch_size) ** 2
    positions = {"all": prefix + patches, "patches": patches, "none": 0}[row.positions]
    total = dense(3 * row.patch_size ** 2, width, row.patch_bias) + (prefix + positions) * width + row.num_layers * block
    total += row.pre_norm * norm + (row.patch_norm == "after") * norm + row.final_norm * norm
    if row.classifier == "attention":
        pool = row.pool_mlp_dim or hidden
        total += width + dense(width, width) * 2 + dense(width, 2 * width) + norm + dense(width, pool) + dense(pool, width)
    return total


@pytest.mark.parametrize("name", FAMILIES)
def test_rows_have_the_published_sizes(name):
    row = MODELS[name]
    assert f"{parameters(row) / 1e6:.1f}" == f"{MILLIONS[name]:.1f}"
    assert row.hidden_size % row.num_heads == 0 == row.img_size % row.patch_size
    assert row.rope_grid == {"": 0, "dinov3": 0, "eva": 16, "pe": row.img_size // row.patch_size}[row.rope]


def test_a_row_is_named_after_its_family_size_and_patch():
    assert set(FAMILIES) == set(MILLIONS)
    for name, row in FAMILIES.items():
        assert int(name.partition("_")[2].partition("-")[0]) == row.patch_size, name
