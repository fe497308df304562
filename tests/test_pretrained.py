"""Loading checkpoints in Google's layout, saying what became of every array, and writing them."""

import os
import pickle

import numpy as np
import pytest
import reference
import torch

from configs import MODELS
from models import ModelError, create_model, load_pretrained, pretrained, save_npz
from models.pretrained import checkpoint_head

ROWS, CASE = reference.ROWS, "g_p16_pre"
HEAD = {"head.weight", "head.bias"}
HEAD_ARRAYS = {"head/kernel", "head/bias", "pre_logits/kernel", "pre_logits/bias"}


def load(path, case: str = CASE, head: str = "keep", **more):
    return create_model(ROWS[case], pretrained=path, head=head, **more)


def edited(path, case: str = CASE, remove: tuple = (), save=np.savez, **changes):
    """A copy of the case's checkpoint at `path` with some arrays changed, added or removed."""
    arrays = {name: array for name, array in reference.arrays(reference.weights(case)).items() if name not in remove}
    with open(path, "wb") as stream:                     # a stream, because numpy adds .npz to other names
        save(stream, **arrays | changes)
    return path


def refused(message: str, call, *arguments, **more) -> str:
    with pytest.raises(ModelError, match=message) as error:
        call(*arguments, **more)
    text = str(error.value)
    assert "\n" not in text and len(text) < 600
    return text


def same_state(a, b) -> bool:
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# -------------------------------------------------------------------------------------------------- the report


@pytest.mark.parametrize("head", ["zero", "keep"])
@pytest.mark.parametrize("case", ROWS)
def test_every_array_and_every_parameter_is_accounted_for(case, head):
    model = load(reference.weights(case), case, head)
    report, parameters = model.load_report, set(model.state_dict())
    in_file = set(reference.arrays(reference.weights(case)))
    assert len(report.used) == len(set(report.used)) and set(report.used) | set(report.fresh) == parameters
    assert report.fresh == (sorted(HEAD) if head == "zero" else [])
    assert not set(report.used) & set(report.fresh) and report.resized == {} and report.notes == []
    assert report.left_out == (sorted(HEAD_ARRAYS & in_file) if head == "zero" else [])
    assert report.path == str(reference.weights(case))


@pytest.mark.parametrize("case, img_size, resized", [
    (CASE, 64, None), (CASE, 96, "4x4 -> 6x6"), (CASE, (32, 128), "4x4 -> 2x8"), ("g_p16_gap", (48, 80), "4x4 -> 3x5"),
    ("g_r50b", (32, 64), "4x4 -> 2x4"), ("g_p16_224", 384, "14x14 -> 24x24")])
def test_resized_positions_are_reported(case, img_size, resized):
    """4x4 and 2x8 have as many tokens and are another grid."""
    model = load(reference.weights(case), case, "zero", img_size=img_size)
    assert model.load_report.resized == ({"pos_embed": resized} if resized else {})
    table = torch.from_numpy(reference.arrays(reference.weights(case))["Transformer/posembed_input/pos_embedding"])
    assert (model.pos_embed.shape == table.shape and torch.equal(model.pos_embed, table)) == (resized is None)


def test_the_report_says_it_in_one_line():
    text = str(load(reference.weights(CASE), head="zero", img_size=96).load_report)
    assert text == (f"42 parameters from {reference.weights(CASE)}; pos_embed resized 4x4 -> 6x6; fresh: head.bias, head.weight; "
                    "left out of the file: head/bias, head/kernel, pre_logits/bias, pre_logits/kernel")


# ---------------------------------------------------------------------------------------------------- the head


def test_a_new_task_starts_with_a_zero_head_and_without_pre_logits():
    model = load(reference.weights(CASE), head="zero", num_classes=5).eval()
    assert not model.config.representation_size and not hasattr(model, "pre_logits")
    assert not model.head.weight.any() and not model.head.bias.any()
    assert torch.equal(model(reference.images(64)), torch.zeros(2, 5))


