"""The layouts of big_vision, transformers and wrappers, each made here from a file with known logits."""

import numpy as np
import pytest
import reference
import torch
from filling import load, random_model, refused, same_state, save_arrays
from other_programs import transformers_names
from safetensors.torch import save_file

from configs import architecture
from models.checkpoints.opened import OpenedCheckpoint, checkpoint_head

TOKEN, GAP = "g_p16_lneps", "g_p16_gap"


# -------------------------------------------------------------------------------------------------- big_vision


def big_vision(case: str, prefix: str = "", stacked: bool = False) -> dict[str, np.ndarray]:
    """Return a case's checkpoint in big_vision's layout: its names, and the cls token's position added to the token."""
    names = {"LayerNorm_2": "LayerNorm_1", "MlpBlock_3": "MlpBlock_0",
             "Transformer/posembed_input/pos_embedding": "pos_embedding",
             "MultiHeadDotProductAttention_1": "MultiHeadDotProductAttention_0"}
    arrays = {}
    for name, array in reference.arrays(reference.weights(case)).items():
        for theirs, new in names.items():
            name = name.replace(theirs, new)
        arrays[name] = array
    if "cls" in arrays:
        arrays["cls"] = arrays["cls"] + arrays["pos_embedding"][:, :1]
        arrays["pos_embedding"] = arrays["pos_embedding"][:, 1:]
    if stacked:
        layers = reference.ROWS[case].num_layers
        for name in [name for name in arrays if "encoderblock_0" in name]:
            parts = [arrays.pop(name.replace("encoderblock_0", f"encoderblock_{i}")) for i in range(layers)]
            arrays[name.replace("encoderblock_0", "encoderblock")] = np.stack(parts)
    return {prefix + name: array for name, array in arrays.items()}


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("prefix, more", [
    ("", {}), ("params/", {}), ("params/", {"opt/0/count": np.int32(3), "chrono/accum_step": np.float32(1)}),
    ("params/img/", {"params/txt/head/kernel": np.ones((2, 2)), "params/t": np.ones(1), "params/b": np.ones(1)})])
@pytest.mark.parametrize("case", [TOKEN, GAP, "g_p16_pre"])
@torch.inference_mode()
def test_big_vision_gives_google_s_logits(tmp_path, case, prefix, more, stacked):
    model = load(save_arrays(tmp_path / "x.npz", big_vision(case, prefix, stacked), **more), case).eval()
    assert (model(reference.images(model.img_size[0])) - reference.expected(case)["logits"]).abs().max() < 1e-5
    assert model.load_report.left_out == sorted(more) and model.load_report.resized == {}
    assert checkpoint_head(tmp_path / "x.npz") == (model.num_classes, model.config.representation_size)


@torch.inference_mode()
def test_positions_without_a_row_for_the_cls_token_are_resized_too(tmp_path):
    model = load(save_arrays(tmp_path / "x.npz", big_vision(TOKEN)), TOKEN, "zero", img_size=(96, 32))
    plain = load(reference.weights(TOKEN), TOKEN, "zero", img_size=(96, 32))
    assert model.load_report.resized == {"pos_embed": "4x4 -> 6x2"}
    assert not model.pos_embed[:, 0].any() and torch.equal(model.pos_embed[:, 1:], plain.pos_embed[:, 1:])


@torch.inference_mode()
def test_an_older_big_vision_file_has_a_row_for_the_cls_token(tmp_path):
    arrays = reference.arrays(reference.weights(TOKEN))
    for name in ("pos_embedding", "Transformer/pos_embedding"):
        renamed = {name if key == "Transformer/posembed_input/pos_embedding" else key: array for key, array in arrays.items()}
        assert same_state(load(save_arrays(tmp_path / "x.npz", renamed), TOKEN), load(reference.weights(TOKEN), TOKEN))


