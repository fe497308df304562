"""Compares the names of a file's arrays with those of a model's parameters, and says what to do if they do not fit."""

import dataclasses
import re

from models.base import ImageTransformer, has_class_token
from models.errors import WeightsError

from .conversions import Row
from .layout import Layout, abbreviate
from .layouts import TIMM_ROW
from .opened import OpenedCheckpoint
from .zip_archive import shown

POOL = "attn_pool"
QKV_BIAS = re.compile(r"blocks\.\d+\.attn\.(q_bias|v_bias|qkv\.bias)")


@dataclasses.dataclass
class LoadReport:
    """What happened to every parameter of the model and every entry of the file.

    used, resized and fresh have our names of parameters; left_out and unused have the file's names.
    """

    path: str
    used: list[str] = dataclasses.field(default_factory=list)
    resized: dict[str, str] = dataclasses.field(default_factory=dict)     # name: "14x14 -> 24x24"
    fresh: list[str] = dataclasses.field(default_factory=list)            # newly initialized
    left_out: list[str] = dataclasses.field(default_factory=list)         # every entry of the file that was not used
    unused: list[str] = dataclasses.field(default_factory=list)           # weights among them, except those of a replaced head
    replaces_head: bool = False                                           # whether the file has a head, and it was not used
    notes: list[str] = dataclasses.field(default_factory=list)
    classes: list[str] = dataclasses.field(default_factory=list)          # the class names, if the file has them

    def __str__(self) -> str:
        parts = [f"{len(self.used)} arrays from {self.path}"]
        parts += [f"{name} resized {how}" for name, how in self.resized.items()]
        if self.fresh:
            parts.append(f"new: {', '.join(_layers(self.fresh))}")
        parts += ["the file's head is not used"] * self.replaces_head
        if self.unused:
            parts.append(f"unused in the file: {abbreviate(_layers(self.unused))}")
        return "; ".join(parts + self.notes)


def _layers(names: list[str]) -> list[str]:
    """Return the layers of parameters, once each: 'head' for 'head.weight' and 'head/bias'; all of POOL is one layer."""
    layers = (POOL if name.startswith(f"{POOL}.") else re.split(r"[./](?=[^./]+$)", name)[0] for name in names)
    return list(dict.fromkeys(layers))


def fresh_parameters(layout: Layout, model: ImageTransformer, head: str) -> list[str]:
    """Return our names of the parameters that a new task initializes.

    The heads; the norm after the mean and the pooling by attention if the file has none; and the last norm if the file has a norm
    after the mean in its place.
    """
    if head == "keep":
        return []
    missing = tuple(f"{part}." for part in ("fc_norm", POOL) if not layout.under(part))
    missing += ("norm.",) * (layout.has("fc_norm.weight") and not layout.under("norm"))
    return sorted([*model.head_names(), *(name for name in model.state_dict() if name.startswith(missing))])


def check_names(layout: Layout, rows: list[Row], model: ImageTransformer, report: LoadReport, head: str) -> None:
    """Raise WeightsError if the file lacks an array, has one that the model lacks, or a kept head has other classes."""
    path, parameters = layout.file.path, set(model.state_dict())
    sources = {source for row in rows for source in row.sources}
    nameless = parameters - {row.parameter for row in rows} - set(report.fresh)
    missing = (sources - layout.all) | nameless
    if missing:
        raise WeightsError(f"{path}: the model needs arrays that the file lacks: {abbreviate(missing)}; "
                           f"{advise(layout, model, report)}")
    left = layout.heads() if head == "zero" else set()
    if "fc_norm.weight" in report.fresh:
        left |= {source for kind in ("weight", "bias") for source in layout.row(f"norm.{kind}").sources}
    if head == "zero" and layout.has(f"{POOL}.latent") and f"{POOL}.latent" not in parameters:
        left |= layout.under(POOL)
        report.notes.append("its pooling by attention is not used (--classifier attention uses it)")
    if head == "zero" and layout.has("fc_norm.weight") and "fc_norm.weight" not in parameters:
        left |= layout.under("fc_norm")
        report.notes.append("the norm after its mean is not used (--classifier patch_mean uses it)")
    without_norm = ("norm",) if head == "zero" and not model.config.final_norm and layout.has("norm.weight") else ()
    for part in (*layout.unread, *without_norm):
        if not any(name.startswith(f"{part}.") for name in parameters):
            left |= layout.under(part)
    unknown = layout.all - sources - left
    if unknown and not _only_zero_biases(layout, model, unknown, report):
        raise WeightsError(f"{path}: the file has arrays that the model lacks: {abbreviate(map(layout.called, unknown))}; "
                           f"{advise(layout, model, report)}")
    if head == "keep" and layout.head_note:
        report.notes.append(layout.head_note)
    if head == "keep" and layout.outputs("head") != model.num_classes:
        raise WeightsError(f"{path}: its head has {layout.outputs('head')} classes, the model {model.num_classes}; "
                           "head='keep' needs the same number, head='zero' starts a new head")


def _only_zero_biases(layout: Layout, model: ImageTransformer, unknown: set[str], report: LoadReport) -> bool:
    """Whether all that the model lacks are query and value biases that are zero, as in Meta's DINOv3: they may be left out."""
    if model.config.qkv_bias != "none" or not all(QKV_BIAS.fullmatch(name) for name in unknown):
        return False
    masked = layout.row("blocks.0.attn.qkv.q_bias").conversion == "q_of_qkv"          # then the program ignores the keys' part
    if any(layout.read_view(name)[parts].any() for name in unknown for parts in _thirds(layout.shape(name), masked)):
        return False
    report.notes.append("biases of queries and values, all zero, are not used")
    return True


