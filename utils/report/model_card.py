"""The model card of an exported folder: a README.md for people and for the Hugging Face hub."""

from collections.abc import Mapping, Sequence

TITLES = {"data": "Data", "training": "Training", "metrics": "Metrics"}
RESIZED = {"center": "its shorter side is made the size divided by {crop:g}, its shape kept, and the middle is cut out",
           "squash": "the whole image is made the size, its shape not kept"}
EXIF = {"follow": "were turned upright as their EXIF orientation says", "off": "were used as stored, whatever EXIF says"}
ALPHA = {"white": "were put on white", "black": "were put on black", "mask": "are the picture: only the alpha channel counts",
         "ignore": "showed the colors below"}

# How this project resizes a table of positions where timm does it differently: a key of models/layers.py RESIZE_RULES.
POSITIONS = {"bilinear": "linearly, corners on corners", "bilinear_unaligned": "linearly", "bicubic": "by cubic functions",
             "bicubic_offset": "by cubic functions, shifted by a tenth of a patch"}

USE = """```python
import timm
model = timm.create_model("local-dir:path/to/this/folder", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_data_config(model=model))

from transformers import pipeline
pipeline("image-classification", model="path/to/this/folder")("photo.jpg")
```

transformers opens it by its TimmWrapper (AutoModelForImageClassification, AutoImageProcessor), which needs timm."""


def text(config: Mapping, own: Mapping, notes: Sequence[str] = ()) -> str:
    """Return the text of the card. config: the folder's config.json. own: its part about the run (`reading`, `card`). notes:
    lines on what timm computes differently."""
    facts = own["card"]
    seen, classes = config["pretrained_cfg"], config["label_names"]
    channels, height, width = seen["input_size"]
    model = facts.get("model", {})
    kind = model.get("called") or model.get("architecture", config["architecture"])
    parts = [
        "---\nlibrary_name: timm\npipeline_tag: image-classification\ntags:\n- image-classification\n- timm\n- transformers\n---",
        f"# {model.get('name', kind)}",
        f"A {kind} for {len(classes):,} classes, on images of {height} x {width} pixels{' (gray)' * (channels == 1)}. timm's "
        f"name: {config['architecture']}, with the model_args of config.json; label_names there are the classes, in the order of "
        "the outputs.",
        USE,
        *[f"## {title}\n\n{_table(facts[section])}" for section, title in TITLES.items() if facts.get(section)],
        "## Preprocessing\n\n" + "\n".join(_preprocessing(seen, own.get("reading"), facts)),
        "## Start weights and licence\n\n" + _start(facts.get("start", {}))]
    if notes:
        said = [line.removeprefix("warning: ") for line in notes]
        parts.insert(4, "\n".join(f"{line[0].upper()}{line[1:]}." for line in said))
    return "\n\n".join(parts) + "\n"


def _table(values: Mapping[str, object]) -> str:
    rows = [f"| {_cell(name)} | {_cell(value)} |" for name, value in values.items()]
    return "\n".join(["| | |", "|---|---|", *rows])


def _cell(value: object) -> str:
    shown = format(value, ".4g") if isinstance(value, float) else format(value, ",") if isinstance(value, int) else str(value)
    return " ".join(shown.replace("|", "\\|").split())


def _preprocessing(seen: Mapping, reading: Mapping | None, facts: Mapping) -> list[str]:
    """Describe what config.json says of images, and then what it cannot say."""
    channels, height, width = seen["input_size"]
    lines = [f"- Size {height} x {width}, {seen['interpolation']}: {RESIZED[seen['crop_mode']].format(crop=seen['crop_pct'])}.",
             f"- Then (x / 255 - mean) / std, mean {seen['mean']}, std {seen['std']}.", "- What config.json cannot say:"]
    unsaid = ["Large JPEGs were decoded no larger than needed, and the ends of images more than 64 times as long as wide cut "
              "off: pixels may differ a little from those of a full decode."]
    if channels == 1:
        unsaid.append('Images were converted to gray (Pillow\'s convert("L")): do the same before using timm or transformers.')
    if reading:
        low, high = reading["intensity_range"]
        unsaid += [f"Images {EXIF[reading['exif']]}.", f"Transparent parts {ALPHA[reading['alpha']]}.",
                   f"Of images of 16 bits a channel the values {low} to {high} became black to white."]
    if rule := POSITIONS.get(facts.get("model", {}).get("positions")):
        unsaid.append(f"For images of another size this model's table of positions is resized {rule}; timm uses cubic functions "
                      "and smooths.")
    if facts.get("training", {}).get("tta") == "flip":
        unsaid.append("The metrics are for the mean over each image and its mirror image (--tta flip).")
    return lines + [f"  - {line}" for line in unsaid]


def _start(start: Mapping) -> str:
    said, terms = start.get("license"), start.get("terms")
    if said and terms:
        return (f"Started from: {_cell(start.get('weights', 'not known'))}. Their licence: {_cell(said)} ({_cell(terms)}). Read "
                "what it allows for models made from these weights, and include the licence if it requires that.")
    return (f"Started from: {_cell(start.get('weights', 'not known'))}. " + (
        f"Their licence: {_cell(said)}." if said else
        "" if str(start.get("weights")).startswith("none") else "Their licence is not known here.")).strip()
