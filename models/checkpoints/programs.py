"""Exports a model as a program, an ONNX file or one of torch.export, that runs without this project for any batch size.

Input `images` (batch, channels, height, width), normalized float32; output `logits` (batch, classes). After writing, the file is
opened again and compared with the model.
"""

import contextlib
import copy
import importlib
import io
import json
import logging
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from models.base import ImageTransformer
from models.errors import ModelError

from .zip_archive import one_line

INPUT, OUTPUT = "images", "logits"
BATCHES = (1, 5)                        # batch sizes that are compared
TRACED = 2                              # batch size for tracing: a size of one would become part of the program
OLDEST_OPSET = 18                       # PyTorch's exporter writes it; files converted to an older one cannot be opened
LARGEST_FILE = 2 ** 31 - 1              # bytes of an ONNX file, which is one message of Protocol Buffers
ALLOWED = 1e-4                          # difference of a logit, relative to the largest logit if that is above 1
INSTALL = "pip install -r requirements-export.txt"


def facts_of(model: ImageTransformer, classes: list[str], view: dict) -> dict[str, str]:
    """Return the metadata of the program, as JSON by name. view: flags, how images are read, resized and evaluated."""
    config = model.config
    resize = (f"resize, keeping the aspect ratio, so that {view['eval_crop']:g} of the shorter side is the size, then crop the "
              "center" if view["eval_crop"] else "resize the whole image to the size, without keeping the aspect ratio")
    seen = {"size": list(model.img_size), "channels": config.in_channels, "resize": resize, **view,
            "normalize": "(x / 255 - mean) / std, channels first (CHW)", "mean": list(config.mean), "std": list(config.std)}
    return {"classes": json.dumps(list(classes)), "preprocessing": json.dumps(seen)}


def save_onnx(model: ImageTransformer, path: Path, facts: dict[str, str], opset: int | None = None) -> str:
    """Write one ONNX file, and return how it was verified, in words. opset: None for PyTorch's default.

    Raises ModelError if a package is missing, the file would be too large, or it computes something else.
    """
    onnx = _package("onnx")
    _package("onnxscript")
    newest = onnx.defs.onnx_opset_version()
    if opset is not None and not OLDEST_OPSET <= opset <= newest:
        raise ModelError(f"opset {opset}: must be from {OLDEST_OPSET} to {newest}, which PyTorch {torch.__version__} and onnx "
                         f"{onnx.__version__} write")
    size = sum(value.numel() * 4 for value in model.state_dict().values())
    if size > LARGEST_FILE - (1 << 24):
        raise ModelError(f"its weights ({size / 2 ** 30:.1f} GiB) do not fit into one ONNX file, which is limited to 2 GiB. "
                         "Export it to torch or folder")
    model = _plain(model)
    try:
        with _quiet():
            made = torch.onnx.export(model, (_images(model, TRACED),), dynamo=True, external_data=False, verbose=False,
                                     opset_version=opset, input_names=[INPUT], output_names=[OUTPUT],
                                     dynamic_shapes=_free_batch())
    except torch.onnx.OnnxExporterError as error:
        raise ModelError(f"PyTorch {torch.__version__} cannot export it to ONNX ({one_line(error)}). Export it to torch"
                         ) from error
    proto = made.model_proto
    written = next(entry.version for entry in proto.opset_import if entry.domain in ("", "ai.onnx"))
    if opset not in (None, written):
        raise ModelError(f"opset {opset}: PyTorch {torch.__version__} wrote {written}. Omit --opset, or use {written}")
    _remove_source_notes(proto)
    for name, text in facts.items():
        proto.metadata_props.add(key=name, value=text)
    path.write_bytes(proto.SerializeToString(deterministic=True))
    return f"opset {written}; {_verify_onnx(model, path)}"


def _verify_onnx(model: ImageTransformer, path: Path) -> str:
    try:
        import onnxruntime
    except ImportError:
        return f"NOT verified, because onnxruntime is not installed ({INSTALL})"
    try:
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        difference = _compare(model, lambda images: torch.from_numpy(session.run(None, {INPUT: images.numpy()})[0]))
    except ModelError:
        raise
    except Exception as error:          # onnxruntime has many error classes
        raise ModelError(f"onnxruntime {onnxruntime.__version__} cannot run the file ({one_line(error)}). Use another --opset"
                         ) from error
    return f"verified with onnxruntime {onnxruntime.__version__}, {difference}"


def _remove_source_notes(proto) -> None:
    """Remove the exporter's notes, which contain source lines and folders of this machine."""
    for graph in (proto.graph, *proto.functions):
        entries = [graph, *graph.node, *getattr(graph, "value_info", ()), *getattr(graph, "input", ()),
                   *getattr(graph, "output", ()), *getattr(graph, "initializer", ())]
        for entry in entries:
            for field in ("metadata_props", "doc_string"):
                if hasattr(entry, field):
                    entry.ClearField(field)


def save_program(model: ImageTransformer, path: Path, facts: dict[str, str]) -> str:
    """Write a file for torch.export.load, with `facts` as its extra files, and return how it was verified, in words.

    Raises ModelError if it computes something else.
    """
    model, stream = _plain(model), io.BytesIO()          # torch's own writer would report a full disk without the path
    with _quiet():
        program = torch.export.export(model, (_images(model, TRACED),), dynamic_shapes=_free_batch())
        for node in program.graph.nodes:
            for note in ("stack_trace", "nn_module_stack", "source_fn_stack"):       # source lines and folders of this machine
                node.meta.pop(note, None)
        torch.export.save(program, stream, extra_files={f"{name}.json": text for name, text in facts.items()})
        path.write_bytes(stream.getbuffer())
        with open(path, "rb") as written:
            again = torch.export.load(written).module()
        return f"verified with torch.export.load, {_compare(model, again)}"


# ------------------------------------------------------------------------------------------------------------- shared


def _package(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ModelError(f"this Python lacks {name}, which it needs: {INSTALL}") from error


def _plain(model: ImageTransformer) -> ImageTransformer:
    """Return the model in float32 on the CPU, in eval mode; a copy if it is elsewhere or in another precision."""
    value = next(model.parameters())
    model = model if (value.dtype, value.device.type) == (torch.float32, "cpu") else copy.deepcopy(model).float().cpu()
    return model.eval()


def _free_batch() -> tuple[dict]:
    return ({0: torch.export.Dim("batch", min=1)},)


def _images(model: ImageTransformer, count: int) -> Tensor:
    generator = torch.Generator().manual_seed(count)
    return torch.randn(count, model.config.in_channels, *model.img_size, generator=generator)


@torch.inference_mode()
def _compare(model: ImageTransformer, other: Callable[[Tensor], Tensor]) -> str:
    """Return the largest difference, in words. Raises ModelError if rounding cannot explain it."""
    largest = 0.0
    for count in BATCHES:
        images = _images(model, count)
        expected, found = model(images), other(images)
        difference = (expected - found).abs().max().item() if found.shape == expected.shape else float("inf")
        if not difference <= ALLOWED * max(1.0, expected.abs().max().item()):
            raise ModelError(f"the exported file does not compute what the model does: for {count} images, logits differ by "
                             f"{difference:.3g}. It was deleted")
        largest = max(largest, difference)
    return f"batches of {' and '.join(map(str, BATCHES))}: logits differ by {largest:.0e} at most"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hide PyTorch's warnings about its own internals, about which a user can do nothing."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
