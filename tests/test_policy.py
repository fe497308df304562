"""The structure of the project: who may import whom, and what may not be there."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
OWN = {"models", "utils", "configs", "train", "sweep", "visualize", "annotate"}
VERBS = {"train", "sweep", "visualize", "annotate"}

# module: the modules of ours that it may import. A module that is not listed here is a leaf.
ALLOWED = {
    "configs": set(),
    "train": {"configs", "models", "utils"},
    "sweep": {"configs", "utils"},
    "visualize": {"configs", "models", "utils"},
    "annotate": {"configs", "models", "utils"},
    "models": {"configs", "models.attention", "models.cait", "models.deit", "models.pretrained", "models.published",
               "models.sigmoid_attention", "models.vit", "models.weight_export"},
    "models.sigmoid_attention": {"models.attention", "models.vit"},
    "models.layers": {"models.attention"},
    "models.vit": {"models.layers", "models.position", "models.resnet"},
    "models.deit": {"models.vit"},
    "models.cait": {"models.attention", "models.layers", "models.vit"},
    "models.download": {"models.vit"},
    "models.published": {"models.download", "models.vit"},
    "models.npz": {"models.zip_archive"},
    "models.torch_file": {"models.pickle_scan", "models.vit", "models.zip_archive"},
    "models.pickle_scan": {"models.vit"},
    "models.zip_archive": set(),
    "models.weight_file": {"models.npz", "models.torch_file", "models.vit", "models.weight_names", "models.zip_archive"},
    "models.weight_rules": {"models.vit", "models.weight_names"},
    "models.weight_dialects": {"models.vit", "models.weight_file", "models.weight_names", "models.weight_rules"},
    "models.weight_export": {"models.vit", "models.weight_dialects", "models.weight_names", "models.weight_rules"},
    "models.pretrained": {"models.position", "models.vit", "models.weight_dialects", "models.weight_file", "models.weight_rules"},
    "utils.decoding": set(),
    "utils.augment": {"utils.decoding", "utils.edits"},
    "utils.held": {"utils.augment", "utils.devices", "utils.randomness", "utils.splits"},
    "utils.data": {"utils.augment", "utils.edits", "utils.held", "utils.loader_workers", "utils.randomness", "utils.splits"},
    "utils.loader_workers": {"utils.stopping"},
    "utils.check_data": {"utils.image_files", "utils.loader_workers", "utils.splits", "utils.stopping"},
    # The one reader of PyTorch's files that trusts none of them; models/ knows nothing of utils/.
    "utils.checkpoint": {"models.torch_file", "models"},
    "utils.saving": {"utils.checkpoint", "utils.run_folder", "utils.run_log"},
    "utils.run_log": {"utils.checkpoint"},
    "utils.distributed": {"utils.lost_ranks", "utils.stopping"},
    "utils.exact": {"utils.distributed"},
    "utils.editing": {"utils.edits", "utils.splits"},
    "utils.editor": {"utils.edits", "utils.editing", "utils.splits"},
    "utils.datasets": {"utils.image_files", "utils.prepared", "utils.splits"},
    "utils.image_files": {"utils.decoding", "utils.splits"},
    "utils.prepared": {"utils.decoding", "utils.image_files", "utils.splits"},
    "utils.prepare": {"utils.checkpoint", "utils.image_files", "utils.loader_workers", "utils.prepared", "utils.run_folder",
                      "utils.splits", "utils.stopping"},
    "utils.splits": {"utils.randomness"},
    "utils.mix": {"utils.devices", "utils.randomness"},
    "utils.engine": {"utils.data", "utils.devices", "utils.distributed", "utils.ema", "utils.exact", "utils.loss", "utils.mix",
                     "utils.optim", "utils.precision", "utils.randomness"},
    "utils.metrics": {"utils.data", "utils.distributed", "utils.precision", "utils.prefetch"},
    "utils.prefetch": {"utils.data", "utils.loader_workers", "utils.splits"},
    "utils.pictures": {"utils.plots"},
    "utils.views": {"utils.attention_maps", "utils.augment", "utils.data", "utils.pictures", "utils.plots", "utils.run_log"},
    "utils.report": {"utils.checkpoint", "utils.engine", "utils.metrics", "utils.run_folder", "utils.run_log",
                     "utils.speed"},
    "utils.run_folder": {"utils.checkpoint", "utils.run_log"},
}
# Third parties that stand behind one fence.
FENCED = {"torchvision": {"utils.datasets", "utils.decoding", "utils.augment", "utils.held",
                          "utils.class_names"},
          "matplotlib": {"utils.plots", "utils.pictures"},
          "starlette": {"utils.editor"}, "uvicorn": {"utils.editor"},
          "torch.utils.tensorboard": {"utils.report"}, "wandb": {"utils.report"}, "timm": {"utils.optim"},
          "torch.distributed": {"utils.distributed"}}
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in [*ROOT.glob("*.py"), *ROOT.glob("models/*.py"), *ROOT.glob("utils/*.py")]}


def imports_of(module: str) -> set[str]:
    """Absolute names, relative imports resolved; `from utils import data` counts as utils.data."""
    package = module if MODULES[module].name == "__init__.py" else module.rpartition(".")[0]
    found = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(filter(None, [package if node.level else "", node.module or ""]))
            below = {f"{base}.{name.name}" for name in node.names} & set(MODULES)
            found |= below or {base}
    return found


@pytest.mark.parametrize("module", MODULES)
def test_imports_form_the_agreed_graph(module):
    ours = {name for name in imports_of(module) if name.partition(".")[0] in OWN}
    allowed = ALLOWED.get(module, set())
    beyond = {name for name in ours if name not in allowed and name.partition(".")[0] not in allowed - {"configs"}}
    if module in VERBS:
        beyond = {name for name in ours if name.partition(".")[0] not in allowed}
    assert not beyond, f"{module} imports {beyond}"


@pytest.mark.parametrize("library", FENCED)
def test_third_parties_stay_behind_their_fence(library):
    users = {module for module in MODULES if any(f"{name}.".startswith(f"{library}.") for name in imports_of(module))}
    assert users <= FENCED[library], users - FENCED[library]


def test_configs_imports_ml_collections_and_the_standard_library_alone():
    assert {name.partition(".")[0] for name in imports_of("configs")} <= {"ml_collections", "argparse", "re", "shlex"}


def test_every_module_has_a_test_of_its_own():
    tests = {path.stem.removeprefix("test_") for path in (ROOT / "tests").glob("test_*.py")}
    untested = {module.rpartition(".")[2] for module in MODULES} - tests - {"models", "utils"}
    untested -= {"prepare"}                        # what it makes is what tests/test_prepared.py reads
    assert not untested, untested


def test_no_drawer_for_everything():
    names = {path.stem for path in [*ROOT.glob("*.py"), *ROOT.glob("models/*"), *ROOT.glob("utils/*")]}
    assert not names & {"misc", "common", "helpers", "helper", "tools", "util", "utils"} - {"utils"}


@pytest.mark.parametrize("path", list(MODULES.values()), ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_functions_stay_readable(path):
    """A file over 300 lines or a function over 60 wants a reason: the list below holds them."""
    reasons = {
        "train.py": "the composition root: it alone introduces models, utils and configs to each other",
        "train": "the step loop is meant to be read top to bottom in one place",
        "configs.py": "one table a kind of thing; a table may be long",
    }
    text = path.read_text()
    assert text.startswith('"""'), "a file begins with what it is"
    assert text.count("\n") <= 300 or path.name in reasons, text.count("\n")
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 60 or node.name in reasons, node.name
    assert not re.search(r"\b(TODO|FIXME|XXX)\b", text)
