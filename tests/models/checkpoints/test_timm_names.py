"""Files with the names of timm's classes and of original files: the inferred row and the loaded model."""

import re

import pytest
import torch
from filling import load, random_model, refused, same_state
from originals import KINDS, NO_HEAD, arrays_of, dinov3, in_memory, tiny

from models import create_model, load_pretrained
from models.checkpoints.infer import ARRAYS, SIZES, is_plain
from models.checkpoints.opened import OpenedCheckpoint


def head_of(case: str) -> str:
    return "zero" if case in NO_HEAD else "keep"


@pytest.fixture(scope="module")
def models():
    """Create one model of each kind with random weights, once."""
    return {case: random_model(kind.row) for case, kind in KINDS.items()}


@pytest.mark.parametrize("case", KINDS)
def test_a_file_gives_its_row_and_its_model(tmp_path, models, case):
    kind, model = KINDS[case], models[case]
    torch.save(arrays_of(case, model), tmp_path / "x.pth")
    with OpenedCheckpoint(tmp_path / "x.pth") as file:
        found, row = file.row, kind.row
        expected = {key: row[key] for key in (*SIZES, *ARRAYS, "in_channels", "img_size")} | {
            "layer_scale": 1e-5 if row.layer_scale else 0.0, "class_token": row.class_token and row.classifier != "gap"}
        if row.positions == "none":                             # nothing shows the size of the images
            expected.pop("img_size")
        assert {key: value for key, value in found.items() if key in expected} == expected
        assert found.get("classifier", row.classifier) == row.classifier
        assert found.get("pool_mlp_dim", 0) == row.pool_mlp_dim
        plain = is_plain(file.row)
        filled = create_model(kind.row, 3, pretrained=file, head=head_of(case))
    assert filled.config.norm_eps == row.norm_eps and filled.config.gelu == ("erf" if plain else row.gelu)       # timm's GELU
    if case in NO_HEAD:
        filled.head.load_state_dict(model.head.state_dict())
    if kind.names.__name__ in ("dinov2_registers", "tips"):              # a sum rounds
        assert torch.allclose(filled.cls_token, model.cls_token, atol=1e-6)
        filled.cls_token.data.copy_(model.cls_token)
    assert same_state(filled, model)
    assert sorted(filled.load_report.left_out) == list(kind.beside)
    computed = "rotary positions computed in float32, not from the bfloat16 periods of the file"
    assert (computed in filled.load_report.notes) == ("rope_embed.periods" in kind.beside)


ONE_OF_EACH = ("timm_dinov2_reg", "timm_siglip", "timm_clip", "timm_reg4_gap", "timm_aimv2", "timm_eva02_clip",
               "timm_dinov3_plus", "dinov2_reg", "dinov3", "pe")


@pytest.mark.parametrize("case", [
    case if case in ONE_OF_EACH else pytest.param(case, marks=pytest.mark.reference) for case in KINDS])          # a second each
def test_missing_new_renamed_and_misshapen_arrays_are_refused(models, case):
    kind = KINDS[case]
    arrays = arrays_of(case, models[case])
    arrays = arrays.get("encoder", arrays)
    with torch.device("meta"):
        model = create_model(kind.row, 3)

    def fill(changed: dict) -> None:
        load_pretrained(model, in_memory(changed), head_of(case))

    parts = [name for name in arrays if not re.sub(r"^(visual|vision_encoder)\.", "", name).startswith(kind.beside or (" ",))]
    assert len(parts) > 11
    for name in parts:
        rest = {other: value for other, value in arrays.items() if other != name}
        refused("x.pth: ", fill, rest)
        refused("x.pth: ", fill, rest | {f"{name}_of_another": arrays[name]})
        refused("x.pth: ", fill, arrays | {name: torch.cat([arrays[name], arrays[name][..., :1]], dim=-1)})
        refused("x.pth: ", fill, arrays | {name: torch.cat([arrays[name], arrays[name][:1]])})


def test_a_bias_of_the_keys_must_be_masked(tmp_path):
    model = random_model(KINDS["dinov3"].row)
    state = {name: value for name, value in model.state_dict().items() if not name.startswith("head.")}
    for content, message in ((dinov3(state, mask=False), "blocks.0.attn.qkv.bias has a bias for keys"),
                             (dinov3(state) | {"blocks.0.attn.qkv.bias_mask": torch.ones(144)}, "has a bias for keys"),
                             (dinov3(state) | {"blocks.0.attn.qkv.bias_mask": torch.zeros(144)}, "its bias_mask is not")):
        torch.save(content, tmp_path / "x.pth")
        refused(message, load, tmp_path / "x.pth", KINDS["dinov3"].row, "zero")
    torch.save(dinov3(state, key_bias=0.0, mask=False), tmp_path / "x.pth")              # a zero bias of the keys
    assert torch.equal(load(tmp_path / "x.pth", KINDS["dinov3"].row, "zero").blocks[0].attn.qkv.q_bias,
                       model.blocks[0].attn.qkv.q_bias)


def test_the_norm_of_eva02_s_pre_training_starts_the_one_after_the_mean():
    """As in timm, which moves it: its own files of mim_in22k have fc_norm."""
    row = KINDS["eva02"].row
    model = random_model(row)
    arrays = {name.replace("fc_norm.", "norm."): value for name, value in arrays_of("eva02", model).items()
              if not name.startswith("head.")} | {"lm_head.weight": torch.ones(4, 48), "lm_head.bias": torch.ones(4),
                                                  "mask_token": torch.ones(1, 1, 48)}
    filled = create_model(row, 3, pretrained=in_memory(arrays))
    assert torch.equal(filled.fc_norm.weight, model.fc_norm.weight)
    assert {"lm_head.weight", "lm_head.bias", "mask_token"} <= set(filled.load_report.left_out)