def _thirds(shape: tuple[int, ...], masked: bool) -> list[slice]:
    """Return the parts of a packed bias that count: only those of queries and values if the program masks that of the keys."""
    third = shape[0] // 3
    return [slice(0, third), slice(2 * third, None)] if masked else [slice(None)]


def check_pooling(file: OpenedCheckpoint, config, keep: bool) -> None:
    """Raise WeightsError if the file's pooling reads other tokens than the model's.

    Pooling by attention is compared always, other pooling only to `keep` the head. Only timm's files can differ.
    """
    described, prefixed = file.file.described, has_class_token(config) or config.registers
    if file.file.run or described.own or file.layout.program_row is not TIMM_ROW:
        return
    if keep and described.pool not in ("", "token", "avg", "map"):
        raise WeightsError(f"{file.path}: its head uses timm's global_pool {shown(described.pool)}, which no model here "
                           "supports. Use a new head (--head zero), which reads the cls token or the mean (--classifier)")
    if keep and described.pool == "token" and file.layout.has("fc_norm.weight") and not file.layout.has("norm.weight"):
        raise WeightsError(f"{file.path}: its head reads the cls token after a norm (fc_norm with global_pool token), which no "
                           "model here supports. Use a new head (--head zero), which reads the cls token or the mean "
                           "(--classifier)")
    if not prefixed:
        return
    eva = config.rope or config.qkv_bias == "qv"              # timm's Eva always pools all tokens by attention
    pools = config.classifier == "attention" and file.layout.has(f"{POOL}.latent")
    before = "the cls token" if has_class_token(config) else "the registers"
    if pools and not eva and not described.pool_prefix:
        raise WeightsError(f"{file.path}: timm's pooling by attention skips {before} unless its model_args have "
                           "pool_include_prefix, but here it reads all tokens. Use a new head with --classifier token or mean")
    if keep and described.pool_prefix and described.pool == "avg" and config.classifier in ("gap", "mean", "patch_mean"):
        raise WeightsError(f"{file.path}: its head reads a mean that includes {before} (pool_include_prefix), but here the mean "
                           "is of the patches only. Use a new head (--head zero)")


def may_read_either(file: OpenedCheckpoint, config) -> bool:
    """Whether no array shows if the head reads the cls token or the mean: only timm's DINOv3 has no norm after a mean."""
    described = file.file.described
    return (file.file.run is None and not described.pool and "classifier" not in described.row and config.rope == "dinov3"
            and config.classifier in ("token", "mean") and config.class_token and file.layout.has("head.weight"))


OF_A_RUN = ("a run's checkpoint sets the architecture: omit --model_type (MODEL_TYPE), --num_heads and the other flags that "
            "describe the model")
# parameter: what to do if only the file has it, and if only the model has it
ADVICE = {
    "blocks_token_only.0.gamma_1": ("it is a CaiT: use the --model_type CaiT-... of its size",
                                    "it is not a CaiT: use another --model_type"),
    "dist_token": ("it is a distilled DeiT: use the --model_type of its size that ends in -distilled",
                   "it is not distilled: use the --model_type of its size that does not end in -distilled"),
    "fc_norm.weight": ("it pools the patches (fc_norm): use --classifier patch_mean",
                       "it pools with the cls token: use --classifier token"),
    "cls_token": ("it pools with the cls token: use --classifier token",
                  "it has no cls token: use --classifier gap"),
    "reg_token": ("it has register tokens: use the --model_type of its family",
                  "it has no register tokens: use another --model_type"),
    "pos_embed": ("it has a position table: use the --model_type of its family",
                  "it has no position table: use the --model_type of its family"),
    "blocks.0.ls1.gamma": ("it scales its branches (LayerScale): use the --model_type of its family",
                           "it does not scale its branches (LayerScale): use another --model_type"),
    "norm_pre.weight": ("it has a norm before the blocks, like CLIP and PE: use the --model_type of its family",
                        "it has no norm before the blocks: use another --model_type"),
    "attn_pool.latent": ("it pools by attention: use --classifier attention",
                         "it does not pool by attention: use another --classifier"),
}


def advise(layout: Layout, model: ImageTransformer, report: LoadReport) -> str:
    """Return what to do about a file that does not fit: by the first part that only one of the two has, or else by the sizes."""
    if layout.file.run:
        return OF_A_RUN
    if not layout.has("pos_embed") and layout.row("pos_embed").sources != ("pos_embed",):
        return "it stores no positions (big_vision's sincos2d computes them), which no model here supports"
    if model.config.classifier == "gap" and layout.has("cls_token") and report.fresh:
        return "it has a cls token, but --classifier gap is for models without one: use --classifier mean or token"
    if layout.has("fc_norm.weight") and not layout.has("cls_token") and has_class_token(model.config):
        return ("it has no cls token and a norm after the mean (fc_norm): use the --model_type of its family (with class_token "
                "False)")
    if layout.under(POOL) and not layout.has(f"{POOL}.latent"):
        return "it has only a part of its pooling by attention; write or copy it again"
    parameters = set(model.state_dict()) - set(report.fresh)
    for name, (file_has_it, model_has_it) in ADVICE.items():
        if layout.has(name) and name not in parameters:
            return file_has_it
        if name in parameters and not layout.has(name):
            return model_has_it
    return f"is --model_type right? The file has: {layout.describe()}"
