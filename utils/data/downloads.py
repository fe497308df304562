"""torchvision's data sets: where they are downloaded by torchvision, and what is reported where that fails."""

import contextlib
import http.client
import os
from collections.abc import Iterable
from pathlib import Path

from .splits import DataError, abbreviate


def torchvision_dataset(name: str) -> type:
    """torchvision's data set of this name. Imported here: torchvision takes longer to import than PyTorch."""
    from torchvision import datasets

    return getattr(datasets, name)


def download(kind: type, data_dir: str, advice: str, archives: Iterable[Path] = (), **arguments):
    """torchvision's data set, downloaded unless it is present. Raises DataError, which ends with the advice.

    archives: packed files that torchvision would take if they were there whole. What was there and is not taken is damaged.
    """
    there, found, made = [file for file in archives if file.is_file()], describe(data_dir), _missing(data_dir, kind.__name__)
    try:
        return kind(data_dir, download=True, **arguments)
    except (OSError, RuntimeError, EOFError, http.client.HTTPException) as error:
        for folder, _, _ in os.walk(made, topdown=False):              # torchvision makes it first; files are kept
            with contextlib.suppress(OSError):
                os.rmdir(folder)
        if there:
            raise DataError(f"{abbreviate(map(str, there))}: damaged or cut off (not the published file); delete it and {advice}"
                            ) from error
        reason = " ".join(str(getattr(error, "reason", error)).split())
        raise DataError(f"{kind.__name__} is not in {data_dir} ({found}) and cannot be downloaded ({reason}); "
                        f"{advice}") from error


def _missing(data_dir: str, name: str) -> Path:
    """The outermost folder of DATA_DIR/NAME that is not there yet; one that never is, where all are."""
    inner = Path(data_dir, name, "raw").absolute()
    return next((folder for folder in (*inner.parents[::-1], inner) if not folder.exists()), inner / "none")


def describe(data_dir: str) -> str:
    """What is in the folder instead."""
    if not os.path.isdir(data_dir):
        return "no such folder"
    names = [f"{entry.name}/" if entry.is_dir() else entry.name for entry in os.scandir(data_dir) if entry.name[0] != "."]
    if any(name.lower().endswith((".csv", ".tsv")) for name in names):
        return f"it holds {abbreviate(names)}; --dataset csv reads lists of images"
    return f"it holds {abbreviate(names)}; --dataset folder reads folders of images" if any(
        name.lower() in ("train/", "training/") for name in names) else f"it holds {abbreviate(names) or 'nothing'}"