def test_a_head_that_was_trained_is_set_to_zero_again():
    model = create_model(ROWS[CASE], 5)
    torch.nn.init.ones_(model.head.weight), torch.nn.init.ones_(model.head.bias)
    load_pretrained(model, reference.weights(CASE))
    assert not model.head.weight.any() and not model.head.bias.any()


@pytest.mark.parametrize("case, classes, width", [(CASE, 21, 48), ("g_p16_gap", 9, 0), ("g_r50b", 11, 48), ("g_rti16", 8, 0)])
def test_keeping_takes_classes_and_pre_logits_from_the_file(case, classes, width):
    assert checkpoint_head(reference.weights(case)) == (classes, width)
    model = load(reference.weights(case), case)
    assert (model.num_classes, model.config.representation_size, hasattr(model, "pre_logits")) == (classes, width, width > 0)


def test_keeping_another_number_of_classes_is_refused():
    refused("its head has 21 classes, the model 20; .*head='zero' starts a new head",
            load, reference.weights(CASE), num_classes=20)


def test_pre_logits_cannot_start_a_new_task():
    refused("pre_logits can only be filled with head='keep'", load, reference.weights(CASE), head="zero", representation_size=48)


def test_head_has_two_values():
    refused("head='fresh': must be", load_pretrained, create_model(ROWS[CASE], 21), reference.weights(CASE), "fresh")


def test_a_file_without_a_head(tmp_path):
    path = edited(tmp_path / "x.npz", "g_p32", remove=("head/kernel", "head/bias"))
    refused("holds no head to keep", load, path, "g_p32")
    assert load(path, "g_p32", "zero").load_report.left_out == []


def test_an_all_zero_head_is_noted_when_it_is_kept(tmp_path):
    zero = np.zeros((48, 21), np.float32)
    path = edited(tmp_path / "x.npz", **{"head/kernel": zero})
    note, = load(path).load_report.notes
    assert "head is all zero" in note and note in str(load(path).load_report)
    assert load(path, head="zero").load_report.notes == []


def test_a_head_that_is_not_kept_is_not_read(tmp_path):
    """In 21k files it is the largest array: here it is damaged, which only reading it would tell."""
    path = edited(tmp_path / "x.npz", **{"head/kernel": np.full((48, 21), 7, np.float32)})
    path.write_bytes(path.read_bytes().replace(np.full(1008, 7, np.float32).tobytes(), np.full(1008, 8, np.float32).tobytes()))
    load(path, head="zero")
    refused("'head/kernel' is damaged", load, path)


# ------------------------------------------------------------------------------------------------ the dialects


def linen(name: str) -> str:
    return (name.replace("LayerNorm_2", "LayerNorm_1").replace("MultiHeadDotProductAttention_1", "MultiHeadDotProductAttention_0")
            .replace("MlpBlock_3", "MlpBlock_0"))


STATE = {"opt/state/step": np.int32(7), "opt/state/param_states/cls/momentum": np.ones((1, 1, 48), np.float32)}


@pytest.mark.parametrize("head", ["zero", "keep"])
@pytest.mark.parametrize("rename, more", [
    (linen, {}),
    (lambda name: f"opt/target/{name}", {}),
    (lambda name: f"opt/target/{name}", STATE),
    (lambda name: f"opt/target/{linen(name)}", STATE),
], ids=["linen", "target", "train_state", "train_state_linen"])
def test_other_dialects_give_the_same_model(tmp_path, rename, more, head):
    """Flax's own names of the modules, and a whole train state, whose optimizer is left out."""
    arrays = {rename(name): array for name, array in reference.arrays(reference.weights(CASE)).items()}
    np.savez(tmp_path / "x.npz", **arrays, **more)
    model, plain = load(tmp_path / "x.npz", head=head), load(reference.weights(CASE), head=head)
    assert same_state(model, plain)
    assert model.load_report.left_out == plain.load_report.left_out + sorted(more)


