"""The outputs of timm and transformers for small models of today's families: writes and reads tests/fixtures/families.npz.

To write it again, in the root of the project, with the environment of `bash test.sh --reference`:

    .venv-reference/bin/python tests/support/family_numbers.py

The file was written with timm 1.0.31, transformers 5.24.0 and torch 2.15.0, in float32 on a CPU. Weights are not stored: every
array is a function of its name and shape (`filled`), and so are the images. tests/fixtures/README.md describes the file.
"""

import contextlib
import copy
import functools
import inspect
import json
import math
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

FIXTURE = Path(__file__).parents[1] / "fixtures" / "families.npz"
WIDTH, HEADS, LAYERS, CLASSES = 32, 2, 2, 5
GRIDS = {"native": (4, 4), "larger": (6, 6), "wide": (3, 5)}
EVERY_QUERY, PROJECTED = 4, 4                # every 4th row of a map is stored, and tokens are projected to 4 numbers
AS_TIMM = "bicubic_antialias"


class Case(NamedTuple):
    """model: its name in the program. options: arguments of timm's create_model, or of the image configuration in transformers.
    resize: how the program resizes position embeddings, if that differs from the publisher's way."""

    model: str
    options: dict = {}
    resize: str = ""


# By program and kind.
CASES = {
    "timm/dinov2": Case("vit_small_patch14_dinov2", resize=AS_TIMM),
    "timm/dinov2_reg": Case("vit_small_patch14_reg4_dinov2"),
    "timm/dinov2_swiglu": Case("vit_giant_patch14_dinov2", resize=AS_TIMM),
    "timm/dinov3": Case("vit_small_patch16_dinov3_qkvb"),
    "timm/dinov3_gated": Case("vit_small_plus_patch16_dinov3"),
    # Set in config.json; by its name the model would use the tanh form, with which its weights were trained.
    "timm/siglip": Case("vit_base_patch16_siglip_224", {"act_layer": "gelu"}, AS_TIMM),
    "timm/clip": Case("vit_base_patch16_clip_quickgelu_224", resize=AS_TIMM),
    "timm/deit3": Case("deit3_small_patch16_224", resize=AS_TIMM),
    "timm/eva02": Case("eva02_base_patch14_224", resize=AS_TIMM),
    "timm/eva02_clip": Case("eva02_base_patch16_clip_224", {"ref_feat_shape": (12, 12)}, AS_TIMM),        # 16 x 16 by its name
    "timm/pe": Case("vit_pe_core_tiny_patch16_384", resize=AS_TIMM),
    "timm/pe_spatial": Case("vit_pe_spatial_tiny_patch16_512", resize=AS_TIMM),
    "timm/aimv2": Case("aimv2_large_patch14_224", resize=AS_TIMM),
    "timm/reg4_gap": Case("vit_betwixt_patch16_reg4_gap_256"),
    "timm/rope_reg4_gap": Case("vit_betwixt_patch16_rope_reg4_gap_256"),
    "timm/beit3": Case("beit3_base_patch16_224", resize=AS_TIMM),
    "transformers/dinov2": Case("Dinov2ForImageClassification", {"mlp_ratio": 2}),
    "transformers/dinov2_reg": Case("Dinov2WithRegistersForImageClassification", {"mlp_ratio": 2}),
    "transformers/tipsv2": Case("Tipsv2VisionModel", {"mlp_ratio": 2}),
    "transformers/dinov3_gated": Case("DINOv3ViTModel", {
        "intermediate_size": 48, "num_register_tokens": 4, "use_gated_mlp": True, "hidden_act": "silu"}),
    "transformers/siglip": Case("SiglipForImageClassification", {"intermediate_size": 48}),
    "transformers/siglip_pooled": Case("SiglipVisionModel", {"intermediate_size": 48}),
    # Set in config.json; the defaults of these classes are quick_gelu and 1e-12.
    "transformers/clip": Case("CLIPForImageClassification", {"intermediate_size": 48, "hidden_act": "gelu"}),
    "transformers/ijepa": Case("IJepaForImageClassification", {"intermediate_size": 48, "layer_norm_eps": 1e-6}),
    "transformers/deit": Case("DeiTForImageClassification", {"intermediate_size": 48}),
}


