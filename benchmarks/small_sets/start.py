"""Give every program the same start weights, and check that their features agree to 1e-4.

python -m benchmarks.small_sets.start --start FILE --model "FLAGS OF OURS" --out FOLDER
"""

import argparse
import shlex
import sys
from pathlib import Path

from configs import MODELS
from utils.config import parse
from utils.config.flags import SIZES

TIMM_MODEL = "vit_tiny_patch16_224"         # its sizes are set one by one
TIMM_FILE = "start.safetensors"
TOLERANCE = 1e-4


def row_of(flags: str) -> dict:
    """Return the row of the model that these flags of train.py describe, with "name" and "img_size" (the side).

    Raises ValueError for other flags, and for images that are not square.
    """
    typed = parse(shlex.split(flags))
    if typed.get("model_type") not in MODELS:
        raise ValueError(f"--model {flags}: expected --model_type and the name of a model")
    row = MODELS[typed["model_type"]].copy_and_resolve_references()
    row.update({name: typed[name] for name in SIZES if name in typed})
    side = typed.get("img_size", row.img_size)
    if not isinstance(side, int):
        raise ValueError(f"--model {flags}: the images must be square")
    return row.to_dict() | {"name": typed["model_type"], "img_size": side}


def timm_kwargs(row: dict) -> dict:
    """Return the arguments of timm's create_model that follow the name TIMM_MODEL."""
    return {"img_size": row["img_size"], "patch_size": row["patch_size"], "embed_dim": row["hidden_size"],
            "depth": row["num_layers"], "num_heads": row["num_heads"], "mlp_ratio": row["mlp_dim"] / row["hidden_size"],
            "act_layer": {"tanh": "gelu_tanh", "erf": "gelu"}[row["gelu"]]}


def our_model(file: Path, row: dict, classes: int):
    """Return our model with the weights of the file and a head of zeros."""
    from models import create_model

    return create_model(row["name"], classes, row["img_size"], file, "zero", **{name: row[name] for name in SIZES})


def timm_model(file: Path, row: dict, classes: int):
    """Return the model that timm's train.py makes from --pretrained --pretrained-path."""
    import timm

    return timm.create_model(TIMM_MODEL, pretrained=True, num_classes=classes,
                             pretrained_cfg_overlay={"file": str(file), "num_classes": -1}, **timm_kwargs(row))


def transformers_model(file: Path, row: dict, classes: int):
    """Return ViTForImageClassification with our weights; it draws its own head. Raises ValueError if names do not match."""
    from transformers import ViTConfig, ViTForImageClassification

    from models.checkpoints.conversions import CONVERSIONS, transformers_rows
    from models.checkpoints.key_maps import TRANSFORMERS_BLOCKS

    ours = our_model(file, row, classes)
    model = ViTForImageClassification(ViTConfig(
        image_size=row["img_size"], patch_size=row["patch_size"], hidden_size=row["hidden_size"], num_labels=classes,
        num_hidden_layers=row["num_layers"], num_attention_heads=row["num_heads"], intermediate_size=row["mlp_dim"],
        hidden_act={"tanh": "gelu_pytorch_tanh", "erf": "gelu"}[row["gelu"]], layer_norm_eps=row["norm_eps"],
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0))
    state = {}
    for name, sources, conversion in transformers_rows(ours, TRANSFORMERS_BLOCKS["attention.q_proj"]):
        for part, source in enumerate(sources):
            if not source.startswith("classifier."):
                state[f"vit.{source}"] = CONVERSIONS[conversion].to_file(ours.get_parameter(name).detach(), ours, part)
    missing, unexpected = model.load_state_dict(state, strict=False)
    if unexpected or {name for name in missing if not name.startswith("classifier.")}:
        raise ValueError(f"names of parameters that transformers and this program do not share: {[*missing, *unexpected]}")
    return model


def differences(file: Path, row: dict, folder: Path) -> dict[str, float]:
    """Write the start for timm into `folder`. Return the largest difference of each program's features from ours, by program."""
    import torch

    from models import save_timm

    ours = our_model(file, row, 2).eval()
    save_timm(ours, folder / TIMM_FILE)
    torch.manual_seed(0)
    images = torch.rand(4, row["in_channels"], row["img_size"], row["img_size"]) * 2 - 1
    with torch.inference_mode():
        expected = ours.forward_features(images)[:, 0]
        theirs = {"timm": timm_model(folder / TIMM_FILE, row, 2).eval().forward_features(images)[:, 0],
                  "transformers": transformers_model(file, row, 2).eval().vit(images).last_hidden_state[:, 0]}
    return {name: (features - expected).abs().max().item() for name, features in theirs.items()}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--start", type=Path, required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(argv)
    try:
        found = differences(options.start, row_of(options.model), options.out)
    except ValueError as error:                                     # ModelError is one
        sys.exit(f"--start: {error}")
    print("features of the start weights, largest difference from ours: " + ", ".join(f"{name} {value:.1e}" for name, value in
                                                                              found.items()))
    if not max(found.values()) < TOLERANCE:
        sys.exit(f"--start: the features differ by more than {TOLERANCE}, so that the comparison would not be fair")


if __name__ == "__main__":
    main()
