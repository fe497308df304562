"""Files with the names of transformers and of lucidrains' vit-pytorch compute what those programs compute."""

import itertools
import json
import re
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
import tower_names
from filling import random_model, refused
from headers import header_of
from safetensors.torch import load_file, save_file
from torch import Tensor
from weight_files import saved

from configs import MODELS, architecture
from models import create_model, record_attention
from models.checkpoints.conversions import sincos_positions
from models.checkpoints.description import Description
from models.checkpoints.infer import ARRAYS
from models.checkpoints.opened import OpenedCheckpoint
from models.match import match_row

SIZES = {"native": (28, 28), "larger": (42, 42), "wide": (28, 42)}
TEXT = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 10,
        "bos_token_id": 0, "eos_token_id": 1}
PLAIN = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28, "patch_size": 7}
SIZED = PLAIN | {"intermediate_size": 48}


def row(**more) -> object:
    return architecture(7, 24, 48, 2, 2, img_size=28, **more)


class Case(NamedTuple):
    """A model of transformers, our row, and the output that is compared (`output` returns ours)."""

    build: Callable
    row: object
    output: str = "logits"
    sizes: tuple[str, ...] = tuple(SIZES)
    options: dict = {}


def both(config: str, vision: dict, **more) -> Callable:
    """Return a configuration of two towers."""
    return lambda t: getattr(t, config)(vision_config=vision, text_config=TEXT, num_labels=3, **more)


def made(model: str, config: str | Callable, **settings) -> Callable:
    def build(t: object) -> torch.nn.Module:
        return getattr(t, model)(config(t) if callable(config) else getattr(t, config)(**settings))

    return build


