"""The preprocessing of a run in words, and its differences from that of the start weights."""

import pytest

from utils.config import Facts, describe_view, resolve, view_notes

FOLDER = {"dataset": "folder", "recipe": "vit-paper", "pretrained_dir": "w.pth"}
DEIT = {"interpolation": "bicubic", "eval_crop": 0.875, "img_size": 224, "by": "their publisher"}
GOOGLE = {"interpolation": "bilinear", "eval_crop": 0.0, "img_size": 384, "by": "their publisher"}


def config(**flags):
    return resolve(FOLDER | flags, Facts(1000, 10, start_path="w.pth", start_head_classes=10))


@pytest.mark.parametrize(("flags", "words"), [
    ({"crop_scale": 0.5, "interpolation": "bicubic", "eval_crop": 0.875},
     "training: random crops of 50 to 100 % of the area, mirrored half of the time, bicubic; "
     "evaluation: shape kept, the middle 87.5 % of the shorter side, bicubic"),
    ({"augmentation": "none"}, "training: the whole image, its shape not kept, bilinear; "
                               "evaluation: the whole image, its shape not kept, bilinear"),
    ({"augmentation": "pad_flip", "mixup_alpha": 0.1, "eval_crop": 1.0},
     "training: the whole image, its shape not kept, moved by up to 4 pixels, mirrored half of the time, mixed, bilinear; "
     "evaluation: shape kept, as much of the middle as fits, bilinear"),
    ({"augmentation": "crop", "rotation": 7.2, "color_jitter": 0.1, "randaugment_ops": 2, "random_erasing": 0.2},
     "training: random crops of 5 to 100 % of the area, turned by up to 7.2 degrees, colors varied, RandAugment, partly erased, "
     "bilinear; evaluation: the whole image, its shape not kept, bilinear"),
    ({"eval_only": True}, "evaluation: the whole image, its shape not kept, bilinear"),
    ({"eval_only": True, "tta": "flip"}, "evaluation: the whole image, its shape not kept, bilinear, and its mirror image")],
    ids=str)
def test_preprocessing_is_described_in_words(flags, words):
    assert describe_view(config(**flags), can_flip=True) == words


def test_digits_are_not_mirrored_and_not_called_squeezed():
    assert "mirrored" not in describe_view(config(), can_flip=False)
    digits = resolve({}, Facts(1000, 10))
    assert describe_view(digits, False) == "training: the whole image, bilinear; evaluation: the whole image, bilinear"
    oblong = resolve({"img_size": (8, 16)}, Facts(1000, 10))
    assert "evaluation: the whole image, its shape not kept" in describe_view(oblong, False)


@pytest.mark.parametrize(("view", "flags", "lines"), [
    (None, {}, []), (GOOGLE, {}, []), (GOOGLE, {"img_size": 512}, []),
    (GOOGLE, {"interpolation": "bicubic", "eval_crop": 0.9}, []),
    (DEIT, {"interpolation": "bicubic", "eval_crop": 0.9}, []), (DEIT, {"interpolation": "bilinear", "eval_crop": 0.0}, []),
    (DEIT, {"recipe": "mae", "dataset": "folder"}, []), (DEIT, {"recipe": "photos"}, []),
    (GOOGLE, {"recipe": "photos"}, ["note: these weights were evaluated differently, as their publisher says (the whole image, "
                                    "its shape not kept, bilinear), and the recipe differs on purpose. To do so here, add "
                                    "--interpolation bilinear --eval_crop 0"]),
    (GOOGLE, {"recipe": "photos", "interpolation": "bicubic"}, ["To do so here, add --eval_crop 0"]),
    (DEIT, {}, ["note: these weights were evaluated differently, as their publisher says (shape kept, the middle 87.5 % of the "
                "shorter side, bicubic). To do so here, add --interpolation bicubic --eval_crop 0.875"]),
    (DEIT, {"eval_crop": 1.0}, ["(shape kept, the middle 87.5 % of the shorter side, bicubic). "
                                "To do so here, add --interpolation bicubic"]),
    (GOOGLE, {"img_size": 64}, ["warning: images of 64 px have far fewer patches than those of 384 px that the weights were made "
                                "with, so much of what they learned is lost. Add --img_size 384 (IMG_SIZE)"]),
    (GOOGLE | {"img_size": (384, 192)}, {"img_size": (128, 64)}, ["Add --img_size 384x192"]),
    ({"unknown_mean": True, "by": "x"}, {}, ["note: w.pth does not say by which mean and standard deviation its images were "
                                             "normalized: this run uses those of ViT-B_16. If they were "
                                             "others, add --mean and --std, or put its config.json into its folder"])], ids=str)
def test_differences_that_matter_for_a_new_task_are_reported(view, flags, lines):
    """Larger images, and a crop instead of squeezing, are usual. A flag is intended. What a recipe does is reported."""
    found = view_notes(config(**flags), Facts(1000, 10, start_view=view, start_path="w.pth"))
    assert len(found) == len(lines) and all(words in line for words, line in zip(lines, found)), found


@pytest.mark.parametrize(("view", "flags", "marks"), [
    (DEIT, {"interpolation": "bicubic", "eval_crop": 0.875}, []), (DEIT, {}, ["warning"]),
    ({"untaken": {"eval_crop": "crop: border"}, "by": "x"}, {}, ["warning"]),
    ({"untaken": {"eval_crop": "crop: border"}, "by": "x"}, {"eval_crop": 1.0}, []), (DEIT, {"eval_crop": 1.0}, ["note"]),
    (GOOGLE, {}, ["warning"]), (GOOGLE, {"img_size": 384}, []), (GOOGLE, {"img_size": 512}, ["note"]),
    (GOOGLE, {"img_size": 384, "interpolation": "bicubic"}, ["note"])], ids=str)
def test_all_differences_are_reported_when_a_kept_head_is_evaluated(view, flags, marks):
    """Any difference may change the result from the published one. Flags are intended."""
    found = view_notes(config(eval_only=True, **flags), Facts(1000, 10, start_view=view, start_path="w.pth"))
    assert [line.partition(":")[0] for line in found] == marks