def test_unknown_arrays_beside_a_train_state(tmp_path):
    arrays = {f"opt/target/{name}": array for name, array in reference.arrays(reference.weights(CASE)).items()}
    np.savez(tmp_path / "x.npz", **arrays, surprise=np.ones(1))
    refused("unknown members beside the train state: surprise", load, tmp_path / "x.npz")


@pytest.mark.parametrize("dtype", [np.float16, np.float64, ">f4"])
def test_other_number_formats_are_read_as_float32(tmp_path, dtype):
    """float16 to its own precision, the others exactly."""
    arrays = {name: array.astype(dtype) for name, array in reference.arrays(reference.weights(CASE)).items()}
    np.savez(tmp_path / "x.npz", **arrays)
    model, plain = load(tmp_path / "x.npz"), load(reference.weights(CASE))
    for name, value in model.state_dict().items():
        want = plain.state_dict()[name]
        assert value.dtype == torch.float32
        assert torch.equal(value, want.half().float() if dtype == np.float16 else want), name


def test_fortran_order_and_deflated_files(tmp_path):
    arrays = {name: np.asfortranarray(array) for name, array in reference.arrays(reference.weights(CASE)).items()}
    np.savez_compressed(tmp_path / "x.npz", **arrays)
    assert same_state(load(tmp_path / "x.npz"), load(reference.weights(CASE)))


# ------------------------------------------------------------------------------- the wrong model, the wrong file


@pytest.mark.parametrize("file, row, message", [
    (CASE, ROWS["g_rti16"], "lacks: conv_root/kernel, gn_root/bias, gn_root/scale; is --model_type right"),
    ("g_rti16", ROWS[CASE], "lacks: Transformer/encoderblock_2/LayerNorm_0/bias"),
    ("g_r26s32", ROWS["g_r50b"], "lacks: block1/unit2/"),
    ("g_r50b", ROWS["g_p16_gap"], "that the model lacks: block1/unit1/conv1/kernel, .* and [0-9]+ more"),
    ("g_p32", ROWS["g_p16_lneps"], "that the model lacks: Transformer/encoderblock_2/"),
    ("g_p16_lneps", ROWS["g_p32"], "lacks: Transformer/encoderblock_2/"),
    ("g_p16_gap", ROWS["g_p16_lneps"], "lacks: cls;"),
    ("g_p16_lneps", ROWS["g_p16_gap"], "that the model lacks: cls;"),
    ("g_p16_lneps", MODELS["ViT-B_16"], "lacks: Transformer/encoderblock_10/"),
])
def test_a_file_of_another_model_is_refused(file, row, message):
    """With the names of the arrays that tell it."""
    refused(message, create_model, row, pretrained=reference.weights(file))


@pytest.mark.parametrize("more, name", [
    ({"patch_size": 32}, "embedding/kernel has shape (16, 16, 3, 48)"),
    ({"hidden_size": 60}, "embedding/kernel has shape (16, 16, 3, 48)"),
    ({"mlp_dim": 96}, "Transformer/encoderblock_0/MlpBlock_3/Dense_0/kernel has shape (48, 80)"),
    ({"num_heads": 4}, "Transformer/encoderblock_0/MultiHeadDotProductAttention_1/query/kernel has shape (48, 3, 16)"),
    ({"in_channels": 1}, "embedding/kernel has shape (16, 16, 3, 48)"),
])
def test_another_size_is_refused(more, name):
    text = refused("is --model_type right", load, reference.weights(CASE), head="zero", **more)
    assert name in text


BLOCK = "Transformer/encoderblock_1/"
ATTENTION = f"{BLOCK}MultiHeadDotProductAttention_1/"