def test_google_s_own_files_always_have_a_row_for_the_cls_token(tmp_path):
    """A table of 16 rows with Google's name belongs to a model without a cls token."""
    arrays = reference.arrays(reference.weights(TOKEN))
    arrays["Transformer/posembed_input/pos_embedding"] = arrays["Transformer/posembed_input/pos_embedding"][:, 1:]
    refused(r"pos_embedding has shape \(1, 16, 32\), which does not fit", load, save_arrays(tmp_path / "x.npz", arrays), TOKEN)


SIGLIP = architecture(7, 24, 40, 2, 2, img_size=28, classifier="attention", class_token=False)
TEXT_HALF = {"params/txt/Encoder_0/encoder_norm/bias": np.ones(2), "params/t": np.ones(1), "params/b": np.ones(1)}


def siglip(model, stacked: bool = False, older: bool = False, naflex: bool = False) -> dict[str, np.ndarray]:
    """Return a model of ours in big_vision's layout. older: without the pooling module's name; naflex: as SigLIP 2 for
    images of any shape, whose patch embedding is a dense layer over pixels, and whose table is a grid."""
    state = {name: value.numpy() for name, value in model.state_dict().items() if not name.startswith("head.")}

    def layer(theirs: str, ours: str) -> dict[str, np.ndarray]:
        weight = state[f"{ours}.weight"]
        return {f"{theirs}/{'kernel' if weight.ndim > 1 else 'scale'}": weight.T, f"{theirs}/bias": state[f"{ours}.bias"]}

    def attention(theirs: str, weight: np.ndarray, bias: np.ndarray, out: str) -> dict[str, np.ndarray]:
        parts = zip(("query", "key", "value"), weight.reshape(3, 2, 12, 24), bias.reshape(3, 2, 12))
        found = {f"{theirs}/{part}/{kind}": array for part, w, b in parts for kind, array in (
            ("kernel", w.transpose(2, 0, 1)), ("bias", b))}
        last = state[f"{out}.weight"].T.reshape(2, 12, 24)
        return found | {f"{theirs}/out/kernel": last, f"{theirs}/out/bias": state[f"{out}.bias"]}

    kernel = state["patch_embed.proj.weight"].transpose(2, 3, 1, 0)
    arrays = {"embedding/kernel": kernel.reshape(-1, 24) if naflex else kernel, "embedding/bias": state["patch_embed.proj.bias"],
              "pos_embedding": state["pos_embed"].reshape(4, 4, 24) if naflex else state["pos_embed"]}
    arrays |= layer("Transformer/encoder_norm", "norm")
    for i in range(2):
        theirs, ours = f"Transformer/encoderblock_{i}/", f"blocks.{i}."
        arrays |= layer(f"{theirs}LayerNorm_0", f"{ours}norm1") | layer(f"{theirs}LayerNorm_1", f"{ours}norm2")
        arrays |= attention(f"{theirs}MultiHeadDotProductAttention_0", state[f"{ours}attn.qkv.weight"],
                            state[f"{ours}attn.qkv.bias"], f"{ours}attn.proj")
        arrays |= layer(f"{theirs}MlpBlock_0/Dense_0", f"{ours}mlp.fc1") | layer(f"{theirs}MlpBlock_0/Dense_1", f"{ours}mlp.fc2")
    if stacked:
        for name in [name for name in arrays if "encoderblock_0" in name]:
            both = [arrays.pop(name.replace("block_0", f"block_{i}")) for i in range(2)]
            arrays[name.replace("block_0", "block")] = np.stack(both)
    pool, packed = "" if older else "MAPHead_0/", [np.concatenate([state[f"attn_pool.{part}.{kind}"] for part in ("q", "kv")])
                                                   for kind in ("weight", "bias")]
    arrays |= {f"{pool}probe": state["attn_pool.latent"]} | layer(f"{pool}LayerNorm_0", "attn_pool.norm")
    arrays |= attention(f"{pool}MultiHeadDotProductAttention_0", *packed, "attn_pool.proj")
    arrays |= layer(f"{pool}MlpBlock_0/Dense_0", "attn_pool.mlp.fc1") | layer(f"{pool}MlpBlock_0/Dense_1", "attn_pool.mlp.fc2")
    return {f"params/img/{name}": array for name, array in arrays.items()}


