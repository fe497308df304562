"""The structure of the project: which package may import which, who may use a library, and how large files and functions are."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
VERBS = ("train", "dataset", "sweep", "visualize", "annotate", "predict", "export")
LEAVES = {"utils.device", "utils.files", "utils.launch", "utils.process", "utils.randomness", "utils.temporary"}
ROOMS = ("utils.build", "utils.config", "utils.data", "utils.training", "utils.run", "utils.attention", "utils.report",
         "utils.distributed", "utils.predict", "models.checkpoints")

# Room (a package): the rooms and modules that its files may import besides their own room and the leaves, which models/ may not.
ALLOWED = {
    **{verb: {"configs", "models", "utils"} for verb in VERBS},
    "utils.build": {"configs", "models", "utils.config", "utils.data", "utils.training", "utils.run", "utils.attention",
                    "utils.distributed", "utils.predict"},
    "utils.predict": {"utils.data", "utils.training"},
    "utils.report": {"utils.run", "utils.attention", "utils.data", "utils.training"},
    "utils.run": {"utils.training", "utils.data", "utils.distributed", "models.checkpoints.first_look",
                  "models.checkpoints.run_fields", "models.checkpoints.torch_file"},
    "utils.attention": {"utils.data"},
    "utils.training": {"models.kinds", "utils.data", "utils.distributed"},
    "utils.data": set(),
    "utils.distributed": set(),
    "utils.config": {"configs", "models.kinds", "utils.training.memory"},
    "configs": {"models.families"},
    "models": {"models.errors"},                                      # models/__init__.py
    "models.families": set(),
    "models.create": {"configs", "models"},
    "models.match": {"configs", "models"},
    "models.__main__": {"configs", "models"},
    "models.checkpoints": {"models.errors", "models.kinds", "models.base", "models.layers", "models.families"},
}
# A library and the rooms or modules that may import it.
FENCED = {"torchvision": {"utils.data", "utils.attention.edit_transform"},
          "matplotlib": {"utils.report"},
          "starlette": {"utils.attention.editor"}, "uvicorn": {"utils.attention.editor"},
          "torch.utils.tensorboard": {"utils.run.loggers"}, "wandb": {"utils.run.loggers"},
          "timm": {"utils.training.optimizer"},
          "onnx": {"models.checkpoints.programs"}, "onnxruntime": {"models.checkpoints.programs"},
          "torch.distributed": {"utils.distributed"}}
FILES = [*ROOT.glob("*.py"), *ROOT.glob("models/**/*.py"), *ROOT.glob("utils/**/*.py")]
MODULES = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in FILES}
OWN_MODULES = {name.partition(".")[0] for name in MODULES}


def is_in(module: str, room: str) -> bool:
    return f"{module}.".startswith(f"{room}.")


def room_of(module: str) -> str:
    """Return the room of a module; a module directly in models/, or a leaf, is its own room."""
    return next((room for room in ROOMS if is_in(module, room)), module)


def imports_of(module: str) -> set[str]:
    """Return the absolute names of the imports, with relative ones resolved; `from utils import device` is utils.device."""
    package = module if MODULES[module].name == "__init__.py" else module.rpartition(".")[0]
    found = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")
            above = ".".join(parts[:len(parts) - node.level + 1]) if node.level else ""
            base = ".".join(filter(None, [above, node.module or ""]))
            below = {f"{base}.{name.name}" for name in node.names} & set(MODULES)
            found |= below or {base}
    return found


@pytest.mark.parametrize("module", MODULES)
def test_imports_are_allowed(module):
    room = room_of(module)
    allowed = ALLOWED.get(room, {"models"} if room.startswith("models.") else set()) | {room}
    if room.startswith("utils."):
        allowed |= LEAVES
    beyond = {name for name in imports_of(module)
              if name.partition(".")[0] in OWN_MODULES and not any(is_in(name, other) for other in allowed)}
    assert not beyond, f"{module} imports {beyond}"


def test_models_use_one_function_of_utils():
    """That is load_model: a model for photographs needs to know how these are read and resized, which models/ does not. It is
    imported on first use, so that models/ does not load utils."""
    import models

    assert models.ABOVE == {"utils.build.loaded": ["load_model"]}
    assert not any("utils" in path.read_text().replace(next(iter(models.ABOVE)), "") and "import_module" in path.read_text()
                   for path in ROOT.glob("models/**/*.py") if path.name != "__init__.py")


def test_imports_are_not_circular():
    edges = {module: {name for name in imports_of(module) if name in MODULES and name != module} for module in MODULES}
    while free := {module for module, needed in edges.items() if not needed & set(edges)}:
        edges = {module: needed for module, needed in edges.items() if module not in free}
    assert not edges, edges


@pytest.mark.parametrize("library", FENCED)
def test_libraries_are_only_used_where_allowed(library):
    users = {module for module in MODULES if any(is_in(name, library) for name in imports_of(module))}
    outside = {user for user in users if not any(is_in(user, room) for room in FENCED[library])}
    assert not outside, outside


def test_configs_imports_only_ml_collections_and_families():
    assert imports_of("configs") == {"ml_collections", "models.families"}


def test_every_module_has_its_own_test_file():
    tests = {path.stem.removeprefix("test_") for path in (ROOT / "tests").rglob("test_*.py")}
    untested = {module.rpartition(".")[2] for module, path in MODULES.items() if path.name != "__init__.py"} - tests
    assert not untested, untested


def test_no_module_for_miscellaneous_things():
    names = {path.stem for path in FILES} | {path.parent.name for path in FILES}
    assert not names & {"misc", "common", "helpers", "helper", "tools", "util"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_functions_and_classes_stay_readable(path):
    """At most 340 lines per file, 60 per function, and 12 attributes that a class sets (not counting the fields of a record)."""
    text = path.read_text()
    assert text.startswith('"""'), "a file begins with a docstring"
    assert text.count("\n") <= (260 if path.name == "train.py" else 340), text.count("\n")
    assert not re.search(r"\b(TODO|FIXME|XXX)\b", text)
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert node.end_lineno - node.lineno < 60, node.name
        elif isinstance(node, ast.ClassDef):
            assert len(attributes_set(node)) <= 12, (node.name, attributes_set(node))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_text_files_name_their_encoding(path):
    """The encoding of the locale may lack characters of a file name. Files opened with "b" in their mode are not text."""
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.Call) or any(word.arg == "encoding" for word in node.keywords):
            continue
        mode = ast.unparse(node.args[1]) if len(node.args) > 1 else ""
        is_open = isinstance(node.func, ast.Name) and node.func.id == "open" and "b" not in mode
        assert not is_open and getattr(node.func, "attr", "") not in ("read_text", "write_text"), f"line {node.lineno}"


def attributes_set(node: ast.ClassDef) -> set[str]:
    """Return the names after `self.` that the methods of the class assign to."""
    return {each.attr for each in ast.walk(node) if isinstance(each, ast.Attribute) and isinstance(each.ctx, ast.Store)
            and isinstance(each.value, ast.Name) and each.value.id == "self"}
