"""The peers: their models, and the loop that their users write: torch's SGD and clip_grad_norm_, autocast.

Each model is built as its package builds it by default, with the sizes of our row (configs.MODELS). Peers get float images that
are already on the device, while ours converts its uint8 images.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .conditions import AUTOCAST, arrange, images

# timm's names of models that are no plain ViT.
NAMED = {"R50-ViT-B_16": "vit_base_r50_s16_224", "R50-ViT-L_32": "vit_large_r50_s32_224",
         "DINOv2-B_14": "vit_base_patch14_dinov2", "DINOv3-B_16": "vit_base_patch16_dinov3",
         "EVA02-B_14": "eva02_base_patch14_224", "SigLIP-B_16": "vit_base_patch16_siglip_224"}
CLASSES = 1000


def timm(row: dict) -> nn.Module:
    if row["name"] in NAMED:
        from timm import create_model
        return create_model(NAMED[row["name"]], img_size=row["size"], num_classes=CLASSES)
    from timm.models.vision_transformer import VisionTransformer
    return VisionTransformer(img_size=row["size"], patch_size=row["patch_size"], embed_dim=row["hidden_size"],
                             depth=row["num_layers"], num_heads=row["num_heads"],
                             mlp_ratio=row["mlp_dim"] / row["hidden_size"], num_classes=CLASSES)


def transformers(row: dict) -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    class Logits(ViTForImageClassification):
        def forward(self, pixels: Tensor) -> Tensor:
            return super().forward(pixels).logits

    return Logits(ViTConfig(image_size=row["size"], patch_size=row["patch_size"], hidden_size=row["hidden_size"],
                            num_hidden_layers=row["num_layers"], num_attention_heads=row["num_heads"],
                            intermediate_size=row["mlp_dim"], num_labels=CLASSES, attn_implementation="sdpa"))


def torchvision(row: dict) -> nn.Module:
    from torchvision.models import VisionTransformer
    return VisionTransformer(image_size=row["size"], patch_size=row["patch_size"], num_layers=row["num_layers"],
                             num_heads=row["num_heads"], hidden_dim=row["hidden_size"], mlp_dim=row["mlp_dim"],
                             num_classes=CLASSES)


def vit_pytorch(row: dict) -> nn.Module:
    from vit_pytorch import ViT
    return ViT(image_size=row["size"], patch_size=row["patch_size"], num_classes=CLASSES, dim=row["hidden_size"],
               depth=row["num_layers"], heads=row["num_heads"], mlp_dim=row["mlp_dim"],
               dim_head=row["hidden_size"] // row["num_heads"])


class _Layer(nn.Module):
    """A layer as the ViT-pytorch scripts formulate it: separate q, k and v, attention weights in memory, dropout 0.1."""

    def __init__(self, width: int, heads: int, mlp_dim: int):
        super().__init__()
        self.heads, self.norm1, self.norm2 = heads, nn.LayerNorm(width, 1e-6), nn.LayerNorm(width, 1e-6)
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))
        self.mlp = nn.Sequential(nn.Linear(width, mlp_dim), nn.GELU(), nn.Dropout(0.1), nn.Linear(mlp_dim, width),
                                 nn.Dropout(0.1))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        q, k, v = (part(y).unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (self.q, self.k, self.v))
        weights = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(dim=-1)
        x = x + self.out((weights @ v).transpose(1, 2).flatten(2))        # in their default settings attention has no dropout
        return x + self.mlp(self.norm2(x))


class _Formulation(nn.Module):
    def __init__(self, row: dict):
        super().__init__()
        width, side = row["hidden_size"], row["patch_size"]
        self.patches = nn.Conv2d(3, width, side, side)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.positions = nn.Parameter(torch.zeros(1, (row["size"] // side) ** 2 + 1, width))
        self.drop = nn.Dropout(0.1)
        self.layers = nn.Sequential(*[_Layer(width, row["num_heads"], row["mlp_dim"]) for _ in range(row["num_layers"])])
        self.norm, self.head = nn.LayerNorm(width, 1e-6), nn.Linear(width, CLASSES)

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.patches(pixels).flatten(2).transpose(1, 2)
        x = self.drop(torch.cat([self.token.expand(len(x), -1, -1), x], dim=1) + self.positions)
        return self.head(self.norm(self.layers(x))[:, 0])


MODELS = {"timm": timm, "transformers": transformers, "torchvision": torchvision, "vit-pytorch": vit_pytorch,
          "ViT-pytorch formulation": _Formulation}


def of(name: str, row: dict) -> bool:
    """Return whether the peer has this model. Only timm has models that are no plain ViT."""
    return name == "timm" or row["name"] not in NAMED


def _model(peer: str, row: dict, device: str, compiled: bool) -> nn.Module:
    model = MODELS[peer](row).to(device)
    return torch.compile(model) if compiled else model


def _autocast(device: str, precision: str) -> torch.autocast:
    return torch.autocast(device, AUTOCAST.get(precision, torch.bfloat16), enabled=precision in AUTOCAST)


def training_step(peer: str, row: dict, batch: int, precision: str, device: str, threads: int,
                  compiled: bool) -> Callable[[], None]:
    """Return a step: forward, backward, clip, SGD with momentum."""
    arrange(device, threads, precision)
    model = _model(peer, row, device, compiled).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    scaler = torch.amp.GradScaler(device, enabled=precision == "fp16")
    pixels = (images(batch, row["size"]).float() / 127.5 - 1).to(device)
    labels = torch.arange(batch, device=device) % CLASSES

    def step() -> None:
        with _autocast(device, precision):
            loss = F.cross_entropy(model(pixels), labels)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)

    return step


def evaluation(peer: str, row: dict, batch: int, precision: str, device: str, threads: int,
               compiled: bool) -> Callable[[], None]:
    """Return a step: the forward pass of one batch, without gradients."""
    arrange(device, threads, precision)
    model = _model(peer, row, device, compiled).eval()
    pixels = (images(batch, row["size"]).float() / 127.5 - 1).to(device)

    def step() -> None:
        with torch.inference_mode(), _autocast(device, precision):
            model(pixels)

    return step