@pytest.mark.parametrize("kind", [{}, {"stacked": True}, {"older": True}, {"naflex": True}], ids=str)
def test_siglip_of_big_vision(tmp_path, kind):
    """Only its image encoder is read."""
    model = random_model(SIGLIP)
    with OpenedCheckpoint(save_arrays(tmp_path / "x.npz", siglip(model, **kind), **TEXT_HALF)) as file:
        assert file.row["classifier"] == "attention" and file.row["img_size"] == 28 and file.row["num_heads"] == 2
        assert (file.row["patch_size"], file.row["mlp_dim"], file.row["class_token"]) == (7, 40, False) and file.tells_mean
        ours = load(file, SIGLIP, "zero", num_classes=3)
        state = {name: value for name, value in ours.state_dict().items() if not name.startswith("head.")}
        assert all(torch.equal(value, model.state_dict()[name]) for name, value in state.items())
        assert ours.load_report.left_out == sorted(TEXT_HALF) and ours.config.gelu == "tanh"
        mean = load(file, SIGLIP, "zero", num_classes=3, classifier="mean")
        assert "its pooling by attention is not used" in str(mean.load_report)


@pytest.mark.parametrize("dropped", ["MAPHead_0/probe", "MAPHead_0/LayerNorm_0/scale", "pos_embedding", "embedding/bias",
                                     "MAPHead_0/MultiHeadDotProductAttention_0/value/bias", "Transformer/encoder_norm/scale"])
def test_siglip_without_one_of_its_arrays_is_refused(tmp_path, dropped):
    arrays = siglip(random_model(SIGLIP))
    del arrays[f"params/img/{dropped}"]
    with OpenedCheckpoint(save_arrays(tmp_path / "x.npz", arrays)) as file:
        refused("x.npz: ", load, file, SIGLIP, "zero")
        refused("x.npz: |positions 'none'", lambda: load(file, architecture(**{"gelu": "tanh"} | file.row), "zero"))


@pytest.mark.reference
@pytest.mark.parametrize("size", [28, 42])
@torch.inference_mode()
def test_siglip_of_big_vision_computes_what_timm_does(tmp_path, size):
    """timm reads the same file, with Google's GELU."""
    timm = pytest.importorskip("timm")
    theirs = timm.create_model("vit_base_patch16_siglip_224", patch_size=7, embed_dim=24, depth=2, num_heads=2, mlp_ratio=40 / 24,
                               img_size=28, num_classes=0, act_layer="gelu_tanh").eval()
    save_arrays(tmp_path / "x.npz", siglip(random_model(SIGLIP)))
    theirs.load_pretrained(str(tmp_path / "x.npz"))
    theirs.set_input_size((size, size)) if size != 28 else None
    ours = load(tmp_path / "x.npz", SIGLIP, "zero", img_size=size, position_resize="bicubic_antialias").eval()
    images = torch.randn(2, 3, size, size)
    assert (ours.pool(ours.forward_features(images)) - theirs(images)).abs().max() < 1e-5


def test_a_file_without_positions_is_refused(tmp_path):
    arrays = big_vision(GAP)
    del arrays["pos_embedding"]
    refused("it stores no positions .big_vision's sincos2d", load, save_arrays(tmp_path / "x.npz", arrays), GAP)


def test_stacked_blocks_are_counted(tmp_path):
    path = save_arrays(tmp_path / "x.npz", big_vision(GAP, stacked=True))
    refused("lacks: Transformer/encoderblock_2/.*The file has: width 48, 2 blocks, patch 16", load, path, GAP, num_layers=3)
    refused("the model lacks: Transformer/encoderblock_1/", load, path, GAP, num_layers=1)
    refused("lacks: cls; it has no cls token: use --classifier gap", load, path, TOKEN)


