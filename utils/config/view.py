"""The preprocessing of a run in words, and where it differs from that of its start weights."""

import os
from collections.abc import Mapping

from .records import FLAG, RECIPE, Config, Facts

SQUARE = ("digits", "cifar10", "cifar100", "mnist", "fashion_mnist")       # data sets in which every image is square
SMALL = 0.5              # of the side that the weights were made with: smaller images have too few patches


def describe_view(config: Config, can_flip: bool) -> str:
    """Return a line: 'training: random crops ..., mirrored, bicubic; evaluation: ..., bicubic'; with --eval_only only the latter.

    can_flip: whether mirrored images keep their class.
    """
    evaluation = f"evaluation: {_evaluated(config.interpolation, config.eval_crop, _whole(config))}"
    evaluation += ", and its mirror image" * (config.tta == "flip")
    return evaluation if config.eval_only else f"training: {_trained(config, can_flip)}; {evaluation}"


def _trained(config: Config, can_flip: bool) -> str:
    crop, _, flip = config.augmentation.partition("_")
    words = [{"crop": f"random crops of {100 * config.crop_scale:g} to 100 % of the area",
              "pad": f"{_whole(config)}, moved by up to {config.crop_padding} pixels",
              "none": _whole(config)}[crop]]
    words += ["mirrored half of the time"] * bool(flip and can_flip)
    words += [f"turned by up to {config.rotation:g} degrees"] * bool(config.rotation)
    words += ["colors varied"] * bool(config.color_jitter)
    words += ["RandAugment"] * bool(config.randaugment_ops)
    words += ["partly erased"] * bool(config.random_erasing)
    words += ["mixed"] * bool(config.mixup_alpha or config.cutmix_alpha)
    return ", ".join([*words, config.interpolation])


def _whole(config: Config) -> str:
    keeps = config.dataset in SQUARE and isinstance(config.img_size, int)
    return "the whole image" + ", its shape not kept" * (not keeps)


def _evaluated(interpolation: str, eval_crop: float, whole: str = "the whole image, its shape not kept") -> str:
    how = (whole if not eval_crop else
           "shape kept, as much of the middle as fits" if eval_crop == 1 else
           f"shape kept, the middle {100 * eval_crop:g} % of the shorter side")
    return f"{how}, {interpolation}"


def view_notes(config: Config, facts: Facts) -> list[str]:
    """Return lines on the preprocessing of the start weights, where it differs here and matters.

    An evaluation of the weights' own head should use the preprocessing of the evaluation that it repeats: a difference that
    no flag asks for is a "warning: ". A new task may use larger or cropped images, but not far smaller, squeezed or more
    coarsely resized ones; what the recipe chooses is always reported.
    """
    view, same_task = facts.start_view or {}, config.head == "keep"
    lines = _resize_notes(config, view, same_task)
    lines += [f"warning: {view['by']} describes images as no flag can ({words}): here --{name} is {getattr(config, name)}"
              for name, words in view.get("untaken", {}).items() if same_task and config.source(name) != FLAG]
    ours, theirs = (size if isinstance(size, tuple) else (size, size) for size in (config.img_size, view.get("img_size") or 0))
    if same_task and any(theirs) and ours != theirs:
        lines.append(f"{_mark(config, 'img_size')}: these weights were made with images of {_size(theirs)} px, and here they "
                     f"have {_size(ours)} px. To use that size, add --img_size {_size(theirs)} (IMG_SIZE)")
    elif max(ours) < SMALL * max(theirs):
        lines.append(f"warning: images of {_size(ours)} px have far fewer patches than those of {_size(theirs)} px that the "
                     f"weights were made with, so much of what they learned is lost. Add --img_size {_size(theirs)} (IMG_SIZE)")
    if view.get("unknown_mean"):
        described = os.path.isfile(os.path.join(os.path.dirname(str(facts.start_path)), "config.json"))
        lines.append(f"note: {facts.start_path} does not say by which mean and standard deviation its images were normalized: "
                     f"this run uses those of {config.model_type}. If they were others, add --mean and --std, or put its "
                     f"{'preprocessor_config.json' if described else 'config.json'} into its folder")
    return lines


def _resize_notes(config: Config, view: Mapping, same_task: bool) -> list[str]:
    here = {name: getattr(config, name) for name in ("interpolation", "eval_crop")}
    differs = {name: view[name] for name in here if view.get(name, here[name]) != here[name]}
    if not same_task:
        differs = {name: value for name, value in differs.items() if config.source(name) == RECIPE or (
            config.source(name) != FLAG and (value == "bicubic" if name == "interpolation" else not here[name]))}
    if not differs:
        return []
    mark = _mark(config, *differs) if same_task else "note"
    theirs = _evaluated(**{name: view.get(name, here[name]) for name in here})
    flags = " ".join(f"--{name} {value if name == 'interpolation' else format(value, 'g')}" for name, value in differs.items())
    meant = ", and the recipe differs on purpose" * any(config.source(name) == RECIPE for name in differs)
    return [f"{mark}: these weights were evaluated differently, as {view['by']} says ({theirs}){meant}. To do so here, add "
            f"{flags}"]


def _mark(config: Config, *names: str) -> str:
    return "note" if any(config.source(name) == FLAG for name in names) else "warning"


def _size(size: tuple[int, int]) -> str:
    return str(size[0]) if size[0] == size[1] else f"{size[0]}x{size[1]}"
