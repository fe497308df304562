"""Figures of recorded attention: select the rows of the maps, name them and add the notes that they need.

A model is any object with the attributes of models.ImageTransformer; this file builds none.

Shapes: H heads, N tokens, Q queries, K keys, (h, w) grid, C classes.
"""

import dataclasses
import math
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from utils.attention import maps as attention_maps
from utils.data.classes import first_names
from utils.data.transforms import normalize
from utils.run.log import LOG_FILE, scan_log
from utils.run.mistakes import worst_first

from . import confusion, photo, pictures, plots
from .photo import Example, Subject
from .plots import Figure, plain

CLS, DIST, ALL, POOL = "cls token", "dist token", "mean of all queries", "pooling query"
# The note below pictures of a model whose head reads patches too, by `classifier`.
MEAN_POOLED = "The head reads the mean of the patches instead of a cls token: each map is the mean over all queries."
NOTES = {"token": "", "gap": MEAN_POOLED, "mean": MEAN_POOLED, "patch_mean": MEAN_POOLED,
         "token_mean": "The head reads the cls token and the mean of the patches: one map is of the cls token, one is the mean "
                       "over the queries of the patches."}
GOOD_DISTANCES = "In a well trained model the heads of the first layers differ: some look near, others far."
GOOD_POSITIONS = ("Each tile belongs to one patch. In a well trained model it is brightest at its own patch, and bright at its "
                  "neighbors or along its row and column; tiles that look alike have learned no positions.")
GOOD_FILTERS = "Well trained ones are smooth edges, stripes and blobs of color; noise is a sign of too little training."
LARGE = 112                         # pixels of a map
COARSE = 8                          # a smooth map of fewer patches a side would have its peaks between the patches


class ViewError(ValueError):
    """A picture cannot be drawn of this model or run."""

    exit_code = 2


@dataclasses.dataclass(frozen=True)
class View:
    """An image as the model saw it, its prediction and its attention."""

    subject: Subject
    example: Example
    pixels: np.ndarray              # (height, width, 3) uint8
    photo: np.ndarray               # the same part of the image, in more pixels where it has more: see photo_of
    inputs: Tensor                  # (1, channels, height, width)
    probabilities: np.ndarray       # (C,)
    maps: list[Tensor]              # (1, H, Q, K) by layer

    @property
    def caption(self) -> str:
        true = [f"true: {plain(self.example.truth, 30)}"] if self.example.truth else []
        return "\n".join([*true, "predicted:", *pictures.best(self.probabilities, self.subject.classes)]
                         if len(self.subject.classes) > 1 else [*true, "(no head: no prediction)"])

    def title(self, what: str) -> str:
        """Return the title. If the run evaluates mirror images too, it says that this picture is without."""
        alone = "\nprobabilities of this image only; the run also averages its mirror image"
        return f"{what}: {self.example.name}\n{self.subject.title}{alone * (self.subject.settings.get('tta') == 'flip')}"


def predict_with_attention(subject: Subject, example: Example) -> View:
    """Run the model on the image and record its attention. Raises ImageError."""
    model = subject.model
    image, _ = example.split[example.index]
    pixels = subject.transform(image)[None]
    inputs = normalize(pixels, model.config.mean, model.config.std).to(next(model.parameters()).device)
    with torch.no_grad(), model.recording() as maps:
        logits = model(inputs)
    probabilities = logits[0].float().softmax(dim=-1).cpu().numpy()
    seen = pixels[0].permute(1, 2, 0).expand(-1, -1, 3).numpy()
    return View(subject, example, seen, photo.photo_of(subject, image, seen), inputs, probabilities,
                [layer.cpu() for layer in maps])


def read(model: nn.Module, layer: Tensor) -> dict[str, np.ndarray]:
    """Return the maps of a layer by query: (1, H, Q, K) -> {query: (H, height, width)}, see `enlarge`.

    The queries are the tokens that the head reads. For a mean-pooled model, talking heads and the layers before pooling by
    attention, it is the mean over all queries.
    """
    # A CaiT's layers without a cls token have talking heads.
    talking = model.config.class_layers and layer.shape[-1] == model.grid[0] * model.grid[1]
    rows, classifier = slice(None) if talking else model.query_rows, model.config.classifier
    grids = attention_maps.read_rows(layer[0], rows, model.grid)                           # (H, R, h, w)
    if classifier == "token_mean":
        return {CLS: enlarge(model, grids[:, 0]), ALL: enlarge(model, grids[:, 1:].mean(dim=1))}
    if classifier != "token" or talking:
        pooled = classifier == "attention" and attention_maps.has_one_query(layer)
        return {POOL if pooled else ALL: enlarge(model, grids.mean(dim=1))}
    large = enlarge(model, grids)
    return {reader: large[:, number] for number, reader in zip(range(large.shape[1]), (CLS, DIST))}