# ------------------------------------------------------------------------------------------------- the formulas


def drawn(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Return numbers in [-1, 1) with 23 bits, computed with integers only, so that they are the same to the bit everywhere.

    The mixing is that of SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014)."""
    mixed = np.arange(1, math.prod(shape) + 1, dtype=np.uint64) + np.uint64(zlib.crc32(name.encode()) << 32)
    mixed *= np.uint64(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    mixed ^= mixed >> np.uint64(31)
    return ((mixed >> np.uint64(40)).astype(np.float32) / np.float32(1 << 23) - np.float32(1)).reshape(shape)


def filled(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Return the array of this name. None is zero, each affects the output, and the first tokens are small, so eps matters."""
    numbers = drawn(name, shape)
    if len(shape) == 1 and (name.endswith("weight") or "gamma" in name or "lambda" in name):
        return 1 + np.float32(0.3) * numbers
    if len(shape) == 4:
        return numbers * np.float32(0.2 / math.sqrt(math.prod(shape[1:])))
    if len(shape) == 2 and "position_embedding" not in name:
        return numbers * np.float32(2 / math.sqrt(shape[1]))
    return np.float32(0.1) * numbers


def images_of(height: int, width: int) -> Tensor:
    """Return the images (2, 3, height, width)"""
    return torch.from_numpy(drawn(f"images {height} {width}", (2, 3, height, width)))


def kept_of(output: Tensor, tokens: Tensor, maps: list[Tensor]) -> dict[str, np.ndarray]:
    """Return what is stored: projections of the tokens (B, N, D), some rows of the last block's map (B, H, N, N) of the first
    image, and the map of attention pooling (B, H, 1, N)."""
    seen = {"output": output, "tokens": tokens @ torch.from_numpy(drawn("projection", (tokens.shape[-1], PROJECTED))),
            "map": maps[LAYERS - 1][0, :, ::EVERY_QUERY]}
    if len(maps) > LAYERS:
        seen["pool_map"] = maps[LAYERS][0]
    return {name: value.numpy() for name, value in seen.items()}


# ------------------------------------------------------------------------------------------------- reading


@functools.cache
def contents() -> dict[str, np.ndarray]:
    with np.load(FIXTURE) as file:
        return {name: file[name] for name in file.files}


def described(case: str) -> dict:
    """Return `config`: the content of config.json as its program writes it; `arrays`: names and shapes of its file."""
    return json.loads(str(contents()[case]))


def expected(case: str, size: str) -> dict[str, np.ndarray]:
    """Return the numbers of `kept_of`."""
    start = f"{case}/{size}/"
    return {name.removeprefix(start): value for name, value in contents().items() if name.startswith(start)}


def pixels(case: str, size: str) -> tuple[int, int]:
    rows, columns = GRIDS[size]
    patch = patch_of(case)
    return rows * patch, columns * patch


def program_of(case: str) -> str:
    return case.partition("/")[0]


def patch_of(case: str) -> int:
    """Return the patch size, which is part of timm's names."""
    return int(CASES[case].model.partition("_patch")[2][:2]) if program_of(case) == "timm" else 7


def has_head(case: str) -> bool:
    return any(name.endswith(("head.weight", "classifier.weight")) for name in described(case)["arrays"])


