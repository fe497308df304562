"""The base class of all families of models: sizes, initial values, the order of the layers, and the checks of a row of
configs.MODELS.

Shapes: B images, N tokens, D width, C classes, H heads, (h, w) grid.
"""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager

from torch import Tensor, nn

from .attention import record_attention
from .errors import ModelError
from .families import architecture
from .kinds import SWITCH, TEXT, Kind, is_whole, number, numbers, one_of, whole
from .layers import RESIZE_RULES, PatchEmbed, norm_of
from .resnet import GROUPS, STYLES, ResNet
from .rope import ROPES
from .sigmoid_attention import edit_attention, record_patch_logits

TOKENS = ("cls_token", "dist_token", "reg_token")


class ImageTransformer(nn.Module):
    """A transformer that classifies images of one size: `model(images)` gives logits (B, C).

    `config` is a row of configs.MODELS (any object with its attributes); img_size is (height, width) in pixels.
    A family defines:
      num_prefix_tokens                     the number of tokens before those of the patches
      build()                               creates the layers after the patch embedding
      embed(images)                         (B, channels, height, width) -> (B, N, D), the tokens that enter the first block
      forward_blocks(tokens, first=0)       (B, N, D) -> (B, N, D): blocks `first` (from 0) to the end, and the last norm
      forward_head(features)                (B, N, D), the output of forward_features -> logits (B, C)
    """

    num_prefix_tokens: int
    predictor: Callable | None = None          # classifies image files for `predict`; set by load_model
    sigmoid_layers: tuple[int, ...] = ()       # layers with sigmoid attention, counted from 1; set by use_sigmoid_attention

    def __init__(self, config, num_classes: int, img_size: tuple[int, int]):
        super().__init__()
        check(config, num_classes, img_size)
        self.config, self.num_classes, self.img_size = config, num_classes, tuple(img_size)
        self.grid = tuple(side // stride(config) for side in img_size)                     # (h, w)
        backbone, channels = None, config.in_channels
        if config.resnet_layers is not None:
            backbone = ResNet(tuple(config.resnet_layers), config.resnet_width, config.in_channels, config.resnet_style)
            channels = backbone.out_channels
        self.patch_embed = PatchEmbed(config.patch_size, channels, config.hidden_size, backbone, config.patch_bias,
                                      config.patch_norm, norm_of(config))
        self.build()
        if not self.patch_embed.proj.weight.is_meta:         # a model without memory has no values to set
            self.initialize()

    # --------------------------------------------------------------------------------------------- forward passes

    def forward_features(self, images: Tensor) -> Tensor:
        """(B, channels, height, width) -> (B, N, D), the tokens after the last block and the last norm, if there is one"""
        return self.forward_blocks(self.embed(images))

    def forward(self, images: Tensor) -> Tensor:
        """(B, channels, height, width), normalized with config.mean and config.std -> logits (B, C)"""
        return self.forward_head(self.forward_features(images))

    def forward_to(self, images: Tensor, block: int) -> Tensor:
        """(B, channels, height, width) -> (B, N, D), the tokens that enter `block` (from 0)"""
        return self.blocks[:block](self.embed(images))

    def forward_from(self, tokens: Tensor, block: int) -> Tensor:
        """(B, N, D), the tokens that enter `block` (from 0) -> logits (B, C)

        forward_from(forward_to(images, block), block) is the whole model, so the layers before an edited one need to run only
        once.
        """
        return self.forward_head(self.forward_blocks(tokens, block))

    def predict(self, images: object, top_k: int = 1) -> object:
        """Classify a path or a PIL image: `label`, `probability` and `top`, the top_k (label, probability); a list for a list.

        Only for a model of load_model, which knows how its images are read and resized. The numbers are those of predict.py.
        """
        if self.predictor is None:
            raise ModelError("predict: this model does not know how its images are read and what its classes are called: "
                             "load it with models.load_model, from a file with a head (a run's checkpoint also needs its "
                             "settings)")
        return self.predictor(self, images, top_k)

    def embed_patches(self, images: Tensor) -> Tensor:
        """(B, channels, height, width) -> (B, h * w, D). Raises ValueError for images of another shape."""
        if images.dim() != 4 or tuple(images.shape[-2:]) != self.img_size or images.shape[1] != self.config.in_channels:
            raise ValueError(
                f"images of shape {tuple(images.shape)}: expected (B, {self.config.in_channels}, "
                f"{self.img_size[0]}, {self.img_size[1]}); build the model with another img_size for other sizes")
        return self.patch_embed(images)

    # -------------------------------------------------------------------------------------------------- attention

    @property
    def query_rows(self) -> slice | list[int]:
        """The rows (queries) of the last block's attention that matter for the head.

        The class tokens for a head that reads them, all patches for a mean over them, the cls token and the patches if the head
        reads both, all tokens for pooling by attention. Registers are included only for pooling by attention.
        """
        classifier, first = self.config.classifier, self.num_prefix_tokens
        if classifier == "token":
            return slice(0, 1 + self.config.distilled)
        if classifier == "token_mean" and first > 1:
            return [0, *range(first, first + math.prod(self.grid))]
        return slice(0 if classifier in ("token_mean", "attention") else first, None)

    @property
    def attention_layers(self) -> int:
        """The number of layers with attention, as recording() counts them. Pooling by attention is the last."""
        return self.config.num_layers + self.config.class_layers + (self.config.classifier == "attention")

    @property
    def num_prefix_positions(self) -> int:
        """The number of rows that the position table has before those of the patches."""
        return self.num_prefix_tokens if self.config.positions == "all" else 0

    def recording(self, first: int = 0, differentiable: bool = False) -> AbstractContextManager[list[Tensor]]:
        """Record the attention of the layers from `first` (counted from 0): maps[i] is (B, H, N, N) of layer first + i.

        With pooling by attention, its map (B, H, 1, N) is the last. Inside the context, run the whole model, or forward_from
        with a block up to `first`.
        """
        last = [*getattr(self, "blocks_token_only", ()), *([self.attn_pool] if hasattr(self, "attn_pool") else [])]
        layers = nn.ModuleList([*self.blocks, *last][first:])
        return record_attention(layers, differentiable)

    def recording_patch_logits(self) -> AbstractContextManager[list[Tensor]]:
        return record_patch_logits(self)

    def editing(self, values: Tensor, edited: Tensor) -> AbstractContextManager[None]:
        return edit_attention(self, values, edited)

    # -------------------------------------------------------------------------------------- parameters and layers

    @property
    def depth(self) -> int:
        """The `layer_index` of the last norm and the heads: the number of layers plus one."""
        return self.config.num_layers + self.config.class_layers + 1

    def layer_index(self, name: str) -> int:
        """Return the layer of a parameter: 0 for embeddings, 1, 2, ... in the order of the layers, `depth` for norm and heads."""
        part, *rest = name.split(".")
        if part == "blocks":
            return int(rest[0]) + 1
        if part == "blocks_token_only":
            return self.config.num_layers + int(rest[0]) + 1
        if part in ("norm", "fc_norm", "attn_pool", "pre_logits", "head", "head_dist"):
            return self.depth
        assert part in ("patch_embed", "norm_pre", *TOKENS, "pos_embed"), name
        return 0

    def head_names(self) -> list[str]:
        """Return the names of the parameters of the heads, which a new task initializes again."""
        return [name for name, _ in self.named_parameters() if name.startswith(("head.", "head_dist."))]

    def initialize(self) -> None:
        """Set Google's initial values for Google's rows (GELU in the tanh form) and Meta's for all others; heads are zero."""
        initialize = self._initialize_as_google if self.config.gelu == "tanh" else self._initialize_as_meta
        initialize()
        for name in self.head_names():
            nn.init.zeros_(self.get_parameter(name))

    def _initialize_as_google(self) -> None:
        """Glorot for dense layers, LeCun for convolutions, 0.02 for positions, zero for the cls token."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
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
                if layer.bias is not None:
                    nn.init.normal_(layer.bias, std=1e-6)
        if self.pos_embed is not None:
            nn.init.normal_(self.pos_embed, std=0.02)
        if hasattr(self, "reg_token"):
            nn.init.normal_(self.reg_token, std=0.02)
        if hasattr(self, "attn_pool"):
            nn.init.xavier_uniform_(self.attn_pool.latent[0])

    def _initialize_as_meta(self) -> None:
        """0.02 for dense layers, tokens and positions, zero biases; PyTorch's own values for convolutions."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Conv2d):
                module.reset_parameters()
        for name, parameter in self.named_parameters(recurse=False):
            assert name in (*TOKENS, "pos_embed"), name
            nn.init.trunc_normal_(parameter, std=0.02)
        if hasattr(self, "attn_pool"):
            nn.init.trunc_normal_(self.attn_pool.latent, std=0.02)


def stride(config) -> int:
    """Return the distance in pixels from one patch to the next."""
    if config.resnet_layers is None:
        return config.patch_size
    return config.patch_size * 4 * 2 ** max(len(config.resnet_layers) - 1, 0)


def has_class_token(config) -> bool:
    return config.class_token and config.classifier != "gap"


def check(config, num_classes: int, img_size: tuple[int, int]) -> None:
    """Raise ModelError if a value of the row is invalid or does not fit the others, or if num_classes or img_size is invalid."""
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
                f"img_size {img_size[0]}x{img_size[1]}: {side} is not a multiple of {step}, the model's patch stride. "
                f"Use {' or '.join(map(str, near))}")


