"""The memory that training needs: bytes as a function of plain values, so that a batch can be divided before the model exists.

The terms were fitted to the peaks of whole processes on a CPU (tests/system/test_peak_memory.py compares them); on a GPU, where
nothing was measured yet, the same terms give an estimate.
"""

import dataclasses
from collections.abc import Mapping

# Python, PyTorch and its libraries; a CUDA device's: its context. An Apple GPU uses the machine's memory, as a CPU.
PROCESS = {"cpu": 780 << 20, "mps": 780 << 20, "cuda": 900 << 20}
USABLE_FRACTION = {"cpu": 0.5, "mps": 0.5, "cuda": 0.8}        # of the memory: the rest is for what is not counted
STATES = {"sgd": 1, "adam": 2, "adamw": 2, "lamb": 2}      # values that an optimizer keeps for each parameter


@dataclasses.dataclass(frozen=True)
class Need:
    """Bytes of one process."""

    fixed: int          # whatever the batch
    gradients: int      # complete when the activations are gone: at the peak of a step the larger of both counts
    image: int          # activations, for each image of a micro-batch
    evaluation: int     # activations of an evaluation batch

    def step(self, images: int) -> int:
        """Return the bytes of a step in micro-batches of so many images."""
        return self.fixed + max(self.gradients, images * self.image)

    def fitting(self, memory: int) -> int:
        """Return the images of the largest micro-batch that fits into `memory` bytes, or needs no more than the gradients."""
        return max(1, max(memory - self.fixed, self.gradients) // self.image)


def need(row: Mapping, img_size: tuple[int, int], num_classes: int, *, precision: str, optimizer: str,
         fp16_opt_level: str = "O2", device_type: str = "cpu", eval_batch_size: int = 0, trained_blocks: int | None = None,
         averaged: bool = False, teacher_parameters: int = 0, cached_images: int = 0) -> Need:
    """row: of configs.MODELS, with the run's own keys; img_size: (height, width); trained_blocks: of the last layers (None: all);
    cached_images: bytes."""
    level = fp16_opt_level if precision == "fp16" else ""
    half, depth = precision in ("bf16", "fp16") and level != "O0", row["num_layers"] + row["class_layers"]
    weights = (2 if level == "O3" else 4) * parameters(row, img_size, num_classes)      # at O3 they are float16 themselves
    fraction = 1.0 if trained_blocks is None else min(1.0, trained_blocks / depth)
    trained = int(fraction * weights)
    kept = weights + STATES[optimizer] * trained + averaged * weights            # what a checkpoint holds
    saved = kept if device_type != "cuda" else 0                                 # its copy, which is written during training
    copied = weights // 2 if half and level != "O3" else 0                       # for autocast
    fixed = PROCESS[device_type] + kept + saved + copied + 4 * teacher_parameters + cached_images
    block, stem = activations(row, img_size, half, device_type)
    image = int(fraction * depth * block) + stem * (trained_blocks is None) + 2 * block
    return Need(fixed, trained, image, eval_batch_size * 2 * max(block, stem // 4))


def choose_micro_steps(images: int, need: Need, memory: int, *, even: bool = False, power_of_two: bool = False) -> int:
    """Return the smallest number of equal micro-batches, of a step's `images` of one process, that fit into `memory` bytes.

    even: a micro-batch is divided into pairs; power_of_two: the number must be one. Where nothing fits, the largest number.
    """
    largest = need.fitting(memory)
    possible = [number for number in range(1, images + 1) if images % number == 0
                and not (even and images // number % 2) and not (power_of_two and number & (number - 1))] or [1]
    return next((number for number in possible if images // number <= largest), possible[-1])


def parameters(row: Mapping, img_size: tuple[int, int], num_classes: int) -> int:
    """Return the number of parameters of the row's model: exact for all that configs.py can express."""
    width, hidden, heads = row["hidden_size"], row["mlp_dim"], row["num_heads"]
    tokens, out = _grid(row, img_size)
    linear, norm = width * width + width, 1 if row["norm"] == "rms" else 2       # a weight, and a bias
    without_bias = (3 - {"all": 3, "qv": 2, "none": 0}[row["qkv_bias"]]) + (not row["proj_bias"])
    block = 4 * linear - without_bias * width + norm * (2 * width + 2 * row["qk_norm"] * (width // heads))
    block += (1 + (row["mlp"] == "swiglu")) * (width + row["mlp_bias"]) * hidden + (hidden + row["mlp_bias"]) * width
    block += norm * (row["attention_norm"] * width + row["mlp_norm"] * hidden)
    block += 2 * width if row["layer_scale"] else 0                        # a factor for each branch
    talking = 2 * (heads * heads + heads) if row["class_layers"] else 0
    count = (row["num_layers"] + row["class_layers"]) * block + row["num_layers"] * talking
    pixels, prefix = out * row["patch_size"] ** 2, _prefix(row)
    count += pixels * width + row["patch_bias"] * width                    # patch embedding
    count += norm * {"none": 0, "after": width, "around": pixels + width}[row["patch_norm"]]
    positions = {"all": tokens + (0 if row["class_layers"] else prefix), "patches": tokens, "none": 0}[row["positions"]]
    last = row["final_norm"] or row["classifier"] == "patch_mean"
    count += (positions + prefix) * width + norm * width * (row["pre_norm"] + last)
    if row["classifier"] == "attention":                                   # query, four layers, norm, MLP
        own = row["pool_mlp_dim"] or hidden
        count += width + 4 * linear + norm * width + 2 * width * own + own + width
    read = width * (1 + (row["classifier"] == "token_mean"))
    features = row["representation_size"] or read
    count += read * features + features if row["representation_size"] else 0
    count += (1 + bool(row["distilled"])) * (features * num_classes + num_classes)
    return count + sum(own for own, _ in _resnet(row, img_size))


def _prefix(row: Mapping) -> int:
    """Return the number of tokens before the patches."""
    return int(row["class_token"] and row["classifier"] != "gap") + bool(row["distilled"]) + row["registers"]


def activations(row: Mapping, img_size: tuple[int, int], half: bool, device_type: str) -> tuple[int, int]:
    """Return the bytes that the backward pass of an image needs for one block, and for the layers before the blocks."""
    tokens = _grid(row, img_size)[0] + _prefix(row)
    width, hidden, heads = row["hidden_size"], row["mlp_dim"], row["num_heads"]
    size, maps = (2, 14) if half else (4, 11)
    rms = (row["norm"] == "rms") * (2 if half else 1)                      # what a norm keeps beyond LayerNorm
    maps += 2 * (bool(row["layer_scale"]) and not row["class_layers"]) + 2 * rms + row["attention_norm"] * (1 + rms)
    maps += 3 if row["qk_norm"] else 2 if row["rope"] else 0
    inner = 4 if row["mlp"] == "swiglu" else 3 if row["gelu"] == "quick" else 2
    inner += row["mlp_norm"] * (1 + rms)
    block = tokens * size * (maps * width + inner * hidden)
    if row["dropout_rate"]:
        block += tokens * (2 * width + hidden)                             # its masks, a byte each
    written_out = 4 if row["class_layers"] else 3 if row["attention_dropout_rate"] else 0
    if half and device_type == "cpu":                                      # models/cpu_bfloat16.py
        written_out = max(written_out, 1)
    block += written_out * heads * tokens * tokens * size
    stem = (7 if half else 12) * sum(values for _, values in _resnet(row, img_size))
    return block, stem + 5 * row["in_channels"] * img_size[0] * img_size[1]           # the image as bytes and as numbers


def _grid(row: Mapping, img_size: tuple[int, int]) -> tuple[int, int]:
    """-> (patches, channels that they are cut from)"""
    channels, cell = row["in_channels"], row["patch_size"]
    if row["resnet_layers"] is not None:
        stages = len(row["resnet_layers"])
        channels, cell = row["resnet_width"] * (4 * 2 ** (stages - 1) if stages else 1), cell * 4 * 2 ** max(stages - 1, 0)
    return (img_size[0] // cell) * (img_size[1] // cell), channels


def _resnet(row: Mapping, img_size: tuple[int, int]) -> list[tuple[int, int]]:
    """-> (parameters, values of its output) of each convolution of the ResNet with its norm"""
    if row["resnet_layers"] is None:
        return []
    width, cells = row["resnet_width"], img_size[0] * img_size[1] // 4
    found = [(row["in_channels"] * 49 * width + 2 * width, cells * width)]
    before, cells = width, cells // 4
    for number, units in enumerate(row["resnet_layers"]):
        inner = width * 2 ** number
        for unit in range(units):
            larger, cells = cells, cells // 4 if number and unit == 0 else cells
            shapes = [(before, inner, 1, larger), (inner, inner, 9, cells), (inner, 4 * inner, 1, cells)]
            shapes += [(before, 4 * inner, 1, cells)] if unit == 0 else []
            found += [(a * b * kernel + 2 * b, b * places) for a, b, kernel, places in shapes]
            before = 4 * inner
    return found