@pytest.mark.parametrize("name, shape", [
    ("embedding/kernel", (48, 3, 16, 16)),                    # torch's order instead of HWIO
    ("cls", (1, 48)),
    (f"{BLOCK}MlpBlock_3/Dense_0/kernel", (80, 48)),          # transposed
    (f"{BLOCK}MlpBlock_3/Dense_1/bias", (49,)),
    (f"{BLOCK}LayerNorm_0/scale", (1, 48)),
    (f"{ATTENTION}query/kernel", (48, 48)),
    (f"{ATTENTION}query/bias", (48,)),
    (f"{ATTENTION}key/kernel", (48, 4, 12)),        # another number of heads
    (f"{ATTENTION}value/kernel", (3, 16, 48)),
    (f"{ATTENTION}key/bias", (16, 3)),
    (f"{ATTENTION}value/bias", (3, 15)),
    (f"{ATTENTION}out/kernel", (48, 3, 16)),
    ("Transformer/posembed_input/pos_embedding", (1, 18, 48)),     # 17 patches are no square
    ("Transformer/posembed_input/pos_embedding", (1, 1, 48)),
    ("Transformer/posembed_input/pos_embedding", (1, 17, 47)),
    ("Transformer/posembed_input/pos_embedding", (17, 48)),
    ("Transformer/posembed_input/pos_embedding", (2, 17, 48)),
    ("pre_logits/kernel", (48, 40)),
    ("pre_logits/bias", ()),
    ("head/kernel", (21, 48)),
    ("head/kernel", (48, 20)),
    ("head/bias", ()),
])
def test_an_array_of_another_shape_is_refused(tmp_path, name, shape):
    """With its name and its shape, whatever order the arrays are looked at in."""
    path = edited(tmp_path / "x.npz", **{name: np.zeros(shape, np.float32)})
    text = refused("does not fit", load, path)
    assert name in text and str(shape) in text


@pytest.mark.parametrize("shape", [(0,), (20,), (1, 21)])
def test_a_head_whose_bias_and_kernel_disagree_is_refused(tmp_path, shape):
    refused("head|num_classes", load, edited(tmp_path / "x.npz", **{"head/bias": np.zeros(shape, np.float32)}))


@pytest.mark.parametrize("shape", [(32,), (32, 1, 1, 1), (1, 1, 1, 64)])
def test_a_group_norm_of_another_shape_is_refused(tmp_path, shape):
    path = edited(tmp_path / "x.npz", "g_r50b", **{"gn_root/scale": np.zeros(shape, np.float32)})
    refused("gn_root/scale has shape", load, path, "g_r50b")


@pytest.mark.parametrize("head", ["zero", "keep"])
def test_a_missing_array(tmp_path, head):
    path = edited(tmp_path / "x.npz", remove=(f"{ATTENTION}out/bias",))
    refused(f"lacks: {ATTENTION}out/bias;", load, path, head=head)


@pytest.mark.parametrize("head", ["zero", "keep"])
def test_an_array_too_many(tmp_path, head):
    path = edited(tmp_path / "x.npz", **{"dist": np.ones(3, np.float32)})
    refused("that the model lacks: dist;", load, path, head=head)


def test_a_failed_load_leaves_the_model_as_it_was(tmp_path):
    """The last array of the file is damaged: nothing of the others has arrived."""
    model = create_model(ROWS["g_p32"], 5)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    path = edited(tmp_path / "x.npz", "g_p32", **{"Transformer/encoderblock_3/MlpBlock_3/Dense_1/bias": np.zeros(7, np.float32)})
    refused("Dense_1/bias", load_pretrained, model, path)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


class Touch:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def pickled_member(path, marker):
    edited(path, **{"head/bias": np.array([Touch(marker)], dtype=object)})


def pickled_file(path, marker):
    path.write_bytes(pickle.dumps({"state_dict": Touch(marker)}))


def torch_file(path, marker):
    torch.save({"state_dict": Touch(marker)}, path)


def old_torch_file(path, marker):
    torch.save({"state_dict": Touch(marker)}, path, _use_new_zipfile_serialization=False)


def html(path, marker):
    path.write_text("<!DOCTYPE html><html><body>Please sign in</body></html>")


