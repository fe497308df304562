"""Finds published checkpoints by name in ./checkpoint, and downloads the missing ones into it.

Google's files (google-research/vision_transformer, README) are at https://storage.googleapis.com/vit_models, those of DeiT,
DeiT III, CaiT, MAE and DINOv2 (facebookresearch/deit, /mae and /dinov2, READMEs) at https://dl.fbaipublicfiles.com, all others on
the Hugging Face hub (hub.py). MODEL_ZOO.md lists them.

    VIT_CHECKPOINT_URL, VIT_META_URL    other servers with the same files (mirrors)
    VIT_CHECKPOINT_DIR                  another folder than ./checkpoint
"""

import csv
import os
import re
import urllib.parse
from pathlib import Path

from models.errors import WeightsError
from models.families import unbuilt

from . import hub
from .described import WEIGHTS, is_weights_folder, weights_in
from .download import check_reachable, download

GOOGLE, META = "https://storage.googleapis.com/vit_models", "https://dl.fbaipublicfiles.com"

VIT_2020 = ["ViT-B_16", "ViT-B_32", "ViT-L_16", "ViT-L_32", "ViT-B_8", "R50+ViT-B_16"]
VIT_GSAM = ["ViT-S_32", "ViT-S_16", "ViT-B_32", "ViT-B_16"]
PUBLISHED = {
    "imagenet21k": [*VIT_2020, "ViT-H_14", "R26+ViT-B_32", "R50+ViT-L_32"],
    "imagenet21k+imagenet2012": [*VIT_2020, "ViT-B_16-224", "ViT-L_16-224"],
    "sam": ["ViT-B_16", "ViT-B_32", "ViT-L_16", "ViT-L_32", "ViT-S_16"],
    # No list of this folder is public: issue 223 there mentions ViT-B_16.npz, the README mentions names with the ending.
    "gsam": [*VIT_GSAM, *[f"{name}-gap-norep" for name in VIT_GSAM]],
}
# AugReg has over 50,000 files; their names contain the settings of their training. A size without settings means the file that
# Google's code recommends for it, according to the table in the same folder.
AUGREG_SIZE = re.compile(r"Ti_16|S_32|S_16|B_32|B_16|B_8|L_16|R_Ti_16|R26_S_32|R50_L_32")
AUGREG = re.compile(rf"({AUGREG_SIZE.pattern})-[a-zA-Z0-9._-]+")
AUGREG_TABLE = "augreg/index.csv"

# Meta's files, by folder and name: (file on its server, first digits of its checksum if they are public). DeiT has them in its
# names, which may be typed without them; MAE in its README.
META_FILES = {
    "deit": {file: (f"deit/{file}.pth", f"sha256:{file.rpartition('-')[2]}") for file in (
        "deit_tiny_patch16_224-a1311bcf",
        "deit_small_patch16_224-cd65a155",
        "deit_base_patch16_224-b5f2ef4d",
        "deit_base_patch16_384-8de9b5d1",
        "deit_tiny_distilled_patch16_224-b40b3cf7",
        "deit_small_distilled_patch16_224-649709d9",
        "deit_base_distilled_patch16_224-df68dfff",
        "deit_base_distilled_patch16_384-d0272ac0",
    )},
    "cait": {name: (f"deit/{name}.pth", "") for name in (
        "XXS24_224", "XXS24_384", "XXS36_224", "XXS36_384", "XS24_384", "S24_224", "S24_384", "S36_384", "M36_384", "M48_448")},
    "mae": {file.partition("/")[2]: (f"mae/{file}.pth", digits) for file, digits in {
        "pretrain/mae_pretrain_vit_base": "md5:8cad7c",
        "pretrain/mae_pretrain_vit_large": "md5:b8b06e",
        "pretrain/mae_pretrain_vit_huge": "md5:9bdbb0",
        "finetune/mae_finetuned_vit_base": "md5:1b25e9",
        "finetune/mae_finetuned_vit_large": "md5:51f550",
        "finetune/mae_finetuned_vit_huge": "md5:2541f2",
        "visualize/mae_visualize_vit_large": "",               # with the decoder
    }.items()},
    "deit3": {file: (f"deit/{file}.pth", "") for file in (
        "deit_3_small_224_21k", "deit_3_medium_224_21k", "deit_3_base_224_21k", "deit_3_large_224_21k", "deit_3_huge_224_21k_v1",
        "deit_3_small_384_21k", "deit_3_base_384_21k", "deit_3_large_384_21k",
        "deit_3_small_224_1k", "deit_3_medium_224_1k", "deit_3_base_224_1k", "deit_3_large_224_1k", "deit_3_huge_224_1k",
        "deit_3_small_384_1k", "deit_3_base_384_1k", "deit_3_large_384_1k")},
    "dinov2": {f"{model}{registers}_pretrain": (f"dinov2/{model}/{model}{registers}_pretrain.pth", "")
               for registers in ("", "_reg4") for model in map("dinov2_vit{}14".format, "sblg")},
}