SCALED = {"layer_scale": 1e-5}
CLIP_ROW = {"norm_eps": 1e-5, "pre_norm": True, "patch_bias": False, "position_resize": "bicubic"}
SIGLIP_ROW = {"class_token": False, "position_resize": "bicubic"}
DINOV3_ROW = {"norm_eps": 1e-5, "rope": "dinov3", "positions": "none", "registers": 4, "qkv_bias": "qv", "gelu": "erf", **SCALED}
ERF = {"gelu": "erf", "position_resize": "bicubic"}
RESIZED = {"interpolate_pos_encoding": True}
LUCIDRAINS_ROW = {"norm_eps": 1e-5, "gelu": "erf", "qkv_bias": "none"}
CASES = {
    "dinov2": Case(made("Dinov2ForImageClassification", "Dinov2Config", **PLAIN, mlp_ratio=2, num_labels=3),
                   row(classifier="token_mean", **SCALED, **ERF)),
    "dinov2 swiglu": Case(made("Dinov2Model", "Dinov2Config", **PLAIN, mlp_ratio=3, use_swiglu_ffn=True),
                          row(mlp="swiglu", **SCALED, **ERF), "pooler_output"),
    "dinov2 registers": Case(
        made("Dinov2WithRegistersForImageClassification", "Dinov2WithRegistersConfig", **PLAIN, mlp_ratio=2, num_labels=3),
        row(classifier="token_mean", registers=4, positions="patches", **SCALED,
            **ERF | {"position_resize": "bicubic_antialias"})),
    "tipsv2": Case(made("Tipsv2VisionModel", "Tipsv2VisionConfig", **PLAIN, mlp_ratio=2),
                   row(registers=1, positions="patches", **SCALED, **ERF | {"position_resize": "bilinear_antialias"}),
                   "pooler_output"),
    "dinov3": Case(made("DINOv3ViTModel", "DINOv3ViTConfig", **SIZED, num_register_tokens=4), row(**DINOV3_ROW), "pooler_output"),
    "dinov3 swiglu": Case(made("DINOv3ViTModel", "DINOv3ViTConfig", **SIZED, num_register_tokens=4, use_gated_mlp=True,
                               hidden_act="silu"),
                          row(mlp="swiglu", **DINOV3_ROW), "last_hidden_state"),
    "dinov3 no bias": Case(
        made("DINOv3ViTModel", "DINOv3ViTConfig", **SIZED, num_register_tokens=4, query_bias=False, value_bias=False),
        row(**DINOV3_ROW | {"qkv_bias": "none"}), "pooler_output"),
    "siglip": Case(made("SiglipVisionModel", "SiglipVisionConfig", **SIZED), row(classifier="attention", **SIGLIP_ROW),
                   "pooler_output", options=RESIZED),
    "siglip tokens": Case(made("SiglipVisionModel", "SiglipVisionConfig", **SIZED, vision_use_head=False),
                          row(classifier="mean", **SIGLIP_ROW), "last_hidden_state", options=RESIZED),
    "siglip classifier": Case(made("SiglipForImageClassification", both("SiglipConfig", SIZED)),
                              row(classifier="mean", **SIGLIP_ROW), options=RESIZED),
    "clip": Case(made("CLIPVisionModel", "CLIPVisionConfig", **SIZED), row(gelu="quick", **CLIP_ROW), "pooler_output",
                 options=RESIZED),
    "clip projection": Case(made("CLIPVisionModelWithProjection", "CLIPVisionConfig", **SIZED, hidden_act="gelu"),
                            row(gelu="erf", final_norm=False, classifier="mean", **CLIP_ROW), "last_hidden_state",
                            options=RESIZED),
    "clip classifier": Case(made("CLIPForImageClassification", both("CLIPConfig", SIZED)),
                            row(gelu="quick", classifier="mean", final_norm=False, **CLIP_ROW), sizes=("native",)),
    "metaclip 2": Case(made("MetaClip2ForImageClassification", both("MetaClip2Config", SIZED)),
                       row(gelu="quick", classifier="mean", final_norm=False, **CLIP_ROW), sizes=("native",)),
    "ijepa": Case(made("IJepaForImageClassification", "IJepaConfig", **SIZED, num_labels=3),
                  row(classifier="gap", norm_eps=1e-12, **ERF), options=RESIZED),
    "aimv2": Case(made("Aimv2VisionModel", "Aimv2VisionConfig", **SIZED),
                  row(norm="rms", norm_eps=1e-5, patch_norm="after", mlp="swiglu", mlp_bias=False, qkv_bias="none",
                      proj_bias=False, classifier="gap"), "last_hidden_state", ("native",)),
    "vit": Case(made("ViTForImageClassification", "ViTConfig", **SIZED, num_labels=3), row(norm_eps=1e-12, **ERF),
                options=RESIZED),
    "deit": Case(made("DeiTForImageClassification", "DeiTConfig", **SIZED, num_labels=3), row(norm_eps=1e-12, registers=1, **ERF),
                 options=RESIZED),
    "deit distilled": Case(made("DeiTForImageClassificationWithTeacher", "DeiTConfig", **SIZED, num_labels=3),
                           row(norm_eps=1e-12, distilled=True, **ERF), options=RESIZED),
}


def theirs(case: Case) -> torch.nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = case.build(transformers)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def ours(case: Case, path: object, size: tuple[int, int]) -> torch.nn.Module:
    head = {"head": "keep"} if case.output == "logits" else {"head": "zero", "num_classes": 3}
    return create_model(case.row, img_size=size, pretrained=path, **head).eval()


def output(model: torch.nn.Module, kind: str, images: Tensor) -> Tensor:
    features = model.forward_features(images)
    return {"logits": lambda: model.forward_head(features), "last_hidden_state": lambda: features,
            "pooler_output": lambda: model.pool(features)}[kind]()


def error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.reference
@pytest.mark.parametrize("dtype, allowed", [(torch.float64, 1e-6), (torch.float32, 1e-4)], ids=["float64", "float32"])
@pytest.mark.parametrize("name", CASES)
@torch.inference_mode()
def test_outputs_of_transformers(tmp_path, name, dtype, allowed):
    """With the names in the files that it saves, and with those of its state dict."""
    case = CASES[name]
    model = theirs(case)
    model.save_pretrained(tmp_path / "hub")
    torch.save(load_file(tmp_path / "hub" / "model.safetensors"), tmp_path / "saved.pth")
    torch.save(model.state_dict(), tmp_path / "memory.pth")
    for size, file in itertools.product(case.sizes, ("saved.pth", "memory.pth")):
        mine, images = ours(case, tmp_path / file, SIZES[size]).to(dtype), torch.randn(2, 3, *SIZES[size], dtype=dtype)
        expected = getattr(model.to(dtype)(images, **case.options), case.output)
        assert error(output(mine, case.output, images), expected) < allowed, (size, file)