def enlarge(model: nn.Module, grids: Tensor) -> np.ndarray:
    """Enlarge maps (..., h, w) to the size of the image, or to a multiple of it, so that small images have smooth maps too.

    A coarse grid is enlarged patch by patch.
    """
    times = -(-LARGE // max(model.img_size))
    size = tuple(side * times for side in model.img_size)
    return attention_maps.upsample(grids, size, smooth=min(model.grid) >= COARSE).numpy()


def draw_attention(view: View, layer: int | None = None, head: int | None = None) -> Figure:
    """Draw every layer, and every head of one (counted from 1; None: the last layer, the mean of the heads)."""
    model = view.subject.model
    layer = check_range("--layer", len(view.maps) if layer is None else layer, len(view.maps), "layers")
    heads = view.maps[layer - 1].shape[1]                              # pooling by attention may have more or fewer
    whose = f"layer {layer}" if model.config.classifier == "attention" else "the model"
    which = "mean of the heads" if head is None else f"head {check_range('--head', head, heads, 'heads', whose)}"

    def one(maps: np.ndarray) -> np.ndarray:
        return maps.mean(axis=0) if head is None or head > len(maps) else maps[head - 1]

    readings = [read(model, recorded) for recorded in view.maps]
    chosen = [(f"layer {layer}, {which}, {reader}", one(maps)) for reader, maps in readings[layer - 1].items()]
    groups = {}
    for reader in readings[-1]:
        groups[f"every layer, {which}, {reader}"] = [
            (f"layer {number}{'*' * (reader not in found)}", one(found.get(reader, found.get(ALL))))
            for number, found in enumerate(readings, start=1)]
    several = len(readings[layer - 1]) > 1
    groups[f"every head of layer {layer}, {' and '.join(readings[layer - 1])}"] = [
        (f"head {number}{f', {reader}' * several}", heat) for reader, maps in readings[layer - 1].items()
        for number, heat in enumerate(maps, start=1)]
    note = _note(model, "* Talking heads act on the patches, without a cls token: mean of all queries; negative weights are "
                        "drawn in blue. The last layers are class attention.",
                 "* All tokens of this block are read: mean of all queries"
                 + (" (and of all heads, if it lacks this one)" if any((head or 0) > maps.shape[1] for maps in view.maps) else "")
                 + ". The last layer is the pooling by attention, which has one query.")
    return pictures.attention(view.pixels, view.caption, chosen, groups, view.title("attention"), note, view.photo)


def check_range(flag: str, number: int, count: int, things: str, whose: str = "the model") -> int:
    if not 1 <= number <= count:
        raise ViewError(f"{flag} {number}: {whose} has {count} {things if count > 1 else things[:-1]}. Give 1"
                        f"{f' to {count}' * (count > 1)}")
    return number


def _note(model: nn.Module, of_cait: str, of_pooling: str) -> str:
    if model.config.class_layers:
        return of_cait
    return NOTES.get(model.config.classifier, of_pooling)


def joint_maps(view: View, joint: Tensor, name: str = "") -> list[tuple[str, np.ndarray]]:
    """Return the maps of joint attention (1, N, N), or (1, 1, N) with pooling by attention, as [(name and query, map)]."""
    return [(f"{name}{reader}", maps[0]) for reader, maps in read(view.subject.model, joint[:, None]).items()]


def compute_rollout(view: View, fusion: str = "mean", drop: float = 0.0) -> Tensor:
    """Compute attention rollout: (1, N, N), or (1, 1, N) with pooling by attention."""
    return attention_maps.rollout(view.maps, fusion, drop, protected_columns(view.subject.model))


def protected_columns(model: nn.Module) -> int:
    """Return the number of columns that dropping does not change."""
    return 1 if model.config.class_layers else model.num_prefix_tokens


def draw_rollout(view: View, fusion: str = "mean", drop: float = 0.0) -> Figure:
    what = describe_rollout(f"joint attention, heads by {fusion}", drop)
    return draw_joint(view, compute_rollout(view, fusion, drop), what)


def compute_gradient_rollout(view: View, target: int, drop: float = 0.0) -> Tensor:
    """Compute gradient rollout for class number `target`: (1, N, N), or (1, 1, N) with pooling by attention."""
    model = view.subject.model
    with model.recording(differentiable=True) as maps:
        logits = model(view.inputs)
    gradients = torch.autograd.grad(logits[0, target], maps)
    maps = [layer.detach() for layer in maps]
    return attention_maps.gradient_rollout(maps, gradients, drop, protected_columns(model)).cpu()


def draw_gradient_rollout(view: View, target: str | None = None, drop: float = 0.0) -> Figure:
    """Draw gradient rollout. target: a class by name or number; None: the predicted one."""
    classes = view.subject.classes
    if len(classes) == 1:
        raise ViewError("--checkpoint: the file has no head, so no class has a gradient. Take rollout, or fine-tune it first")
    number = int(view.probabilities.argmax()) if target is None else class_index(target, classes)
    what = describe_rollout(f"gradient rollout for {classes[number]}", drop)
    return draw_joint(view, compute_gradient_rollout(view, number, drop), what)


def describe_rollout(how: str, drop: float) -> str:
    return how + (f", lowest {drop:.0%} dropped" if drop else "")


def draw_joint(view: View, joint: Tensor, what: str) -> Figure:
    """Draw any rollout (1, N, N) or (1, 1, N)."""
    note = _note(view.subject.model, "Negative weights count as 0; class-attention layers only change the row of the cls token.",
                 "What the query of the pooling by attention takes from each patch, through all layers.")
    maps = joint_maps(view, joint, "all layers, ")
    return pictures.over_image(view.pixels, view.caption, maps, view.title(what), note, "share of the joint attention",
                               view.photo)


def class_index(target: str, classes: tuple[str, ...]) -> int:
    """Return the index of a class that is given by name or number. Raises ViewError."""
    if target in classes:
        return classes.index(target)
    if not target.isdecimal() or int(target) >= len(classes):
        raise ViewError(f"--target {target}: no such class. Give a name ({first_names(classes)}) or number (0 to "
                        f"{len(classes) - 1})")
    return int(target)


def draw_class_attention(view: View) -> Figure:
    """Draw each class-attention layer of a CaiT. Raises ViewError for other families."""
    model = view.subject.model
    if not model.config.class_layers:
        same = {"token": ", which shows the same of the cls token", "attention": ", whose last layer is the pooling by "
                "attention"}.get(model.config.classifier, "")
        raise ViewError(f"class-attention: only CaiT has such layers. Use the picture `attention`{same} (the model: "
                        f"{view.subject.title})")
    grids = attention_maps.class_attention(view.maps, model.grid)[:, 0]
    maps = [(f"layer {number}, class attention, mean of the heads", heat)
            for number, heat in enumerate(enlarge(model, grids), start=len(view.maps) - len(grids) + 1)]
    return pictures.over_image(view.pixels, view.caption, maps, view.title("class attention"), photo=view.photo)


# ------------------------------------------------------------------------------------- the paper's figure 7


def draw_distance(views: Iterable[View]) -> Figure:
    """Draw the attention distance of each head, mean over the images. Raises ViewError if there are no images."""
    distances = []
    for view in views:
        model = view.subject.model
        distances.append(attention_maps.attention_distance(view.maps, model.grid, model.img_size))
    if not (count := len(distances)):
        raise ViewError("distance: none of the images could be read, so there are no distances to draw")
    size = "x".join(map(str, model.img_size))
    title = f"attention distance, {count} image{'s' * (count > 1)} of {size} px\n{view.subject.title}"
    note = f"Weighted mean distance from a patch to the others, between their centers{_left_out(model)}. {GOOD_DISTANCES}"
    return pictures.distance(torch.stack(distances).nanmean(dim=0).numpy(), np.hypot(*model.img_size), title, note)


def _left_out(model: nn.Module) -> str:
    """Return which tokens of the model the distances leave out."""
    if model.config.class_layers:
        return "; negative weights count as 0; class attention is left out"
    tokens = model.num_prefix_tokens - model.config.registers - model.config.distilled
    names = ["cls"] * bool(tokens) + ["dist"] * model.config.distilled + ["registers"] * bool(model.config.registers) + [
        "the pooling"] * (model.config.classifier == "attention")
    return f"; the weights of {' and '.join(filter(None, [', '.join(names[:-1]), names[-1]]))} are left out" if names else ""


def draw_positions(subject: Subject) -> Figure:
    """Raise ViewError for models without learned positions."""
    model = subject.model
    if model.pos_embed is None:
        raise ViewError("position: the model only has rotary positions, which are not learned, and no position embeddings "
                        f"(the model: {subject.title})")
    similarity = attention_maps.position_similarity(model.pos_embed.detach().cpu(), model.grid)
    title = f"position embeddings: similarity of each patch to all others\n{subject.title}"
    return pictures.positions(similarity.numpy(), title, GOOD_POSITIONS)


def draw_filters(subject: Subject, count: int = 28) -> Figure:
    """Raise ViewError for hybrids."""
    model = subject.model
    if model.config.resnet_layers is not None:
        raise ViewError("filters: a hybrid's patch kernel acts on the ResNet's feature maps, not on pixels (the model: "
                        f"{subject.title})")
    colors, shares = attention_maps.patch_filters(model.patch_embed.proj.weight.detach().cpu(), count)
    if not len(colors):
        raise ViewError(f"filters: a patch kernel of one filter has no principal components (the model: {subject.title})")
    what = f"the first {len(colors)} principal components of the patch embedding"
    gray = ", one channel" * (model.config.in_channels == 1)
    note = f"Number and share of the variance; mid-grey is 0{gray}. {GOOD_FILTERS}"
    return pictures.filters(colors.numpy(), shares.numpy(), f"{what}\n{subject.title}", note)


# ------------------------------------------------------------------------------------------------- of a run


def picture_folder(checkpoint: str | None) -> Path:
    """Return the folder for a checkpoint's pictures: that of its run, otherwise output/pictures."""
    path = Path(checkpoint or "")
    if checkpoint and path.is_dir():
        return path
    return path.parent if checkpoint and path.is_file() and (path.parent / LOG_FILE).exists() else Path("output/pictures")


def draw_curves(folders: list[str], model_and_data: str = "") -> Figure:
    """Draw the curves in the log of each run folder, or of the folder of a checkpoint file; of one run as the run itself does,
    with the name of its model and data in the title. Raises ViewError if it has none."""
    runs = {}
    for given in folders:
        folder = Path(given) if Path(given).is_dir() else Path(given).parent
        events, unreadable = scan_log(folder)
        if (wrong := plots.find_invalid_event(events)) is not None:
            raise ViewError(f"{folder / LOG_FILE}: {wrong}. The file is damaged, or train.py did not write it")
        if not any(event["event"] in plots.DRAWN for event in events):
            raise ViewError(f"--checkpoint {given}: no run with steps in its {LOG_FILE}. Give run folders such as output/NAME")
        note = f" (without {unreadable} unreadable line{'s' * (unreadable > 1)} of its log)" * bool(unreadable)
        name = folder.resolve().name + note
        runs[name if name not in runs else str(folder) + note] = events
    if len(runs) > 1:
        return plots.compare_learning_curves(runs, f"{len(runs)} runs")
    (name, events), = runs.items()
    return plots.learning_curves(events, f"{name}: {model_and_data}" if model_and_data else name)


def draw_confusion(subject: Subject, data: Dataset, name: str, classes: tuple[str, ...], shown: int = 18) -> Figure:
    """Evaluate the split `data` called `name` as the run does, and draw it. Raises ViewError if its classes are others."""
    if classes != subject.classes:
        raise ViewError(f"--checkpoint: the model has {len(subject.classes)} classes ({first_names(subject.classes)}), the data "
                        f"have {len(classes)} ({first_names(classes)}): not the same task. Give a run on these data, such as "
                        f"output/NAME (the model: {subject.title})")
    found = subject.evaluate(data)
    matrix, flipped = found.confusion.numpy(), subject.settings["tta"] == "flip"
    wrong = worst_first(found.answers[:, found.answers[1] != found.answers[2]].numpy())[:shown]
    images = [photo.photo_of(subject, image, subject.transform(image).permute(1, 2, 0).expand(-1, -1, 3).numpy())
              for image in (data[int(index)][0] for index, *_ in wrong)]
    mistakes = [confusion.Mistake(classes[int(true)], classes[int(guess)], probability, math.exp(-loss), data.name(int(index)))
                for index, true, guess, probability, loss in wrong]
    title = f"confusion matrix, {name}: {found.accuracy:.2%} of {found.images} images right{', with mirror images' * flipped}"
    return confusion.draw(matrix, classes, images, mistakes, f"{title}\n{subject.title}")
