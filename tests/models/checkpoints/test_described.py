"""Folders of timm and transformers: their weights, and what their JSON files say about the model."""

import json
from pathlib import Path

import pytest
import torch
from filling import load, random_model, refused
from other_programs import transformers_names
from safetensors.torch import save_file

from configs import architecture
from models.checkpoints.described import describe, is_weights_folder
from models.checkpoints.opened import OpenedCheckpoint

ROW = architecture(4, 24, 40, 2, 1, img_size=8)
STATE = random_model(ROW, 2).state_dict()
VIT = {"model_type": "vit", "hidden_act": "gelu", "layer_norm_eps": 1e-12, "image_size": 8, "num_attention_heads": 2,
       "id2label": {"1": "bee", "0": "ant"}}
TIMM = {"architecture": "vit_tiny_patch16_224", "num_classes": 2, "label_names": ["ant", "bee"], "pretrained_cfg": {
    "tag": "mine", "mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "input_size": [3, 8, 8], "interpolation": "bicubic",
    "crop_pct": 0.9}}


def folder_of(path: Path, config: dict | None, names=lambda state: state, file: str = "model.safetensors", **more: dict) -> Path:
    """Write a folder with weights in timm's names, or others; `more`: JSON files by the first part of their names."""
    path.mkdir(exist_ok=True)
    state = {name: value.clone() for name, value in names(STATE).items()}
    save_file(state, path / file) if file.endswith("safetensors") else torch.save(state, path / file)
    for name, values in {"config": config, **more}.items():
        if values is not None:
            (path / f"{name}.json").write_text(json.dumps(values))
    return path


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("by_file", [False, True])
def test_a_folder_of_transformers(tmp_path, file, by_file):
    folder = folder_of(tmp_path / "x", VIT | {"hidden_act": "gelu_new"}, lambda state: transformers_names(state, "vit."), file,
                       preprocessor_config={"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6], "resample": 3})
    assert is_weights_folder(folder)
    with OpenedCheckpoint(folder / file if by_file else folder) as opened:
        assert opened.path == folder / file and opened.class_names == ["ant", "bee"] and opened.settings is None
        assert opened.computed == {"gelu": "tanh", "norm_eps": 1e-12, "mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6)}
        assert (opened.row["num_heads"], opened.row["img_size"], opened.view) == (2, 8, {"interpolation": "bicubic"})
    model = load(folder, ROW)
    assert (model.config.gelu, model.config.norm_eps, model.load_report.classes) == ("tanh", 1e-12, ["ant", "bee"])
    assert model.norm.eps == model.blocks[0].norm2.eps == 1e-12


@pytest.mark.parametrize("more, gelu", [
    ({}, "erf"), ({"pretrained_cfg": {"tag": "augreg_in21k_ft_in1k"}}, "tanh"),
    ({"pretrained_cfg": {"tag": "augreg2_in21k"}}, "erf"),
    ({"architecture": "vit_base_patch16_siglip_gap_224", "pretrained_cfg": {"tag": "webli"}}, "tanh"),
    ({"pretrained_cfg": {"tag": "augreg_in1k"}, "model_args": {"act_layer": "gelu"}}, "erf"),
    ({"model_args": {"act_layer": "gelu_tanh"}}, "tanh")])
def test_a_folder_of_timm(tmp_path, more, gelu):
    """A user's own model computes the exact GELU; Google's weights that timm publishes were trained with the tanh form."""
    with OpenedCheckpoint(folder_of(tmp_path / "x", TIMM | more)) as opened:
        assert opened.computed["gelu"] == gelu and opened.class_names == ["ant", "bee"]
    with OpenedCheckpoint(folder_of(tmp_path / "y", TIMM)) as opened:
        assert opened.computed == {"gelu": "erf", "norm_eps": 1e-6, "rope": "", "mean": (0.1, 0.2, 0.3),
                                   "std": (0.4, 0.5, 0.6)}
        assert opened.view == {"interpolation": "bicubic", "eval_crop": 0.9} and opened.row["img_size"] == 8


SQUARE_FIRST = {"eval_crop": "images are made square before a crop of 0.9"}


@pytest.mark.parametrize("seen, view, untaken", [
    ({"crop_mode": "squash", "crop_pct": 1.0}, {"eval_crop": 0.0}, {}),
    ({"crop_mode": "squash"}, {"eval_crop": 0.9}, SQUARE_FIRST),
    ({"crop_mode": "border"}, {}, {"eval_crop": "crop: border, 0.9"}), ({"crop_mode": "center"}, {"eval_crop": 0.9}, {}),
    ({"interpolation": "lanczos"}, {"eval_crop": 0.9}, {"interpolation": "interpolation lanczos"}),
    ({"crop_pct": 1.5}, {}, {"eval_crop": "crop: 1.5"}), ({"crop_pct": None}, {}, {})])
def test_a_folder_of_timm_says_how_images_are_cropped(tmp_path, seen, view, untaken):
    folder = folder_of(tmp_path / "x", TIMM | {"pretrained_cfg": TIMM["pretrained_cfg"] | seen})
    found = describe(folder / "model.safetensors")
    assert found.view == ({} if "interpolation" in untaken else {"interpolation": "bicubic"}) | view and found.untaken == untaken


@pytest.mark.parametrize("seen, view, untaken", [
    ({"size": {"shortest_edge": 40}, "do_center_crop": True, "crop_size": {"height": 36, "width": 36}}, {"eval_crop": 0.9}, {}),
    ({"size": {"shortest_edge": 40}, "do_center_crop": True, "crop_size": 36}, {"eval_crop": 0.9}, {}),
    ({"size": {"height": 40, "width": 40}, "do_center_crop": True, "crop_size": 36}, {"eval_crop": 0.9}, SQUARE_FIRST),
    ({"size": 40, "do_center_crop": True, "crop_size": 36}, {"eval_crop": 0.9}, SQUARE_FIRST),
    ({"size": {"height": 8, "width": 12}, "do_center_crop": False, "crop_size": 36}, {"eval_crop": 0.0}, {}),
    ({"size": 8, "resample": 1}, {"eval_crop": 0.0}, {"interpolation": "interpolation resample 1"}),
    ({"size": {"shortest_edge": 40}, "crop_pct": 0.8}, {"eval_crop": 0.8}, {}),
    ({"size": {"shortest_edge": 40}}, {}, {"eval_crop": "crop: size {'shortest_edge': 40}, crop_size None"}),
    ({"size": 40, "do_center_crop": True, "crop_size": {"height": 36, "width": 30}}, {},
     {"eval_crop": "crop: size 40, crop_size {'height': 36, 'width': 30}"}),
    ({"size": 40, "do_center_crop": True, "crop_size": 50}, {}, {"eval_crop": "crop: size 40, crop_size 50"})])
def test_a_folder_of_transformers_says_how_images_are_cropped(tmp_path, seen, view, untaken):
    found = describe(folder_of(tmp_path / "x", VIT, preprocessor_config=seen) / "model.safetensors")
    assert (found.view, found.untaken) == (view, untaken)


@pytest.mark.parametrize("seen, mean, std", [
    ({"do_rescale": True, "rescale_factor": 0.00392156862745098}, 0.5, 0.25), ({"do_rescale": False}, 0.5 / 255, 0.25 / 255),
    ({"rescale_factor": 2 / 255}, 0.25, 0.125), ({"rescale_factor": 2 / 255, "do_normalize": False}, 0, 0.5)])
def test_a_folder_of_transformers_says_how_pixels_are_scaled(tmp_path, seen, mean, std):
    seen = {"image_mean": [0.5] * 3, "image_std": [0.25] * 3, **seen}
    found = describe(folder_of(tmp_path / "x", VIT, preprocessor_config=seen) / "model.safetensors")
    assert found.row["mean"] == pytest.approx([mean] * 3) and found.row["std"] == pytest.approx([std] * 3)


def test_classes_by_name(tmp_path):
    labels = {"id2label": None, "label2id": {"bee": 1, "ant": "0"}}
    assert describe(folder_of(tmp_path / "x", VIT | labels) / "model.safetensors").classes == ["ant", "bee"]


READ = {"exif": "off", "intensity_range": [0, 4095], "alpha": "mask"}


def test_a_folder_of_ours_says_how_its_run_read_images(tmp_path):
    own = {"reading": READ, "tta": "flip", "card": {"data": {"images": 5, "data set": "digits"}}}
    names = ["tab\t", "x" * 300]
    described = describe(folder_of(tmp_path / "x", TIMM | {"label_names": names, "vit_run": own}) / "model.safetensors")
    assert described.view == {"interpolation": "bicubic", "eval_crop": 0.9, **READ, "intensity_range": (0, 4095), "tta": "flip"}
    assert described.card == own["card"] and described.classes == names


@pytest.mark.parametrize("own, message", [
    ([], "vit_run a list of 0: must be a dictionary"), ({}, "vit_run lacks card"),
    ({"card": {}, "reading": READ | {"exif": "up"}}, "vit_run.reading.exif 'up': must be 'follow' or 'off'"),
    ({"card": {}, "reading": READ | {"intensity_range": [5, 5]}}, "vit_run.reading.intensity_range a list of 2: must be two"),
    ({"card": {}, "tta": "rotate"}, "vit_run.tta 'rotate': must be 'none' or 'flip'"),
    ({"card": {"data": {"x": [1]}}}, "vit_run.card.data.x a list of 1: must be text or a number"),
    ({"card": {}, "code": "x"}, "vit_run has code, which this version does not know")])
def test_false_values_in_a_folder_of_ours_are_reported_in_one_line(tmp_path, own, message):
    refused(f"config.json: {message}", load, folder_of(tmp_path / "x", TIMM | {"vit_run": own}), ROW)


@pytest.mark.parametrize("labels", [None, {"0": "LABEL_0", "1": "LABEL_1"}, {"0": "a", "1": "b", "2": "c"}, {"0": "a", "2": "b"}])
def test_unusable_class_names_are_ignored(tmp_path, labels):
    """Numbers instead of names, another number of names than classes, a gap."""
    folder = folder_of(tmp_path / "x", VIT | {"id2label": labels}, lambda state: transformers_names(state, "vit."))
    with OpenedCheckpoint(folder) as opened:
        assert opened.class_names is None


def test_a_config_json_belongs_only_to_files_of_the_usual_names(tmp_path):
    folder_of(tmp_path / "x", VIT)
    torch.save(STATE, tmp_path / "x/mine.pth")
    assert describe(tmp_path / "x/mine.pth").row == {} != describe(tmp_path / "x/model.safetensors").row


def test_adapters_are_refused_by_name(tmp_path):
    folder = folder_of(tmp_path / "x", None, adapter_config={"base_model_name_or_path": "google/vit-base"})
    refused("x: a LoRA adapter .adapter_config.json., which holds only changes to the weights of google/vit-base. "
            "Merge them with peft", load, folder, ROW)


def test_weights_in_several_files_are_refused(tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    refused("its weights are in several files .*save them in one", load, tmp_path, ROW)


@pytest.mark.parametrize("text, message", [
    ("{", "config.json: cannot be read as JSON"), ("[1]", "config.json: is not a JSON object"),
    ("[" * 100_000, "config.json: cannot be read as JSON"),
    (json.dumps(VIT | {"hidden_act": "relu"}), "config.json: its activation is relu, but models here use GELU"),
    (json.dumps(VIT | {"image_size": "x"}), "config.json: its image size is x, not a side or"),
    (json.dumps(VIT | {"num_hidden_layers": [1]}), "its num_hidden_layers is .1., not a number"),
    (json.dumps(VIT | {"id2label": [1]}), "its id2label is .1., not a JSON object"),
    (json.dumps(VIT | {"hidden_act": ["gelu"]}), "its activation is ..gelu.., but models here use GELU"),
    (json.dumps(VIT | {"image_size": 10 ** 9}), "its images are 1000000000 x 1000000000 px"),
    (json.dumps(VIT | {"id2label": {"a": "b"}}), "not a config.json"),
    (json.dumps(VIT | {"layer_norm_eps": "nan"}), "its layer_norm_eps is nan, not a number"),
    (json.dumps(TIMM | {"pretrained_cfg": {"mean": [1, 2]}}), "must be 1 or 3 numbers each, not .1, 2."),
    (json.dumps(TIMM | {"pretrained_cfg": {"std": [1, 1, 0]}}), "its std of the images must be one number for each channel"),
    (json.dumps(TIMM | {"pretrained_cfg": {"mean": [1, 1, float("nan")]}}), "must be 1 or 3 numbers each, not .1, 1, nan."),
    (json.dumps(TIMM | {"pretrained_cfg": 3}), "its pretrained_cfg is 3, not a JSON object"),
    (json.dumps(TIMM | {"model_args": [1]}), "its model_args is .1., not a JSON object"),
    (json.dumps(TIMM | {"model_args": {"depth": "x"}}), "its depth is x, not a number"),
    (json.dumps(TIMM | {"model_args": {"act_layer": {"a": 1}}}), "its activation is"),
    (json.dumps(TIMM | {"pretrained_cfg": {"input_size": 5}}), "a value in it has another type than theirs"),
    (json.dumps(TIMM | {"model_args": {"num_heads": 3}}), "its model has 3 attention heads, but the model here has 2")])
def test_false_json_is_reported_in_one_line(tmp_path, text, message):
    (folder_of(tmp_path / "x", None) / "config.json").write_text(text)
    refused(message, load, tmp_path / "x", ROW)


@pytest.mark.parametrize("row", [5, {"gelu": 5}, {"gelu": "x"}, {"norm_eps": -1.0}, {"mean": "abc"}, {"mean": [[1]]},
                                 {"std": [0, 0, 0]}])
def test_a_false_note_in_a_file_of_ours_is_reported_in_one_line(tmp_path, row):
    """A correct file next to false ones: an entry that is not a row is ignored."""
    save_file({name: value.clone() for name, value in STATE.items()}, tmp_path / "x.safetensors", {"vit_row": json.dumps(row)})
    if row == 5:
        assert load(tmp_path / "x.safetensors", ROW).config.gelu == "erf"
    else:
        refused("must be|must have the type", load, tmp_path / "x.safetensors", ROW)


def test_images_may_be_unnormalized_and_arrays_numpy_s(tmp_path):
    """do_normalize false; numpy arrays in a file of that name."""
    folder = folder_of(tmp_path / "x", VIT, file="pytorch_model.bin", preprocessor_config={"do_normalize": False})
    torch.save({name: value.numpy() for name, value in transformers_names(STATE, "vit.").items()}, folder / "pytorch_model.bin")
    model = load(folder, ROW)
    assert (model.config.mean, model.config.std) == ((0.0,) * 3, (1.0,) * 3)
