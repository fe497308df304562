"""Against timm, where it is installed: our state dict in timm's models gives the same features and logits.

timm computes GELU in the exact form, as DeiT, CaiT and MAE; of Google's models it is asked for here. It standardizes the
weights of hybrids with 1e-8 inside the root, where Google adds 1e-5 outside: the weights are drawn large enough for
the two to agree.
"""

import pytest
import torch
from torch import nn

from configs import MODELS, architecture
from models import create_model, save_npz
from models.resnet import StdConv2d

pytestmark = pytest.mark.reference
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
PUBLISHED = {
    # our row: timm's model
    "DeiT-Ti_16": "deit_tiny_patch16_224", "DeiT-Ti_16-distilled": "deit_tiny_distilled_patch16_224",
    "DeiT-S_16": "deit_small_patch16_224", "DeiT-S_16-distilled": "deit_small_distilled_patch16_224",
    "DeiT-B_16": "deit_base_patch16_224", "DeiT-B_16-distilled": "deit_base_distilled_patch16_224",
    "CaiT-XXS24": "cait_xxs24_224", "CaiT-XXS36": "cait_xxs36_224", "CaiT-XS24": "cait_xs24_384", "CaiT-S24": "cait_s24_224",
    "CaiT-S36": "cait_s36_384", "CaiT-M36": "cait_m36_384", "CaiT-M48": "cait_m48_448",
    "MAE-B_16": "vit_base_patch16_224", "MAE-L_16": "vit_large_patch16_224", "MAE-H_14": "vit_huge_patch14_224"}


def random_model(row, img_size, **overrides):
    """No zeros and no ones left, so that every parameter counts."""
    torch.manual_seed(0)
    model = create_model(row, 7, img_size, gelu="erf", **overrides).eval()
    for module in model.modules():
        if isinstance(module, (nn.LayerNorm, nn.GroupNorm)):
            nn.init.normal_(module.weight, mean=1, std=0.2)
            nn.init.normal_(module.bias, std=0.1)
        elif isinstance(module, StdConv2d):
            nn.init.normal_(module.weight, std=100)
        elif isinstance(module, (nn.Linear, nn.Conv2d)) and module.bias is not None:
            nn.init.normal_(module.bias, std=0.1)
    for name, parameter in model.named_parameters():
        if name.startswith("head") or name == "pos_embed" or "proj_" in name:
            nn.init.normal_(parameter, std=0.2)
        elif name in ("cls_token", "dist_token") or "gamma_" in name:
            nn.init.normal_(parameter, std=0.5)
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
    assert (ours.forward_features(images) - theirs.forward_features(images)).abs().max() < tolerance
    assert (ours(images) - theirs(images)).abs().max() < tolerance


@pytest.mark.parametrize("row, img_size, options", VIT, ids=["square", "non_square", "gap"])
def test_transformer(row, img_size, options):
    ours = random_model(row, img_size)
    agree(ours, timm.models.VisionTransformer(img_size=img_size, patch_size=16, **TINY, **options), 2e-5)


@pytest.mark.parametrize("row, img_size, name", HYBRIDS, ids=[name for *_, name in HYBRIDS])
def test_hybrid(row, img_size, name):
    ours = random_model(row, img_size)
    agree(ours, timm.create_model(name, img_size=img_size, **TINY), 3e-4)


def timm_options(name: str, **more) -> dict:
    """MAE's rows are timm's plain models with mean pooling."""
    return {"global_pool": "avg"} | more if name.startswith("MAE") else more


@pytest.mark.parametrize("name", [name for name in PUBLISHED if name not in ("MAE-L_16", "MAE-H_14")])
def test_published_sizes(name):
    """Two blocks of every size, on images of 4 x 4 patches. Of MAE one: its sizes differ in width alone."""
    side = 4 * MODELS[name].patch_size
    ours = random_model(name, side, num_layers=2)
    agree(ours, timm.create_model(PUBLISHED[name], img_size=side, num_classes=7, **timm_options(name, depth=2)), 5e-5)


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