SIDE = 1 << 14           # pixels
SIZE, COUNT = whole(1, 1 << 20, "1 or more, and at most 1048576"), whole(1, 1000, "1 or more, and at most 1000")
RATE = number(0, below=1, words="at least 0 and below 1")
PIXELS = Kind("a side or (height, width), in whole pixels", lambda value: all(is_whole(side) and 1 <= side <= SIDE for side in (
    value if isinstance(value, (tuple, list)) and len(value) == 2 else (value,))))
UNITS = Kind("None, or the number of units of every stage, such as (3, 4, 9)", lambda value: value is None or (
    isinstance(value, (tuple, list)) and len(value) <= 10 and all(is_whole(units) and 0 < units <= 1000 for units in value)))
MEAN, STD = (-1e6, "a number for each channel"), (0, "a number above 0 for each channel")
# The keys of a row, and the kind of value of each.
ROW = {
    "patch_size": SIZE, "hidden_size": SIZE, "mlp_dim": SIZE, "num_heads": SIZE, "num_layers": COUNT,
    "in_channels": whole(1, 1000, "1 or more"), "dropout_rate": RATE, "attention_dropout_rate": RATE, "drop_path_rate": RATE,
    "classifier": one_of("token", "gap", "patch_mean", "mean", "token_mean", "attention"),
    "representation_size": whole(0, 1 << 20, "0 or more"), "pool_heads": whole(0, 1 << 20, "0 or more"),
    "pool_mlp_dim": whole(0, 1 << 20, "0 or more"), "class_token": SWITCH, "registers": whole(0, 1000, "0 or more"),
    "positions": one_of("all", "patches", "none"), "rope": one_of("", *ROPES), "rope_grid": whole(0, 1 << 14, "0 or more"),
    "mlp": one_of("plain", "swiglu"), "norm": one_of("layer", "rms"), "pre_norm": SWITCH,
    "patch_norm": one_of("none", "after", "around"), "final_norm": SWITCH, "attention_norm": SWITCH, "mlp_norm": SWITCH,
    "qk_norm": SWITCH, "qkv_bias": one_of("all", "qv", "none"), "proj_bias": SWITCH, "mlp_bias": SWITCH, "patch_bias": SWITCH,
    "distilled": SWITCH,
    "class_layers": whole(0, 1000, "0 or more"), "layer_scale": number(-1e6, 1e6), "resnet_layers": UNITS,
    "resnet_width": SIZE, "resnet_style": one_of(*STYLES), "sigmoid_attention": TEXT, "gelu": one_of("tanh", "erf", "quick"),
    "norm_eps": number(math.ulp(0.0), below=1, words="above 0 and below 1, such as 1e-6"),
    "position_resize": Kind("a rule of models/layers.py RESIZE_RULES, such as 'bicubic'",
                            lambda value: isinstance(value, str) and value in RESIZE_RULES),
    "interpolation": one_of("bilinear", "bicubic"), "eval_crop": number(0, 1, words="at least 0 and at most 1"),
    "img_size": PIXELS, "mean": numbers(1, *MEAN), "std": numbers(1, *STD), "channel_mean": numbers(0, *MEAN),
    "channel_std": numbers(0, *STD),
}


