"""Every published file format, in and out.

As in models/__init__.py a name is imported from its module when it is first used: the names of published files need no PyTorch.
"""

import importlib

_MODULE_OF = {"checked_finite": "load", "find_checkpoint": "published", "is_weights_folder": "described",
              "open_checkpoint": "opened", "OpenedCheckpoint": "opened", "published_name": "published"}
__all__ = list(_MODULE_OF)


def __getattr__(name: str):
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_MODULE_OF[name]}", __name__), name)