def test_positions_are_resized_to_another_grid(models):
    """A folded table, one for patches, and one with rows before them."""
    for case, tokens in (("dinov2_reg", 0), ("timm_dinov2_reg", 0), ("timm_so150m", 4), ("timm_dinov2", 1)):
        arrays = arrays_of(case, models[case])
        model = create_model(KINDS[case].row, 3, (32, 48), in_memory(arrays))
        assert model.load_report.resized == {"pos_embed": "4x4 -> 4x6"} and model.pos_embed.shape == (1, tokens + 24, 48)
        own = models[case].pos_embed
        if tokens:
            assert torch.equal(model.pos_embed[:, :tokens], own[:, :tokens])


def test_heads_in_separate_files(tmp_path):
    """The linear classifiers of Meta's torch.hub, which contain the backbone, and a file with only a head."""
    row = tiny("DINOv2-S_14", classifier="token_mean")
    model = random_model(row)
    state = {f"backbone.{name}" if not name.startswith("head.") else f"linear_{name}": value
             for name, value in model.state_dict().items()}
    torch.save(state, tmp_path / "x.pth")
    assert same_state(load(tmp_path / "x.pth", row), model)
    torch.save({"weight": torch.ones(3, 96), "bias": torch.ones(3)}, tmp_path / "head.pth")
    refused("it is one linear layer .3, 96., such as the linear heads of DINOv2 .* as linear_head.weight", load,
            tmp_path / "head.pth", row)


@pytest.mark.parametrize("prefix, beside", [
    ("visual.", {"text.token_embedding.weight": torch.ones(3, 4), "logit_scale": torch.ones(())}),
    ("visual.trunk.", {"visual.head.proj.weight": torch.ones(5, 48), "text.positions": torch.ones(3)}),
    ("module.", {}), ("model.backbone.", {})])
def test_prefixes_are_stripped(tmp_path, models, prefix, beside):
    """EVA's CLIP, OpenCLIP with an encoder of timm, and wrappers."""
    state = {f"{prefix}{name}": value for name, value in arrays_of("eva02_clip", models["eva02_clip"]).items()}
    torch.save(state | beside, tmp_path / "x.pth")
    filled = load(tmp_path / "x.pth", KINDS["eva02_clip"].row)
    assert same_state(filled, models["eva02_clip"]) and set(beside) <= set(filled.load_report.left_out)


def test_the_teacher_of_dinov2_s_training_is_read(tmp_path, models):
    state = {f"backbone.{name}": value for name, value in arrays_of("dinov2_reg", models["dinov2_reg"]).items()
             if not name.startswith("head.")}
    torch.save({"teacher": state | {"dino_head.mlp.0.weight": torch.ones(3)}, "iteration": 9}, tmp_path / "x.pth")
    filled = load(tmp_path / "x.pth", KINDS["dinov2_reg"].row, "zero")
    assert torch.equal(filled.reg_token, models["dinov2_reg"].reg_token)
    assert {"dino_head.mlp.0.weight", "iteration"} <= set(filled.load_report.left_out)


def test_a_model_with_norms_after_its_branches_is_refused():
    """EVA-02 E has the same names as EVA."""
    state = {name: torch.zeros(0).expand(value.shape) if 0 in value.shape else torch.zeros(()).expand(
        [1792 if side == 48 else side for side in value.shape])
        for name, value in arrays_of("timm_eva", create_model(KINDS["timm_eva"].row, 3)).items()}
    refused("it is EVA-02 E, with norms after attention and MLP", lambda: in_memory(state).row)


def test_a_head_of_dinov3_may_read_the_token_or_the_mean(models, tmp_path):
    """timm's models of other families have a norm after a mean. The name of its architecture means the mean, its default."""
    state = dict(create_model("DINOv3-S_16", 3, 32, num_layers=1).state_dict())

    def kept(place: str, **keys) -> str:
        (tmp_path / place).parent.mkdir(exist_ok=True)
        torch.save(state, tmp_path / place)
        return create_model(pretrained=tmp_path / place, img_size=32, head="keep", num_heads=6, **keys).config.classifier

    refused("it does not say whether its head reads the cls token or the mean .* Add --classifier token or --classifier mean",
            kept, "x/mine.pth")
    assert create_model(pretrained=tmp_path / "x/mine.pth", img_size=32, num_heads=6).config.classifier == "token"    # a new head
    for classifier in ("token", "mean"):
        assert kept("x/mine.pth", classifier=classifier) == classifier
    for place in ("x/vit_small_patch16_dinov3.pth", "x/vit_small_patch16_dinov3.lvd1689m.pth", "vit_small_patch16_dinov3/a.pth"):
        assert kept(place) == "mean" and kept(place, classifier="token") == "token"
    state |= {f"blocks.0.attn.qkv.{kind}_bias": torch.zeros(384) for kind in "qv"}
    assert kept("x/vit_small_patch16_lingbot.pth") == "token" and kept("x/vit_small_patch16_dinov3_qkvb.pth") == "mean"
    other = create_model(KINDS["timm_dinov2"].row, 3, None, in_memory(arrays_of("timm_dinov2", models["timm_dinov2"])), "keep")
    assert other.config.classifier == "token"