def _check_values(config) -> None:
    for key, kind in ROW.items():
        if fault := kind.fault(key, config[key]):
            raise ModelError(fault)
    if config.hidden_size % config.num_heads:
        raise ModelError(f"hidden_size {config.hidden_size} is not divisible by num_heads {config.num_heads}")
    if config.resnet_layers is not None and config.resnet_width % GROUPS:
        raise ModelError(f"resnet_width {config.resnet_width}: must be a multiple of {GROUPS}, the groups of its norms")


def _check_family(config) -> None:
    """Raise ModelError if the row mixes keys of different families."""
    if config.class_layers and config.distilled:
        raise ModelError("distilled and class_layers: the first makes a DeiT, the second a CaiT. Set only one of them")
    for name, family in (("class_layers", "CaiT"), ("distilled", "a distilled DeiT")):
        for key, needed, why in (("classifier", "token", "reads its tokens"), ("representation_size", 0, "has no pre_logits"),
                                 ("resnet_layers", None, "has no ResNet")):
            if config[name] and config[key] != needed:
                raise ModelError(f"{key} {config[key]!r}: {family} ({name}) {why}, must be {needed!r}")
    if config.classifier in ("patch_mean", "attention", "token_mean") and config.representation_size:
        raise ModelError(f"representation_size {config.representation_size}: classifier {config.classifier!r} has no pre_logits, "
                         "must be 0")
    if config.class_layers and not 0 < config.layer_scale < math.inf:
        raise ModelError(f"layer_scale {config.layer_scale}: CaiT (class_layers) multiplies its branches by it, "
                         "must be above 0, such as 1e-5")
    _check_parts(config)


