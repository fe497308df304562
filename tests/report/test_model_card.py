"""The model card of an exported folder."""

from utils.report import model_card

CONFIG = {"architecture": "vit_tiny_patch16_224", "label_names": ["a", "b"], "pretrained_cfg": {
    "input_size": [1, 8, 12], "interpolation": "bicubic", "crop_mode": "center", "crop_pct": 0.875, "mean": [0.5], "std": [0.25]}}
READ = {"exif": "follow", "intensity_range": [0, 4095], "alpha": "black"}
CARD = {"model": {"name": "flowers", "architecture": "ViT-Ti_16"}, "data": {"training images": 12345, "folder": "a|b\nc"},
        "metrics": {"val accuracy": 0.98754}, "start": {"weights": "mae/mae_pretrain_vit_base", "license": "CC-BY-NC-4.0"}}


def test_a_card_has_the_facts_of_the_run():
    text = model_card.text(CONFIG, {"card": CARD, "reading": READ}, ["warning: timm has an eps of its own"])
    for words in ("---\nlibrary_name: timm\n", "# flowers\n", "A ViT-Ti_16 for 2 classes, on images of 8 x 12 pixels (gray)",
                  "| training images | 12,345 |", r"| folder | a\|b c |", "| val accuracy | 0.9875 |", "TimmWrapper",
                  "Timm has an eps of its own.", "its shorter side is made the size divided by 0.875", "mean [0.5], std [0.25]",
                  'convert("L")', "turned upright", "put on black", "the values 0 to 4095 became black to white",
                  "Started from: mae/mae_pretrain_vit_base. Their licence: CC-BY-NC-4.0."):
        assert words in text, words
    assert "## Training" not in text and "--tta" not in text


def test_a_card_names_the_terms_of_the_start_weights_and_how_positions_are_resized():
    start = {"weights": "facebook/dinov3-x", "license": "dinov3-license", "terms": "https://a.b/"}
    text = model_card.text(CONFIG, {"card": {"model": {"positions": "bicubic_offset"}, "start": start}})
    assert text.endswith("Their licence: dinov3-license (https://a.b/). Read what it allows for models made from these weights, "
                         "and include the licence if it requires that.\n")
    assert "is resized by cubic functions, shifted by a tenth of a patch; timm uses" in text
    assert "resized" not in model_card.text(CONFIG, {"card": {"model": {"positions": "bicubic_antialias"}, "start": start}})


def test_a_card_without_a_run_leaves_out_what_is_unknown():
    text = model_card.text(CONFIG, {"card": {"start": {"weights": "x.pth"}}})
    assert "# vit_tiny_patch16_224\n" in text and "Their licence is not known here." in text
    assert not any(words in text for words in ("## Data", "## Metrics", "upright", "None"))
    assert model_card.text(CONFIG, {"card": {"start": {"weights": "none: trained from scratch"}}}).endswith(
        "Started from: none: trained from scratch.\n")
