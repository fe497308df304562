"""Against timm, where it is installed: our state dict in timm's models gives the same features and logits.

timm computes GELU in the exact form, and standardises the weights of hybrids with 1e-8 inside the root, where Google
adds 1e-5 outside: the weights are drawn large enough for the two to agree.
"""

import pytest
import torch
from torch import nn

from configs import architecture
from models import create_model, save_npz
from models.resnet import StdConv2d

timm = pytest.importorskip("timm")

TINY = {"embed_dim": 48, "num_heads": 3, "depth": 2, "num_classes": 7}
VIT = [
    # our row, image size, timm's options
    (architecture(16, 48, 192, 3, 2, img_size=64), (64, 64), {}),
    (architecture(16, 48, 192, 3, 2, img_size=64), (32, 80), {}),
    (architecture(16, 48, 192, 3, 2, img_size=64, classifier="gap"), (64, 64),
     {"global_pool": "avg", "class_token": False, "fc_norm": False}),
]
HYBRIDS = [
    # our row, image size, timm's model
    (architecture(8, 48, 192, 3, 2, resnet_layers=()), 64, "vit_tiny_r_s16_p8_224"),
    (architecture(1, 48, 192, 3, 2, resnet_layers=(2, 2, 2, 2)), 64, "vit_small_r26_s32_224"),
    (architecture(1, 48, 192, 3, 2, resnet_layers=(3, 4, 9)), 48, "vit_base_r50_s16_384"),
]


def random_model(row, img_size):
    """No zeros and no ones left, so that every parameter counts."""
    torch.manual_seed(0)
    model = create_model(row, 7, img_size, gelu="erf").eval()
    for module in model.modules():
        if isinstance(module, (nn.LayerNorm, nn.GroupNorm)):
            nn.init.normal_(module.weight, mean=1, std=0.2)
            nn.init.normal_(module.bias, std=0.1)
        elif isinstance(module, StdConv2d):
            nn.init.normal_(module.weight, std=100)
        elif isinstance(module, (nn.Linear, nn.Conv2d)) and module.bias is not None:
            nn.init.normal_(module.bias, std=0.1)
    nn.init.normal_(model.head.weight, std=0.2)
    nn.init.normal_(model.pos_embed, std=0.2)
    if model.num_prefix_tokens:
        nn.init.normal_(model.cls_token, std=0.5)
    return model


def timm_s_names(model) -> dict[str, torch.Tensor]:
    """timm has no module `stem` where the ResNet has no stages."""
    alone = "patch_embed.backbone.stem." if model.config.resnet_layers == () else " "
    return {name.replace(alone, "patch_embed.backbone."): value for name, value in model.state_dict().items()}


@torch.inference_mode()
def agree(ours, theirs, tolerance: float) -> None:
    theirs = theirs.eval()
    theirs.load_state_dict(timm_s_names(ours))                    # strict: the names are the same
    images = torch.randn(2, 3, *ours.img_size)
    features = (ours.forward_features(images) - theirs.forward_features(images)).abs().max()
    logits = (ours(images) - theirs(images)).abs().max()
    print(f"largest difference of a feature {features:.1e}, of a logit {logits:.1e}")
    assert max(features, logits) < tolerance


@pytest.mark.parametrize("row, img_size, options", VIT, ids=["square", "non_square", "gap"])
def test_transformer(row, img_size, options):
    ours = random_model(row, img_size)
    agree(ours, timm.models.VisionTransformer(img_size=img_size, patch_size=16, **TINY, **options), 2e-5)


@pytest.mark.parametrize("row, img_size, name", HYBRIDS, ids=[name for *_, name in HYBRIDS])
def test_hybrid(row, img_size, name):
    ours = random_model(row, img_size)
    agree(ours, timm.create_model(name, img_size=img_size, **TINY), 3e-4)


@pytest.mark.parametrize("row, img_size", [(VIT[0][0], 64), (HYBRIDS[2][0], 48)], ids=["transformer", "hybrid"])
@torch.inference_mode()
def test_timm_reads_what_save_npz_writes(tmp_path, row, img_size):
    """timm's own reader of Google's files is a second opinion on the axes of every kernel."""
    ours = random_model(row, img_size)
    save_npz(ours, tmp_path / "x.npz")
    if row.resnet_layers is None:
        theirs = timm.models.VisionTransformer(img_size=img_size, patch_size=16, **TINY).eval()
    else:
        theirs = timm.create_model("vit_base_r50_s16_384", img_size=img_size, **TINY).eval()
    theirs.load_pretrained(str(tmp_path / "x.npz"))
    images = torch.randn(2, 3, img_size, img_size)
    assert (ours(images) - theirs(images)).abs().max() < 1e-4