def write_weights(folder: Path, arrays: dict[str, list[int]]) -> None:
    state = {name: torch.from_numpy(filled(name, tuple(shape))) for name, shape in arrays.items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def write_folder(folder: Path, case: str) -> Path:
    """Write a folder as its program would save the model."""
    description = described(case)
    folder.mkdir()
    write_weights(folder, description["arrays"])
    (folder / "config.json").write_text(json.dumps(description["config"]))
    return folder


# ------------------------------------------------------------------------------------------------- running the programs


def recorded(case: str) -> dict[str, np.ndarray]:
    """Compute the entries of a case with its program."""
    found, compute = {}, {"timm": of_timm, "transformers": of_transformers}[program_of(case)]
    with tempfile.TemporaryDirectory() as name, torch.inference_mode():
        folder = Path(name)
        for size, kept in compute(case, folder):
            found |= {f"{case}/{size}/{name}": value for name, value in kept.items()}
        description = {"config": json.loads((folder / "config.json").read_text()), "arrays": shapes_in(folder)}
    return found | {case: np.array(json.dumps(description))}


def shapes_in(folder: Path) -> dict[str, list[int]]:
    return {name: list(value.shape) for name, value in load_file(folder / "model.safetensors").items()}


def of_timm(case: str, folder: Path) -> Iterator[tuple[str, dict]]:
    """Yield (size, what is stored of it); leaves the model in the folder"""
    import timm
    from timm.models._hub import save_for_hf

    side = GRIDS["native"][0] * patch_of(case)
    model = timm.create_model(CASES[case].model, depth=LAYERS, embed_dim=WIDTH, num_heads=HEADS, num_classes=CLASSES,
                              img_size=side, **CASES[case].options).eval()
    save_for_hf(model, str(folder), safe_serialization=True)
    write_weights(folder, shapes_in(folder))
    model.load_state_dict(load_file(folder / "model.safetensors"))
    for size in GRIDS:
        resized, images = copy.deepcopy(model), images_of(*pixels(case, size))
        resized.set_input_size(pixels(case, size))
        usual = resized(images)
        with maps_of_timm(resized) as maps:
            tokens = resized.forward_features(images)
            output = resized.forward_head(tokens)
        assert (output - usual).abs().max() < 1e-5                   # its fused attention computes the same
        yield size, kept_of(output, tokens, maps)


@contextlib.contextmanager
def maps_of_timm(model: nn.Module) -> Iterator[list[Tensor]]:
    """Collect the maps of its blocks, from the input of their dropout, and of its attention pooling, from queries and keys. The
    model's attention is not fused afterwards."""
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
    maps, hooks = [], [block.attn.attn_drop.register_forward_hook(lambda _, inputs, __: maps.append(inputs[0]))
                       for block in model.blocks]
    if pool := getattr(model, "attn_pool", None):
        queries = []
        hooks += [pool.q_norm.register_forward_hook(lambda _, __, output: queries.append(output)),
                  pool.k_norm.register_forward_hook(lambda _, __, output: maps.append(
                      (queries[-1] * pool.scale @ output.transpose(-2, -1)).softmax(dim=-1)))]
    yield maps
    for hook in hooks:
        hook.remove()


def of_transformers(case: str, folder: Path) -> Iterator[tuple[str, dict]]:
    """Like of_timm, for transformers, which also reads the file."""
    import transformers

    kind = getattr(transformers, CASES[case].model)
    settings = {"hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "patch_size": patch_of(case),
                "image_size": GRIDS["native"][0] * patch_of(case)} | CASES[case].options
    if "vision_config" in kind.config_class.sub_configs:
        settings = {"vision_config": settings}
    kind(kind.config_class(**settings, num_labels=CLASSES)).save_pretrained(folder)
    write_weights(folder, shapes_in(folder))
    model, report = kind.from_pretrained(folder, output_loading_info=True, attn_implementation="eager")
    assert not any(report[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    model.eval()
    encoder = next(model.children()) if hasattr(model, "classifier") else model
    has_option = "interpolate_pos_encoding" in inspect.signature(encoder.forward).parameters
    for size in GRIDS:
        images, resized = images_of(*pixels(case, size)), {"interpolate_pos_encoding": True} if has_option else {}
        found = encoder(images, output_attentions=True, **resized)
        output = found.pooler_output if encoder is model else model(images, **resized).logits
        yield size, kept_of(output, found.last_hidden_state, found.attentions)


if __name__ == "__main__":
    entries = {}
    for each in CASES:
        entries |= recorded(each)
    np.savez_compressed(FIXTURE, **entries)
    print(f"{FIXTURE}: {len(CASES)} models, {FIXTURE.stat().st_size} bytes")