@pytest.mark.reference
@pytest.mark.parametrize("name", ["dinov2 registers", "dinov3", "siglip", "clip", "aimv2", "deit"])
@torch.inference_mode()
def test_attention_of_transformers(tmp_path, name):
    case = CASES[name]
    model, images = theirs(case).double(), torch.randn(2, 3, 28, 28, dtype=torch.float64)
    model.set_attn_implementation("eager")
    expected = model(images, output_attentions=True, **case.options).attentions
    mine = ours(case, saved(tmp_path / "x.pth", model.state_dict()), (28, 28)).double()
    with record_attention(mine) as maps:
        mine(images)
    assert len(expected) == 2 and all(error(found, map) < 1e-6 for found, map in zip(maps, expected))


@pytest.mark.reference
@pytest.mark.parametrize("name", CASES)
@torch.inference_mode()
def test_folders_of_transformers_need_no_flags(tmp_path, name):
    """The row, the heads, the GELU and what the head reads come from config.json and the arrays."""
    case = CASES[name]
    model, images = theirs(case), torch.randn(2, 3, 28, 28)
    model.save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5] * 3, "image_std": [0.5] * 3}))
    kind = "pooler_output" if name == "clip projection" else case.output
    head = {"head": "keep"} if kind == "logits" else {"head": "zero", "num_classes": 3}
    mine, expected = create_model(pretrained=tmp_path, **head).eval(), model(images, **case.options)
    expected = model.vision_model(images).pooler_output if name == "clip projection" else getattr(expected, kind)
    assert error(output(mine, kind, images), expected) < 1e-4


@pytest.mark.reference
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", ["Siglip2VisionModel", "Siglip2ForImageClassification"])
@torch.inference_mode()
def test_siglip_2_for_images_of_any_shape(tmp_path, name, size):
    """Its patch embedding is a linear layer over pixels; positions are resized differently from SigLIP's."""
    vision = {key: value for key, value in SIZED.items() if key != "image_size"} | {"num_patches": 16}
    classifies = name == "Siglip2ForImageClassification"
    build = made(name, both("Siglip2Config", vision)) if classifies else made(name, "Siglip2VisionConfig", **vision)
    case = Case(build, row(classifier="mean" if classifies else "attention", class_token=False,
                           position_resize="bilinear_antialias"), "logits" if classifies else "pooler_output")
    model = theirs(case).double()
    torch.save(model.state_dict(), tmp_path / "x.pth")
    mine, images = ours(case, tmp_path / "x.pth", SIZES[size]).double(), torch.randn(2, 3, *SIZES[size], dtype=torch.float64)
    rows, columns = (side // 7 for side in SIZES[size])
    pixels = images.unflatten(3, (columns, 7)).unflatten(2, (rows, 7)).permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)
    expected = model(pixel_values=pixels, pixel_attention_mask=torch.ones(2, rows * columns, dtype=torch.long),
                     spatial_shapes=torch.tensor([[rows, columns]] * 2))
    assert error(output(mine, case.output, images), getattr(expected, case.output)) < 1e-6


# ------------------------------------------------------------------------------------------------------ lucidrains


def lucidrains(kind: str) -> torch.nn.Module:
    """"2021": without norms around the patches, a norm in the head, and names of the layers as they were then."""
    vit_pytorch = pytest.importorskip("vit_pytorch")
    settings = {"image_size": 28, "patch_size": 7, "num_classes": 3, "dim": 24, "depth": 2, "heads": 2, "mlp_dim": 48,
                "dim_head": 12}
    torch.manual_seed(0)
    if kind == "simple":
        model = vit_pytorch.SimpleViT(**settings)
    else:
        model = vit_pytorch.ViT(**settings, pool="mean" if kind == "mean" else "cls")
    if kind == "2021":
        model.to_patch_embedding = torch.nn.Sequential(model.to_patch_embedding[0], model.to_patch_embedding[2])
        model.transformer.norm = torch.nn.Identity()
        model.mlp_head = torch.nn.Sequential(torch.nn.LayerNorm(24), model.mlp_head)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def of_2021(name: str) -> str:
    """Return the name that an array had in 2021."""
    for new, old in ((r"\.0\.to_", ".0.fn.to_"), (r"\.1\.net\.0\.", ".1.norm."), (r"\.1\.net\.1\.", ".1.fn.net.0."),
                     (r"\.1\.net\.4\.", ".1.fn.net.3.")):
        name = re.sub(new, old, name)
    return name


