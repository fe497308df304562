"""Downloads data sets with torchvision, and reports why that fails."""

import contextlib
import http.client
import os
from collections.abc import Iterable
from pathlib import Path

from .splits import DataError, abbreviate


def torchvision_dataset(name: str) -> type:
    """Return torchvision's data set class of this name. Imported here: torchvision takes longer to import than PyTorch."""
    from torchvision import datasets

    return getattr(datasets, name)


def download(kind: type, data_dir: str, advice: str, archives: Iterable[Path] = (), **arguments):
    """Return torchvision's data set, downloaded unless it is present. Raises DataError, which ends with the advice.

    archives: files that torchvision uses if they are complete. If one was there and a download fails, it is reported as damaged.
    """
    there, found, made = [file for file in archives if file.is_file()], describe(data_dir), _missing(data_dir, kind.__name__)
    try:
        return kind(data_dir, download=True, **arguments)
    except (OSError, RuntimeError, EOFError, http.client.HTTPException) as error:
        for folder, _, _ in os.walk(made, topdown=False):              # remove empty folders that torchvision made
            with contextlib.suppress(OSError):
                os.rmdir(folder)
        if there:
            raise DataError(f"{abbreviate(map(str, there))}: damaged or incomplete (not the published file). Delete it and "
                            f"{advice}") from error
        reason = " ".join(str(getattr(error, "reason", error)).split())
        raise DataError(f"{kind.__name__} is not in {data_dir} ({found}) and cannot be downloaded ({reason}). "
                        f"{advice[:1].upper()}{advice[1:]}") from error


def _missing(data_dir: str, name: str) -> Path:
    """Return the outermost folder on the way to DATA_DIR/NAME/raw that does not exist; if all do, one that never exists."""
    inner = Path(data_dir, name, "raw").absolute()
    return next((folder for folder in (*inner.parents[::-1], inner) if not folder.exists()), inner / "none")


def describe(data_dir: str) -> str:
    """Describe what is in the folder instead, for a message."""
    if not os.path.isdir(data_dir):
        return "no such folder"
    names = [f"{entry.name}/" if entry.is_dir() else entry.name for entry in os.scandir(data_dir) if entry.name[0] != "."]
    if any(name.lower().endswith((".csv", ".tsv")) for name in names):
        return f"it contains {abbreviate(names)}; --dataset csv reads lists of images"
    return f"it contains {abbreviate(names)}; --dataset folder reads folders of images" if any(
        name.lower() in ("train/", "training/") for name in names) else f"it contains {abbreviate(names) or 'nothing'}"