def test_a_stack_that_claims_a_billion_blocks_is_refused(tmp_path):
    arrays = big_vision(GAP, stacked=True) | {"Transformer/encoderblock/LayerNorm_0/scale": np.zeros((1 << 30, 0), np.float32)}
    refused("LayerNorm_0/scale claims 1073741824 blocks, more than any model has", load,
            save_arrays(tmp_path / "x.npz", arrays), GAP)


# ------------------------------------------------------------------------------------------------ transformers


@pytest.mark.parametrize("later", [False, True])
@pytest.mark.parametrize("prefix", ["", "vit.", "deit."])
@pytest.mark.parametrize("case", ["deit", "deit_dist"])
@torch.inference_mode()
def test_names_of_transformers_give_the_published_logits(tmp_path, case, prefix, later):
    names = transformers_names(reference.torch_state(case), prefix, later)
    others = {f"{prefix}pooler.dense.weight": torch.ones(2), f"{prefix}embeddings.mask_token": torch.ones(1, 1, 2),
              "decoder.decoder_norm.weight": torch.ones(3)}
    save_file(names | others, tmp_path / "x.safetensors")
    model = load(tmp_path / "x.safetensors", reference.TORCH_ROWS[case]).eval()
    assert (model(reference.torch_images(case)) - reference.torch_expected(case)["logits"]).abs().max() < 1e-5
    assert model.load_report.left_out == ["decoder.decoder_norm.weight", "embeddings.mask_token", "pooler.dense.weight"]
    assert set(model.load_report.used) == set(model.state_dict()) and checkpoint_head(tmp_path / "x.safetensors") == (10, 0)


def test_a_masked_autoencoder_of_transformers_starts_an_encoder(tmp_path):
    """In a model that pools the patches; the norm and the decoder are not used."""
    state = torch.load(reference.TORCH / "mae_pretrain_enc.pth", weights_only=True)["model"]
    torch.save(transformers_names(state, "vit.") | {"decoder.mask_token": torch.ones(1)}, tmp_path / "x.bin")
    paths = tmp_path / "x.bin", reference.TORCH / "mae_pretrain_enc.pth"
    model, plain = (load(path, reference.TORCH_ROWS["mae_gp1"], "zero", num_classes=6) for path in paths)
    assert model.load_report.left_out == ["layernorm.bias", "layernorm.weight", "decoder.mask_token"]
    assert model.load_report.fresh == ["fc_norm.bias", "fc_norm.weight", "head.bias", "head.weight"]
    assert same_state(model, plain)


def test_two_arrays_for_one_parameter_are_refused(tmp_path):
    names = transformers_names(reference.torch_state("deit"), "vit.")
    torch.save(names | {"cls_classifier.weight": names["classifier.weight"]}, tmp_path / "x.bin")
    refused("both classifier.weight and cls_classifier.weight are classifier.weight", load, tmp_path / "x.bin",
            reference.TORCH_ROWS["deit"])


# ---------------------------------------------------------------------------------------------------- wrappers


@pytest.mark.parametrize("rename", [
    lambda name: f"module.{name}",
    lambda name: f"_orig_mod.model.backbone.{name}",
    lambda name: f"module.{name}" if name.startswith("blocks") else name,
], ids=["all", "several", "some"])
@torch.inference_mode()
def test_prefixes_of_wrappers_are_stripped(tmp_path, rename):
    state = {rename(name): value for name, value in reference.torch_state("deit").items()}
    torch.save({"state_dict": state}, tmp_path / "x.pth")
    model = load(tmp_path / "x.pth", reference.TORCH_ROWS["deit"]).eval()
    assert (model(reference.torch_images("deit")) - reference.torch_expected("deit")["logits"]).abs().max() < 1e-5


@torch.inference_mode()
def test_google_s_names_are_read_in_other_kinds_of_files(tmp_path):
    save_file({name: torch.from_numpy(np.array(array)) for name, array in reference.arrays(reference.weights(GAP)).items()},
              tmp_path / "x")
    assert same_state(load(tmp_path / "x", GAP), load(reference.weights(GAP), GAP))