@pytest.mark.reference
@pytest.mark.parametrize("dtype, allowed", [(torch.float64, 1e-6), (torch.float32, 1e-4)], ids=["float64", "float32"])
@pytest.mark.parametrize("kind, keys", [
    ("token", {"patch_norm": "around"}), ("mean", {"patch_norm": "around", "classifier": "gap"}), ("2021", {}),
    ("simple", {"patch_norm": "around", "classifier": "gap", "proj_bias": False})])
@torch.inference_mode()
def test_logits_of_lucidrains(tmp_path, kind, keys, dtype, allowed):
    model = lucidrains(kind)
    state = {of_2021(name) if kind == "2021" else name: value for name, value in model.state_dict().items()}
    if kind == "2021":
        state |= {name: state[name][None] for name in ("cls_token", "pos_embedding")}
    torch.save(state, tmp_path / "x.pt")
    mine = create_model(row(**LUCIDRAINS_ROW, **keys), pretrained=tmp_path / "x.pt", head="keep").eval().to(dtype)
    images = torch.randn(2, 3, 28, 28, dtype=dtype)
    assert error(mine(images), model.to(dtype)(images)) < allowed


def under(prefix: str, names: Callable) -> Callable:
    """Return a function that adds the prefix of a classifier's file."""
    return lambda state: {name if name.startswith("classifier") else prefix + name: value for name, value in names(state).items()}


# The names, our row, and the arrays of the file that are not used.
MASK = ["embeddings.mask_token"]
TEXT_TOWER = ["embeddings.position_ids", "logit_bias", "logit_scale", "text_model.embeddings.token_embedding.weight",
              "text_model.encoder.layers.0.mlp.fc1.bias", "text_projection.weight", "visual_projection.weight"]
FILES = {
    "dinov2": (tower_names.dinov2, CASES["dinov2"].row, MASK),
    "dinov2 in memory": (under("dinov2.", tower_names.later(tower_names.dinov2)), CASES["dinov2"].row, MASK),
    "dinov2 swiglu": (tower_names.dinov2, CASES["dinov2 swiglu"].row, MASK),
    "dinov2 swiglu in memory": (tower_names.later(tower_names.dinov2), CASES["dinov2 swiglu"].row, MASK),
    "dinov2 registers": (under("dinov2_with_registers.", tower_names.dinov2), CASES["dinov2 registers"].row, MASK),
    "dinov3": (tower_names.dinov3, CASES["dinov3"].row, MASK),
    "dinov3 swiglu in memory": (tower_names.later(tower_names.dinov3), CASES["dinov3 swiglu"].row, MASK),
    "siglip": (tower_names.both_towers, CASES["siglip"].row, TEXT_TOWER),
    "siglip of any shape": (tower_names.of_any_shape, row(classifier="attention", class_token=False,
                                                          position_resize="bilinear_antialias"), []),
    "clip": (tower_names.vision_tower, CASES["clip"].row, []),
    "clip classifier": (tower_names.both_towers, CASES["clip classifier"].row, [
        "post_layernorm.bias", "post_layernorm.weight", *TEXT_TOWER]),
    "aimv2": (tower_names.aimv2, CASES["aimv2"].row, ["head.cls_token", "head.k_proj.weight"]),
    "lucidrains": (tower_names.lucidrains, row(patch_norm="around", **LUCIDRAINS_ROW), []),
    "lucidrains mean": (tower_names.lucidrains, row(patch_norm="around", classifier="gap", **LUCIDRAINS_ROW), ["cls_token"]),
    "lucidrains 2021": (lambda state: tower_names.lucidrains(state, "2021"), row(**LUCIDRAINS_ROW), []),
    "lucidrains simple": (lambda state: tower_names.lucidrains(state, "simple"),
                          row(patch_norm="around", classifier="gap", proj_bias=False, **LUCIDRAINS_ROW), []),
}
HEADLESS = ("dinov2 swiglu", "dinov2 swiglu in memory", "dinov3", "dinov3 swiglu in memory", "siglip", "siglip of any shape",
            "clip", "aimv2")