def cut_off(path, marker):
    path.write_bytes(reference.weights(CASE).read_bytes()[:-1000])


def not_a_transformer(path, marker):
    with open(path, "wb") as stream:
        np.savez(stream, **{"layer1/kernel": np.ones(3), "head/bias": np.ones(3), "head/kernel": np.ones((3, 3))})


def empty_archive(path, marker):
    with open(path, "wb") as stream:
        np.savez(stream)


@pytest.mark.parametrize("make, message", [
    (pickled_member, "'head/bias' holds object, not plain numbers"),
    (pickled_file, "not a readable .npz archive"),
    (torch_file, "is not an array; a PyTorch checkpoint; a run goes on by --resume_path"),
    (old_torch_file, "not a readable .npz archive"),
    (html, "not a readable .npz archive .*download it again"),
    (cut_off, "not a readable .npz archive .*download it again"),
    (not_a_transformer, "not a Vision Transformer in Google's layout .its arrays: head/bias, "),
    (empty_archive, "holds no head|not a Vision Transformer"),
], ids=lambda value: getattr(value, "__name__", ""))
@pytest.mark.parametrize("suffix", [".npz", ".pth"])
@pytest.mark.parametrize("head", ["zero", "keep"])
def test_files_of_another_kind_are_refused_and_nothing_is_executed(tmp_path, make, message, suffix, head):
    path, marker = tmp_path / f"x{suffix}", tmp_path / "executed"
    make(path, marker)
    if make is pickled_member and head == "zero":
        load(path, head=head)                            # a head that is left out is not even looked at
    else:
        assert str(path) in refused(message, load, path, head=head)
    assert not marker.exists()


def test_a_folder_or_nothing_is_no_checkpoint(tmp_path):
    for path in (tmp_path, tmp_path / "absent.npz"):
        refused("no checkpoint at", load, path)
        refused("no checkpoint at", load_pretrained, create_model(ROWS[CASE], 21), path)


def test_the_file_s_name_does_not_matter(tmp_path):
    path = tmp_path / "R50+ViT-B_16"
    path.write_bytes(reference.weights(CASE).read_bytes())
    assert same_state(load(path), load(reference.weights(CASE)))


@pytest.mark.parametrize("name", ["head/bias", "pre_logits/bias"])
def test_sizes_are_believed_only_if_the_kernel_agrees(tmp_path, name):
    """create_model builds what checkpoint_head says: a few kB that claim millions of classes must not become gigabytes."""
    path = edited(tmp_path / "x.npz", save=np.savez_compressed, **{name: np.zeros(4_000_000, np.float32)})
    assert path.stat().st_size < 1 << 18
    refused(name.split("/")[0], checkpoint_head, path)


# ------------------------------------------------------------------------------------------------------ writing


@pytest.mark.parametrize("case", ROWS)
def test_ours_to_google_s_and_back(tmp_path, case):
    """The written file has the names, shapes and numbers of the one that was read, and numpy reads it."""
    model = load(reference.weights(case), case)
    save_npz(model, tmp_path / "new" / "x.npz")
    written, original = reference.arrays(tmp_path / "new" / "x.npz"), reference.arrays(reference.weights(case))
    assert written.keys() == original.keys()
    for name, array in original.items():
        assert (written[name].shape, written[name].dtype) == (array.shape, np.float32)
        np.testing.assert_array_equal(written[name], array)
    again = load(tmp_path / "new" / "x.npz", case)
    assert same_state(model, again) and (again.load_report.left_out, again.load_report.fresh) == ([], [])
    assert os.listdir(tmp_path / "new") == ["x.npz"]


def test_another_grid_and_precision_are_written_in_float32(tmp_path):
    model = load(reference.weights(CASE), img_size=96).bfloat16()
    save_npz(model, tmp_path / "x.npz")
    written = reference.arrays(tmp_path / "x.npz")
    assert written["Transformer/posembed_input/pos_embedding"].shape == (1, 37, 48)
    assert {array.dtype for array in written.values()} == {np.dtype(np.float32)}
    assert same_state(load(tmp_path / "x.npz", img_size=96), model.float())