# The keys for families of 2022 and later: CaiT and the distilled DeiT support only their default values.
PARTS = ("pool_heads", "pool_mlp_dim", "class_token", "registers", "positions", "rope", "rope_grid", "mlp", "norm", "pre_norm",
         "patch_norm", "final_norm", "attention_norm", "mlp_norm", "qk_norm", "qkv_bias", "proj_bias", "mlp_bias", "patch_bias")
PLAIN = architecture(patch_size=1, hidden_size=1, mlp_dim=1, num_heads=1, num_layers=1)


def _check_parts(config) -> None:
    """Raise ModelError if the parts of an encoder do not fit each other."""
    if config.class_layers or config.distilled:
        family = "CaiT (class_layers)" if config.class_layers else "a distilled DeiT (distilled)"
        for key in PARTS:
            if config[key] != PLAIN[key]:
                raise ModelError(f"{key} {config[key]!r}: {family} has no such part, must be {PLAIN[key]!r}")
    if config.resnet_layers is not None and (config.patch_norm != "none" or not config.patch_bias):
        raise ModelError(f"patch_norm {config.patch_norm!r}, patch_bias {config.patch_bias}: the patch embedding of a hybrid has "
                         "a bias and no norm; must be 'none' and True")
    if config.layer_scale < 0:
        raise ModelError(f"layer_scale {config.layer_scale}: must be above 0, or 0 for a model without LayerScale")
    if config.classifier in ("token", "token_mean") and not config.class_token:
        raise ModelError(f"classifier {config.classifier!r}: the model has no cls token (class_token). Use 'mean'")
    if config.positions == "none" and not config.rope:
        raise ModelError("positions 'none': without rotary positions (rope) the model would not know where a patch is")
    head_width = config.hidden_size // config.num_heads
    if config.rope and head_width % 4:
        raise ModelError(f"rope {config.rope!r}: rotates pairs of numbers along two axes, but the width of a head, {head_width} "
                         "(hidden_size / num_heads), is not divisible by 4")
    if (config.rope in ("eva", "pe")) != (config.rope_grid > 0):
        raise ModelError(f"rope_grid {config.rope_grid}: must be the number of patches per side in pre-training for rope 'eva' "
                         "and 'pe', and 0 for others")
    if config.pool_heads and config.hidden_size % config.pool_heads:
        raise ModelError(f"pool_heads {config.pool_heads}: hidden_size {config.hidden_size} is not divisible by it")