# How the publishers resize images for evaluation, by folder (flags). Google squeezes the whole image
# (vit_jax/input_pipeline.py).
SQUEEZED = {"interpolation": "bilinear", "eval_crop": 0.0}
VIEWS = {**dict.fromkeys((*PUBLISHED, "augreg"), SQUEEZED), "deit": {"interpolation": "bicubic", "eval_crop": 0.875},
         "cait": {"interpolation": "bicubic", "eval_crop": 1.0}, "mae": {"interpolation": "bicubic", "eval_crop": 0.875},
         "deit3": {"interpolation": "bicubic", "eval_crop": 1.0}, "dinov2": {"interpolation": "bicubic", "eval_crop": 1.0}}
# The licenses of these folders: those of their repositories. timm's configurations of the same files say the same.
LICENSES = {**dict.fromkeys((*PUBLISHED, "augreg", "deit", "cait", "deit3", "dinov2"), "Apache-2.0"), "mae": "CC-BY-NC-4.0"}


def license_of(name_or_path: str | Path) -> str:
    """Return the license of a published name, or of a path that ends in its FOLDER/FILE or ORG/NAME/FILE; "" if unknown."""
    parts = Path(name_or_path).parts
    for last in (str(name_or_path), "/".join(parts[-2:]), "/".join(parts[-3:-1])):
        name = published_name(last)
        if name and name.partition("/")[0] in LICENSES:
            return LICENSES[name.partition("/")[0]]
        if name:
            return known.license if (known := hub.published_file(last)) else ""
    return ""


def page_of_file(path: str | Path) -> str:
    """Return the hub's page of the repository for a path that ends in its ORG/NAME/FILE; "" for any other path."""
    repository = "/".join(Path(path).parts[-3:-1])
    return hub.page_of(repository) if hub.repository_of(repository) == repository else ""


def published_names() -> list[str]:
    """Return the published names; for AugReg, with over 50,000 files, only those of a size without settings."""
    sizes = AUGREG_SIZE.pattern.split("|")
    own = [f"{folder}/{file}" for folder, files in (PUBLISHED | {"augreg": sizes} | META_FILES).items() for file in files]
    return [*own, *dict.fromkeys(file.place for file in hub.table() if file.model and file.place)]


def published_name(name: str) -> str | None:
    """Return the canonical form of a published name, or None for any other text.

    'ViT-B_16' -> 'imagenet21k/ViT-B_16'; a name of timm's -> its repository on the hub. The name of a model means the file that
    fine-tuning starts from. Also accepted are our spelling of a hybrid (R50-ViT-B_16 for R50+ViT-B_16), a name with the file's
    suffix, and DeiT's names without the digits.
    """
    known = hub.published_file(name)
    return _own_name(name) or (known.place or known.name if known else hub.repository_of(name))


def _own_name(name: str) -> str | None:
    """Return the canonical FOLDER/FILE of a file on Google's or Meta's server, or None."""
    folder, _, file = name.rpartition("/")
    if folder in META_FILES:
        file = file.removesuffix(".pth")
        match = [known for known in META_FILES[folder] if file in (known, re.sub("-[0-9a-f]{8}$", "", known))]
        return f"{folder}/{match[0]}" if match else None
    file = re.sub(r"^(R\d+)-(?=ViT)", r"\1+", file.removesuffix(".npz"))
    if folder == "augreg" and (AUGREG.fullmatch(file) or AUGREG_SIZE.fullmatch(file)):
        return f"augreg/{file}"
    folder = folder or "imagenet21k"
    return f"{folder}/{file}" if file in PUBLISHED.get(folder, []) else None


def published_view(path: Path) -> dict:
    """Return how the publisher resizes images for the file at a path FOLDER/FILE (flags); {} for any other file."""
    name = _own_name("/".join(path.parts[-2:]))
    view = dict(VIEWS[name.partition("/")[0]]) if name and path.parent.name in VIEWS else {}
    return view | ({"eval_crop": 0.9} if name and re.fullmatch(r"deit3/.*_224_1k", name) else {})


def published_url(name: str) -> str:
    """Return the URL of a canonical name; not of an AugReg size without settings, whose file the table names."""
    folder, _, file = name.partition("/")
    if folder in META_FILES:
        return f"{os.environ.get('VIT_META_URL', META).rstrip('/')}/{META_FILES[folder][file][0]}"
    return _google_url(f"{name}.npz") if _own_name(name) else hub.address(name)