def file_of(name: str, **more: int) -> tuple[torch.nn.Module, dict[str, Tensor]]:
    """Return (a model of ours, its arrays with the names of a file)."""
    names, own, _ = FILES[name]
    model = random_model(own, 3, **more)
    if name == "lucidrains simple":
        model.pos_embed.data = sincos_positions(model.grid, 24)
    state = {ours: value for ours, value in model.state_dict().items() if name not in HEADLESS or not ours.startswith("head.")}
    arrays = names(state)
    if name == "clip classifier":
        arrays |= {f"vision_model.post_layernorm.{kind}": torch.ones(24) for kind in ("weight", "bias")}
    return model, arrays


def loaded(path: object, name: str, own: object = None) -> torch.nn.Module:
    head = {"head": "zero", "num_classes": 3} if name in HEADLESS else {"head": "keep"}
    return create_model(FILES[name][1] if own is None else own, pretrained=path, **head)


def inferred(path: object, name: str) -> object:
    """Return the row inferred from the file, completed with what it does not show."""
    with OpenedCheckpoint(path) as opened:
        untold = {"num_heads": 2, "mlp_dim": 48, "img_size": 28, "gelu": FILES[name][1].gelu}
        return architecture(**untold | opened.row | opened.computed)


@pytest.mark.parametrize("name", FILES)
def test_files_in_each_program_s_names(tmp_path, name):
    """Every array is loaded to its place, in the model inferred from the file."""
    model, arrays = file_of(name)
    path = saved(tmp_path / "x.pth", {"state_dict": {f"net.{theirs}": value for theirs, value in arrays.items()}})
    own = FILES[name][1]
    for found in (loaded(path, name), loaded(path, name, inferred(path, name))):
        for key in ("classifier", *ARRAYS):
            same = {found.config[key], own[key]}
            assert len(same) == 1 or key == "layer_scale" or same in ({"gap", "mean"}, {"all", "patches"}, {True, False}), key
        assert all(found.config[key] == own[key] for key in ("norm_eps", "rope", "img_size"))
        kept = {ours: value for ours, value in found.state_dict().items() if name not in HEADLESS or not ours.startswith("head.")}
        assert all(torch.allclose(value, model.state_dict()[ours], atol=1e-6) for ours, value in kept.items())
        assert [theirs.removeprefix("net.") for theirs in found.load_report.left_out] == FILES[name][2]
        assert "prefix net. stripped" in found.load_report.notes


@pytest.mark.parametrize("name", FILES)
def test_an_array_too_few_or_too_many_is_an_error(tmp_path, name):
    """Whichever array it is, also for the row inferred from the damaged file."""
    path, (_, arrays) = tmp_path / "x.pth", file_of(name)
    second_block = re.compile(r"layers?\.1\.")
    needed = [theirs for theirs in arrays if not theirs.endswith(tuple(FILES[name][2])) and not second_block.search(theirs)]
    for dropped in needed:
        saved(path, {theirs: value for theirs, value in arrays.items() if theirs != dropped})
        refused("x.pth: ", lambda: loaded(path, name, inferred(path, name)))
    refused("x.pth: ", loaded, path, name)
    saved(path, arrays | {f"{needed[0]}_too": torch.ones(2)})
    refused("x.pth: ", loaded, path, name)


@pytest.mark.parametrize("name", FILES)
def test_an_array_of_another_shape_is_an_error(tmp_path, name):
    path, (_, arrays) = tmp_path / "x.pth", file_of(name, num_layers=1)
    shapes = itertools.cycle([(), (0,), (24, 0), (3, 2, 2, 2), (1, 2, 3, 4, 5), (49,)])
    for theirs, shape in zip([theirs for theirs in arrays if not theirs.endswith(tuple(FILES[name][2]))], shapes):
        saved(path, arrays | {theirs: torch.ones(shape)})
        refused("x.pth: |hidden_size 3 is not divisible", lambda: loaded(path, name, inferred(path, name)))