def test_writing_leaves_the_model_alone(tmp_path):
    model = load(reference.weights(CASE))
    save_npz(model, tmp_path / "x.npz")
    assert same_state(model, load(reference.weights(CASE))) and model.training
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_an_unfinished_file_replaces_nothing_and_does_not_stay(tmp_path, monkeypatch, error):
    path = tmp_path / "x.npz"
    path.write_bytes(b"the old one")

    def breaks_off(stream, **arrays):
        stream.write(b"half")
        raise error

    monkeypatch.setattr(pretrained.np, "savez", breaks_off)
    with pytest.raises(type(error)):
        save_npz(create_model(ROWS[CASE], 21), path)
    assert path.read_bytes() == b"the old one" and os.listdir(tmp_path) == ["x.npz"]


# --------------------------------------------------------------------------------------------------- full size

FULL = {                                    # case: (published model, seed of the weights, largest difference of a logit)
    "full_Ti_16": ("ViT-Ti_16", 3101, 1e-4),
    "full_S_16": ("ViT-S_16", 3102, 1e-4),
    "full_B_16_21kpre": ("ViT-B_16", 3103, 1e-4),
    "full_R_Ti_16": ("R+ViT-Ti_16", 3104, 5e-4),
    "full_R26_S_32": ("R26+ViT-S_32", 3105, 5e-4),
    "full_R50_B_16": ("R50+ViT-B_16", 3106, 5e-4),
}


def weights_of_seed(layout: dict[str, tuple[int, ...]], seed: int) -> dict[str, np.ndarray]:
    """The random weights that the expected logits belong to (fixtures/README.md has the rule)."""
    random = np.random.default_rng(seed)
    arrays = {}
    for name in sorted(layout):
        shape = layout[name]
        *_, layer, kind = ["", *name.split("/")]
        x = random.standard_normal(shape, dtype=np.float32)
        if kind == "kernel":
            fan_in = np.prod(shape[:2] if layer == "out" else shape[:1] if layer in ("query", "key", "value") else shape[:-1])
            x *= np.float32((1.5 if layer in ("query", "key") else 1) / np.sqrt(fan_in))
            if layer in ("conv_root", "conv_proj", "conv1", "conv2", "conv3"):
                x *= 0.3 * np.exp(0.7 * random.standard_normal(shape[-1], dtype=np.float32))
        elif kind == "scale":
            x = 1 + np.float32(0.2) * x
        else:
            x *= np.float32({"bias": 0.1, "cls": 0.5, "pos_embedding": 0.2}[kind])
        arrays[name] = x
    return arrays


@pytest.mark.slow
@pytest.mark.parametrize("case", FULL)
@torch.inference_mode()
def test_full_size_models_give_google_s_logits(tmp_path, case):
    published, seed, largest = FULL[case]
    expected = reference.arrays(reference.FIXTURES / "full" / f"{case}_expected.npz")
    layout = {name: shape for name, shape in reference.published_layouts()[published].items()
              if case.endswith("21kpre") or not name.startswith("pre_logits")}
    arrays, path = weights_of_seed(layout, seed), tmp_path / "x.npz"
    checked = ("cls", "embedding/kernel", "Transformer/encoder_norm/bias", "head/kernel")
    sums = [np.abs(arrays[name]).sum(dtype=np.float64) for name in checked]
    np.testing.assert_allclose(sums, expected["param_checksums"], rtol=1e-5)

    np.savez(path, **arrays)
    del arrays
    model = create_model(published.replace("+", "-"), pretrained=path, head="keep").eval()
    path.unlink()                                                    # up to 400 MB
    image = reference.normalise(reference.arrays(reference.FIXTURES / "full" / "image_224.npz")["image"])
    assert np.abs(model(image).numpy() - expected["logits"]).max() < largest