def _google_url(file: str) -> str:
    server = os.environ.get("VIT_CHECKPOINT_URL", GOOGLE).rstrip("/")
    return f"{server}/{urllib.parse.quote(file)}"              # quotes the plus, which some servers read as a space


def require_published(text: str | Path) -> str:
    """Return the canonical form of a published name. Raises WeightsError for any other text."""
    name, tables = published_name(str(text)), PUBLISHED | META_FILES
    if name is None and Path(text).is_dir():
        raise WeightsError(f"{text}: a folder without weights: none of {', '.join(WEIGHTS)} is in it")
    _refuse_unbuilt(str(text))
    folder = str(text).partition("/")[0]
    if name is None and folder in tables and str(text).count("/") == 1:
        raise WeightsError(f"no checkpoint at {text}, and {folder} has no published file of that name: it has "
                           f"{', '.join(tables[folder])}")
    if name is None:
        raise WeightsError(
            f"no checkpoint at {text}, and it is no published name.{hub.did_you_mean(str(text))} MODEL_ZOO.md lists the names; "
            "hf-hub:ORG/NAME means any repository of the Hugging Face hub")
    return name


def _refuse_unbuilt(text: str) -> None:
    if what := unbuilt(text):
        raise WeightsError(f"{text}: it has {what}, which no model here supports")
    if (known := hub.published_file(text)) and not known.model:
        raise WeightsError(f"{text}: its architecture is not supported (MODEL_ZOO.md lists those that are)")


def find_checkpoint(name_or_path: str | Path) -> Path:
    """Return the local file for a path or a published name; download it if it is missing. Raises WeightsError.

    An existing path always wins; for a folder of timm or transformers, the result is its file of weights. A file name without a
    folder means one of imagenet21k.
    """
    if Path(name_or_path).is_file():
        return Path(name_or_path)
    if Path(name_or_path).is_dir() and is_weights_folder(name_or_path):
        return weights_in(Path(name_or_path))
    name = require_published(name_or_path)
    if not _own_name(name):
        return hub.fetch(name, _folder() / name)
    path = download(*_wanted(name))
    return download(*_wanted(name)) if path.name == Path(AUGREG_TABLE).name else path


def check_published_reachable(name: str) -> None:
    """Raise WeightsError if the file of a canonical name is missing and its server cannot be reached. Downloads nothing."""
    if _own_name(name):
        url, path, _ = _wanted(name)
        check_reachable(url, path)
    else:
        _refuse_unbuilt(name)
        hub.check_access(name, _folder() / name)


def _folder() -> Path:
    return Path(os.environ.get("VIT_CHECKPOINT_DIR", "checkpoint"))


def _wanted(name: str) -> tuple[str, Path, str]:
    """Return (URL, path, checksum) of a canonical name; of AugReg's table for a size without settings, until that is here."""
    checkpoints = _folder()
    folder, _, file = name.partition("/")
    if folder in META_FILES:
        return published_url(name), checkpoints / f"{name}.pth", META_FILES[folder][file][1]
    if folder == "augreg" and AUGREG_SIZE.fullmatch(file):
        table = checkpoints / AUGREG_TABLE
        if not table.is_file():
            return _google_url(AUGREG_TABLE), table, ""
        name = f"augreg/{recommended_file(table, file)}"
    # A file put there by hand, as for ViT-pytorch's scripts, can only be the one that the name without a folder means.
    by_hand, own_place = checkpoints / f"{file}.npz", checkpoints / f"{name}.npz"
    is_by_hand = folder == "imagenet21k" and by_hand.is_file() and not own_place.is_file()
    return published_url(name), by_hand if is_by_hand else own_place, ""


def recommended_file(table: Path, size: str) -> str:
    """Return the name, without suffix, of the best file of a size such as 'S_16' that was trained on ImageNet-21k.

    Best is the highest accuracy on held-out images, as in Google's code (vit_jax/train.py): of the rows of that size with
    ds == i21k, the one with the largest final_val. Raises WeightsError if the table has no such row.
    """
    best, name = -1.0, None
    try:
        with open(table, newline="", encoding="utf-8") as stream:
            for row in csv.DictReader(stream):
                if row["ds"] == "i21k" and row["filename"].partition("-")[0] == size and float(row["final_val"] or -1) > best:
                    best, name = float(row["final_val"]), row["filename"]
    except (OSError, KeyError, ValueError, TypeError, AttributeError, csv.Error) as error:
        raise WeightsError(f"{table}: not AugReg's table, or damaged ({type(error).__name__}: {error}); delete it to download it "
                           f"again, or use the full name of a file (MODEL_ZOO.md lists some)") from error
    if name is None or not AUGREG.fullmatch(name):
        raise WeightsError(f"{table}: lists no file of {size} trained on i21k; delete it to download it again, or use the full "
                           "name of a file (MODEL_ZOO.md lists some)")
    return name
