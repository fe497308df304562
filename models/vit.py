"""Vision Transformer and its ResNet hybrids, and what every family shares.

Dosovitskiy et al., "An Image is Worth 16x16 Words" (arXiv 2010.11929). As Google's vit_jax/models_vit.py: GELU in
the tanh form, LayerNorm eps 1e-6, optional tanh layer `pre_logits` before the head, `classifier` "token" or "gap"
(mean over the tokens after the last norm). Differs from it: any image size whose sides are multiples of the
stride, square or not, is taken; the head starts at zero as in its fine-tuning code.

The same class is DeiT without its second token (arXiv 2012.12877) and the encoder of MAE (He et al., "Masked
Autoencoders Are Scalable Vision Learners", arXiv 2111.06377), whose fine-tuning pools with `classifier` "patch_mean".

Shapes: B images, N tokens, D width, C classes, (h, w) grid. The state dict has timm's names.
"""

import math
from collections import OrderedDict

import torch
from torch import Tensor, nn

from .errors import ModelError
from .layers import NORM_EPS, RESIZE_RULES, Block, PatchEmbed
from .resnet import GROUPS, ResNet


class ImageTransformer(nn.Module):
    """What the families share: sizes, the cutting of images into tokens, initial values, the depth of a parameter.

    `config` is a row of configs.MODELS (any object with its attributes); img_size (height, width) in pixels.
    A family adds `build`, `forward_features` and `forward`, and the number of rows that its position table has
    before those of the patches (`num_prefix_tokens`).
    """

    num_prefix_tokens: int
    sigmoid_layers: tuple[int, ...] = ()       # layers of sigmoid attention, counted from 1: use_sigmoid_attention sets them

    def __init__(self, config, num_classes: int, img_size: tuple[int, int]):
        super().__init__()
        check(config, num_classes, img_size)
        self.config, self.num_classes, self.img_size = config, num_classes, tuple(img_size)
        self.grid = tuple(side // stride(config) for side in img_size)                     # (h, w)
        backbone, channels = None, config.in_channels
        if config.resnet_layers is not None:
            backbone = ResNet(tuple(config.resnet_layers), config.resnet_width, config.in_channels)
            channels = backbone.out_channels
        self.patch_embed = PatchEmbed(config.patch_size, channels, config.hidden_size, backbone)
        self.build()
        if not self.patch_embed.proj.weight.is_meta:         # there are no values to set, and it would take as long as to build
            self.initialise()

    def build(self) -> None:
        """Makes the layers behind the patch embedding."""
        raise NotImplementedError

    def initialise(self) -> None:
        """Google's initial values for Google's rows, Meta's for the others (told by the form of GELU); zero heads."""
        if self.config.gelu == "tanh":
            self._initialise_as_google()
        else:
            self._initialise_as_meta()
        for name in self.head_names():
            nn.init.zeros_(self.get_parameter(name))

    def _initialise_as_google(self) -> None:
        """Glorot for dense layers, LeCun for convolutions, 0.02 for positions, zero for the cls token."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=math.prod(module.weight.shape[1:]) ** -0.5)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for block in self.blocks:
            # q, k and v are three layers in Google's code: Glorot's fan-out is D, not 3D.
            for part in block.attn.qkv.weight.chunk(3):
                nn.init.xavier_uniform_(part)
            for layer in (block.mlp.fc1, block.mlp.fc2):
                nn.init.normal_(layer.bias, std=1e-6)
        nn.init.normal_(self.pos_embed, std=0.02)

    def _initialise_as_meta(self) -> None:
        """0.02 for dense layers, tokens and positions, zero biases; PyTorch's own values for convolutions."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Conv2d):
                module.reset_parameters()
        for name, parameter in self.named_parameters(recurse=False):
            assert name in ("cls_token", "dist_token", "pos_embed"), name
            nn.init.trunc_normal_(parameter, std=0.02)

    @property
    def query_rows(self) -> slice:
        """The queries of the last attention that the head reads: the first tokens, or all patches for a mean over them."""
        if self.config.classifier == "token":
            return slice(0, self.num_prefix_tokens)
        return slice(self.num_prefix_tokens, None)

    @property
    def depth(self) -> int:
        """`depth_of` the last layers: the number of layers and one."""
        return self.config.num_layers + self.config.class_layers + 1

    def depth_of(self, name: str) -> int:
        """Where a parameter stands: 0 the embeddings, 1 .. the layers in the order they run, `depth` norm and heads."""
        part, *rest = name.split(".")
        if part == "blocks":
            return int(rest[0]) + 1
        if part == "blocks_token_only":
            return self.config.num_layers + int(rest[0]) + 1
        if part in ("norm", "fc_norm", "pre_logits", "head", "head_dist"):
            return self.depth
        assert part in ("patch_embed", "cls_token", "dist_token", "pos_embed"), name
        return 0

    def head_names(self) -> list[str]:
        """The parameters that belong to the classes: what a new task starts anew."""
        return [name for name, _ in self.named_parameters() if name.startswith(("head.", "head_dist."))]

    def embed_patches(self, images: Tensor) -> Tensor:
        """(B, channels, height, width) -> (B, h * w, D). Raises ValueError for images of another shape."""
        if images.dim() != 4 or tuple(images.shape[-2:]) != self.img_size or images.shape[1] != self.config.in_channels:
            raise ValueError(
                f"images of shape {tuple(images.shape)}: this model takes (B, {self.config.in_channels}, "
                f"{self.img_size[0]}, {self.img_size[1]}); build it with another img_size for another size")
        return self.patch_embed(images)


class VisionTransformer(ImageTransformer):
    """The plain encoder: one stack of blocks over all tokens, and one head."""

    prefix_tokens: tuple[str, ...] = ("cls_token",)      # parameters that stand before the patches, in this order

    def build(self) -> None:
        config, dim = self.config, self.config.hidden_size
        if config.classifier == "gap":
            self.prefix_tokens = ()
        for name in self.prefix_tokens:
            self.register_parameter(name, nn.Parameter(torch.zeros(1, 1, dim)))
        self.num_prefix_tokens = len(self.prefix_tokens)
        self.pos_embed = nn.Parameter(torch.zeros(1, self.num_prefix_tokens + math.prod(self.grid), dim))
        self.pos_drop = nn.Dropout(config.dropout_rate)
        self.blocks = nn.Sequential(*[
            Block(dim, config.num_heads, config.mlp_dim, config.gelu, config.dropout_rate, config.attention_dropout_rate,
                  config.drop_path_rate * i / max(config.num_layers - 1, 1))
            for i in range(config.num_layers)])
        if config.classifier == "patch_mean":
            self.norm, self.fc_norm = nn.Identity(), nn.LayerNorm(dim, eps=NORM_EPS)
        else:
            self.norm = nn.LayerNorm(dim, eps=NORM_EPS)
        if config.representation_size:
            fc = nn.Linear(dim, config.representation_size)
            self.pre_logits = nn.Sequential(OrderedDict(fc=fc, act=nn.Tanh()))
        self.head = nn.Linear(config.representation_size or dim, self.num_classes)

    def forward_features(self, images: Tensor) -> Tensor:
        """(B, channels, height, width) -> (B, N, D), the tokens after the last norm ("patch_mean": after the last block)"""
        x = self.embed_patches(images)
        if self.prefix_tokens:
            x = torch.cat([getattr(self, name).expand(len(x), -1, -1) for name in self.prefix_tokens] + [x], dim=1)
        x = self.pos_drop(x + self.pos_embed)
        return self.norm(self.blocks(x))

    def forward(self, images: Tensor) -> Tensor:
        """(B, channels, height, width), normalised with config.mean and config.std -> logits (B, C)"""
        x = self.forward_features(images)
        if self.config.classifier == "token":
            x = x[:, 0]
        elif self.config.classifier == "gap":
            x = x.mean(dim=1)
        else:
            x = self.fc_norm(x[:, self.num_prefix_tokens:].mean(dim=1))
        if self.config.representation_size:
            x = self.pre_logits(x)
        return self.head(x)


def stride(config) -> int:
    """Pixels from one token to the next."""
    if config.resnet_layers is None:
        return config.patch_size
    return config.patch_size * 4 * 2 ** max(len(config.resnet_layers) - 1, 0)


def check(config, num_classes: int, img_size: tuple[int, int]) -> None:
    """Raises ModelError unless the keys of the row are possible and fit each other, the class count and the image size."""
    _check_values(config)
    _check_family(config)
    if num_classes < 1:
        raise ModelError(f"num_classes {num_classes}: must be 1 or more")
    if len(img_size) != 2 or not all(isinstance(side, int) for side in img_size):
        raise ModelError(f"img_size {img_size}: must be a side or (height, width), in whole pixels")
    step = stride(config)
    for side in img_size:
        if side < step or side % step:
            near = sorted({max(side // step, 1) * step, (side // step + 1) * step})
            raise ModelError(
                f"img_size {img_size[0]}x{img_size[1]}: {side} is not a multiple of {step}, the model's patch stride; "
                f"take {' or '.join(map(str, near))}")


def _check_values(config) -> None:
    """Each key by itself."""
    for name in ("patch_size", "hidden_size", "mlp_dim", "num_heads", "num_layers", "in_channels"):
        if config[name] < 1:
            raise ModelError(f"{name} {config[name]}: must be 1 or more")
    for name in ("representation_size", "class_layers"):
        if config[name] < 0:
            raise ModelError(f"{name} {config[name]}: must be 0 or more")
    for name in ("dropout_rate", "attention_dropout_rate", "drop_path_rate"):
        if not 0 <= config[name] < 1:
            raise ModelError(f"{name} {config[name]}: must be at least 0 and below 1")
    for name, values in {"classifier": ("token", "gap", "patch_mean"), "gelu": ("tanh", "erf"),
                         "position_resize": tuple(RESIZE_RULES)}.items():
        if config[name] not in values:
            *most, last = map(repr, values)
            raise ModelError(f"{name} {config[name]!r}: must be {', '.join(most)} or {last}")
    if config.hidden_size % config.num_heads:
        raise ModelError(f"hidden_size {config.hidden_size} is not divisible by num_heads {config.num_heads}")
    if config.resnet_layers is not None:
        stages = config.resnet_layers
        if not isinstance(stages, (tuple, list)) or not all(isinstance(units, int) and units > 0 for units in stages):
            raise ModelError(f"resnet_layers {stages}: must be None, or the number of units of every stage, such as (3, 4, 9)")
        if config.resnet_width < 1 or config.resnet_width % GROUPS:
            raise ModelError(f"resnet_width {config.resnet_width}: must be a multiple of {GROUPS}, the groups of its norms")


def _check_family(config) -> None:
    """Keys that belong to one family, beside those of another."""
    if config.class_layers and config.distilled:
        raise ModelError("distilled is DeiT's and class_layers CaiT's: a row has one of them")
    for name, family in (("class_layers", "CaiT"), ("distilled", "a distilled DeiT")):
        if not config[name]:
            continue
        if config.classifier != "token":
            raise ModelError(f"classifier {config.classifier!r}: {family} ({name}) reads its tokens, it must be 'token'")
        if config.representation_size:
            raise ModelError(f"representation_size {config.representation_size}: {family} ({name}) has no pre_logits, must be 0")
        if config.resnet_layers is not None:
            raise ModelError(f"resnet_layers {tuple(config.resnet_layers)}: {family} ({name}) has no ResNet, must be None")
    if config.classifier == "patch_mean" and config.representation_size:
        raise ModelError(f"representation_size {config.representation_size}: classifier 'patch_mean' has no pre_logits, "
                         "must be 0")
    if config.class_layers and not 0 < config.layer_scale < math.inf:
        raise ModelError(f"layer_scale {config.layer_scale}: CaiT (class_layers) multiplies its branches by it, "
                         "must be above 0, such as 1e-5")
    if config.layer_scale and not config.class_layers:
        raise ModelError(f"layer_scale {config.layer_scale}: acts in CaiT (class_layers) alone, must be 0")