NAMES = {"DINOv2": tower_names.dinov2, "TIPSv2": tower_names.dinov2, "DINOv3": tower_names.dinov3, "EUPE": tower_names.dinov3,
         "LingBot": tower_names.dinov3, "SigLIP": tower_names.vision_tower, "CLIP": tower_names.vision_tower,
         "OpenCLIP": tower_names.vision_tower, "AIMv2": tower_names.aimv2}
# Rows with the arrays of another row that computes the same, for images that are normalized or resized differently.
ALIKE = {"EUPE-S_16": "DINOv3-S_16-qkvb", "EUPE-B_16": "DINOv3-B_16-qkvb", "LingBot-S_16": "DINOv3-S_16-qkvb",
         "LingBot-B_16": "DINOv3-B_16-qkvb", "LingBot-L_16": "DINOv3-L_16-qkvb"}
# No array shows whether the GELU is OpenAI's quick form.
CLIP_TWINS = ("B_32", "B_16", "L_14", "H_14", "bigG_14")


@pytest.mark.parametrize("family", NAMES)
def test_weights_of_published_sizes_give_their_row_or_are_refused(family):
    for name in [name for name in MODELS if name.partition("-")[0] == family]:
        with torch.device("meta"):
            state = create_model(name, 3).state_dict()
            file = header_of(NAMES[family]({ours: value for ours, value in state.items() if not ours.startswith("head.")}))
        if family.endswith("CLIP") and name.partition("-")[2] in CLIP_TWINS:
            size = name.partition("-")[2]
            refused(f"fit CLIP-{size} and OpenCLIP-{size}, which compute", match_row, file)
        else:
            assert match_row(file) == (ALIKE.get(name, name), {})


@pytest.mark.parametrize("name, said", [
    ("DINOv3-S_16-qkvb", {}), ("DINOv2-S_14-reg", {}), ("DINOv3-S_16-qkvb", {"registers": 3}),
    ("DINOv3-S_16-qkvb", {"registers": 0}), ("DINOv2-S_14-reg", {"registers": 0, "gelu": "erf"})])
def test_a_lost_register_is_an_error(name, said):
    """For weights of published sizes without a config.json, which may say that there are three, or none in an empty array."""
    with torch.device("meta"):
        state = {ours: value for ours, value in create_model(name, 3).state_dict().items() if not ours.startswith("head.")}
        state["reg_token"] = state["reg_token"][:, :said.get("registers", 3)]
        file = header_of(NAMES[name.partition("-")[0]](state), Description(row=said))
    if said:
        assert match_row(file)[1].get("registers", 0) == said["registers"]
        assert any("register_tokens" in one for one in file.layout.all) == (said["registers"] > 0)
    else:
        refused(f"x.pth: it has 3 registers, but {name}, which has its sizes, has 4", match_row, file)


@pytest.mark.parametrize("prefix", ["visual.", "module.visual."])
@pytest.mark.parametrize("keys", [{"gelu": "quick"}, {
    "gelu": "erf", "classifier": "attention", "pool_heads": 4, "rope": "pe", "rope_grid": 4}], ids=["clip", "pe"])
@torch.inference_mode()
def test_files_of_clip_s_program(tmp_path, keys, prefix):
    """OpenAI's, OpenCLIP's and MetaCLIP's, and those of Meta's PE. The projection to the space of images and texts and the text
    tower are not used."""
    own = row(**CLIP_ROW, **keys)
    model, images = random_model(own, 3).eval(), torch.randn(1, 3, 28, 28)
    path = saved(tmp_path / "x.pt", {"state_dict": tower_names.openai(model.state_dict(), prefix)})
    found = create_model(own, 3, pretrained=path, img_size=28).eval()
    assert torch.equal(found.pool(found.forward_features(images)), model.pool(model.forward_features(images)))
    left_out = found.load_report.left_out
    assert len(left_out) == 6 and "proj" in left_out and any(name.endswith("token_embedding.weight") for name in left_out)
    with OpenedCheckpoint(path) as opened:
        assert all(opened.row[key] == own[key] for key in ARRAYS) and opened.row["img_size"] == 28
        assert "gelu" not in opened.computed                  # no array shows it; the row decides


