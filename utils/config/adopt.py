"""Start weights of another program: the settings that the file tells, where no flag sets them."""

from configs import FAMILIES, MODELS

from .flags import SIZES
from .records import DEFAULT, MODEL, START, Facts, Values
from .types import ConfigError

VIEW = ("interpolation", "eval_crop")


def put_view(values: Values) -> None:
    """How the model's publisher shows it images, where neither a flag nor the recipe says how."""
    row = MODELS[values["model_type"]]
    values.put(MODEL, {key: row[key] for key in VIEW if values.sources[key] in (DEFAULT, MODEL)})


def adopt_file(values: Values, flags: dict, facts: Facts) -> None:
    """The architecture of the file, unless --model_type names one; its image size where that belongs to the weights.

    facts.start_row: `model_type`, the row of configs.py that it is of; the sizes that it has otherwise; `classifier`, if it can
    have no other; `img_size`, that of its positions, and `names_img_size`, whether its config.json says so;
    `interpolation`, `eval_crop` and `tta` of that. Raises ConfigError where the number of heads is unknown.
    """
    row, before = facts.start_row, values["model_type"]
    sizes = {key: row.get(key) for key in SIZES}
    adopted = "model_type" not in flags and (row["model_type"] != before or any(
        (values[key] or MODELS[before][key]) != (sizes[key] or MODELS[before][key]) for key in SIZES if key not in flags))
    if adopted:
        values.put(START, {"model_type": row["model_type"]} | {key: sizes[key] for key in SIZES if key not in flags})
        if any(sizes.values()) and values["num_heads"] is None:
            raise ConfigError(f"--pretrained_dir {facts.start_path}: its sizes (width {sizes['hidden_size']}, "
                              f"{sizes['num_layers']} blocks) are those of no known model, and it does not say how many "
                              f"attention heads it has. Most models have one for 64 columns of the width: add --num_heads "
                              f"{max(1, sizes['hidden_size'] // 64)}, if that is so here")
        for key in ("img_size", "dropout_rate"):
            if values.sources[key] == MODEL:
                values.put(MODEL, {key: MODELS[row["model_type"]][key]})
        put_view(values)
    own = values["classifier"] or MODELS[values["model_type"]].classifier
    if "classifier" not in flags and row.get("classifier", own) != own:
        values.put(START, {"classifier": row["classifier"]})
    if "in_channels" not in flags and row.get("in_channels", 3) == 1:
        values.put(START, {"in_channels": 1})
    own_size = values["head"] == "keep" or row["names_img_size"] or (adopted and any(sizes.values()))
    if "img_size" in row and "img_size" not in flags and own_size:
        values.put(START, {"img_size": row["img_size"]})
    same_task = values["head"] == "keep"
    brought = same_task or values["model_type"] in FAMILIES         # for a new task too: of the others the recipe's is told
    values.put(START, {key: row[key] for key in (*VIEW, *["tta"] * same_task) if key in row and key not in flags and brought
                       and (same_task or values.sources[key] == MODEL)})