@pytest.mark.parametrize("prefix", ["visual.trunk.", "module.visual.trunk.", "visual."])
def test_timm_s_models_in_files_of_open_clip(tmp_path, prefix):
    """After `visual.trunk.`, or as in EVA's own program after `visual.`; the text tower and the projections are not
    used."""
    own = row(positions="patches", class_token=False, classifier="attention")
    state = {prefix + name: value for name, value in random_model(own, 3).state_dict().items() if not name.startswith("head.")}
    others = {f"{prefix.partition('visual.')[0]}{name}": torch.ones(2) for name in (
        "text.token_embedding.weight", "text.transformer.resblocks.0.ln_1.weight", "text.ln_final.bias", "logit_scale")}
    found = create_model(own, 3, pretrained=saved(tmp_path / "x.pt", state | others))
    assert all(torch.equal(value, state[prefix + name]) for name, value in found.state_dict().items() if "head" not in name)
    assert sorted(found.load_report.left_out) == sorted(others)


def test_a_torchscript_program_is_refused_and_its_weights_are_named(tmp_path):
    torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.ones(1, 2)), tmp_path / "ViT-B-32.pt")
    refused("ViT-B-32.pt: a TorchScript program.*openai/clip-vit-base-patch32", create_model, row(),
            pretrained=tmp_path / "ViT-B-32.pt")


@pytest.mark.parametrize("names, message", [
    (["text_model.embeddings.token_embedding.weight", "text_model.encoder.layers.0.mlp.fc1.weight", "logit_scale"],
     "it is only the text tower"),
    (["token_embedding.weight", "positional_embedding", "transformer.resblocks.0.ln_1.weight", "ln_final.weight"],
     "it is only the text tower"),
    (["embeddings.word_embeddings.weight", "encoder.layer.0.attention.self.query.weight"], "it is a model for text"),
    (["visual.conv1.weight", "visual.layer1.0.conv1.weight", "transformer.resblocks.0.ln_1.weight"],
     "it is the ResNet of a CLIP"),
    (["embeddings.patch_embeddings.weight", "layer.0.layer_scale1.lambda1"], "lacks embeddings.cls_token, .* file of DINOv3 has"),
    (["dinov2_with_registers.embeddings.patch_embeddings.projection.weight",
      "dinov2_with_registers.encoder.layer.0.norm1.weight"],
     "lacks .*embeddings.register_tokens, which every file of DINOv2 with registers has"),
    (["beit.embeddings.patch_embeddings.projection.weight", "beit.encoder.layer.0.lambda_1",
      "beit.encoder.layer.0.attention.attention.relative_position_bias.relative_position_bias_table"],
     "it is a model with relative positions"),
    (["beit.embeddings.patch_embeddings.projection.weight", "beit.encoder.layer.0.lambda_1"],
     "it is a model with relative positions"),
])
def test_other_files_are_refused_by_name(tmp_path, names, message):
    path = saved(tmp_path / "x.pth", {name: torch.ones(2) for name in names})
    refused(f"x.pth: {message}", create_model, row(), pretrained=path)


def test_attention_of_another_width_than_the_tokens_is_refused(tmp_path):
    """lucidrains' dim_head times heads can be any number."""
    _, arrays = file_of("lucidrains")
    for name in [name for name in arrays if "to_qkv" in name]:
        arrays[name] = torch.ones(3 * 32, 24)
    refused("its attention has width 32 and its tokens have width 24", loaded, saved(tmp_path / "x.pt", arrays),
            "lucidrains")


def test_a_file_that_was_cut_off_is_reported(tmp_path):
    save_file(file_of("siglip")[1], tmp_path / "x.safetensors")
    whole = (tmp_path / "x.safetensors").read_bytes()
    (tmp_path / "x.safetensors").write_bytes(whole[:-100])
    refused("x.safetensors: ", loaded, tmp_path / "x.safetensors", "siglip")


def test_a_note_says_what_lucidrains_head_is_assumed_to_read(tmp_path):
    report = loaded(saved(tmp_path / "x.pt", file_of("lucidrains 2021")[1]), "lucidrains 2021").load_report
    assert any("if it was made with pool='cls', which the file does not say" in note for note in report.notes)
