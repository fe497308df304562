"""The documents match the code: their commands work, their links have targets, their tables have the values of the code."""

import fnmatch
import importlib
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import types
from itertools import pairwise
from pathlib import Path

import documents
import figures
import pytest
import torch
import zoo_page
from PIL import Image
from runs import make_tree

import configs
from models import list_models, load_model
from models.checkpoints import hub
from models.checkpoints.published import META_FILES, PUBLISHED, published_name, published_url
from utils import process
from utils.build.opened import EMBEDDED_MODEL
from utils.config import FLAGS, Facts, parse, preview, resolve
from utils.config.spelling import ELSEWHERE, name_model
from utils.data.transforms import eval_transform, normalize
from utils.report import plots

ROOT = Path(__file__).resolve().parents[2]
README, ZOO, CONTRIBUTING = (documents.pages()[name] for name in ("README.md", "MODEL_ZOO.md", "CONTRIBUTING.md"))
VARIABLES = documents.pages()["docs/variables.md"]
FACTS = Facts(50_000, 10, start_head_classes=10)
COMMANDS = list(dict.fromkeys(command for text in documents.reader_pages().values()
                              for command in [*documents.block_commands(text), *documents.inline_commands(text)]))
SCRIPTS = "train.sh", "train_fp16.sh", "sweep.sh"


def program_of(command: str) -> str:
    """Return the script, file or module that a command starts, or its first word."""
    _, words = documents.words_of(command)
    if words and words[0] in ("bash", "python"):
        return words[2 if words[1] == "-m" else 1]
    return words[0] if words else ""


SHELL = [command for command in COMMANDS if program_of(command) in SCRIPTS]
PYTHON = [command for command in COMMANDS if program_of(command) == "train.py"]
VERBS = [command for command in COMMANDS if program_of(command) in (
    "dataset.py", "predict.py", "visualize.py", "export.py", "annotate.py")]


def flags_of_script(run_script, command: str) -> list[str]:
    """Return the flags that a script passes to train.py. `true` stands in for Python: it passes as one with all packages, at no
    cost."""
    variables, (_, script, *flags) = documents.words_of(command)
    done = run_script(script.replace("sweep.sh", "train.sh"), *flags, PYTHON=shutil.which("true"), **variables | {"DRY_RUN": "1"})
    assert done.returncode == 0, done.stderr
    printed = shlex.split(done.stdout.splitlines()[-1])          # a sweep passes everything on
    return printed[printed.index("train.py") + 1:]


@pytest.mark.parametrize("command", SHELL)
def test_documented_script_command_makes_a_valid_run(run_script, command):
    """With DRY_RUN: the variables become flags that train.py accepts together."""
    given = parse(flags_of_script(run_script, command))
    if "resume_path" not in given:
        resolve(name_model(given, hub), FACTS)


@pytest.mark.parametrize("command", PYTHON)
def test_documented_train_command_is_valid(command):
    words = documents.words_of(command)[1][2:]
    if words != ["--help"] and "resume_path" not in (given := parse(words)):
        resolve(name_model(given, hub), FACTS)


@pytest.mark.parametrize("command", VERBS)
def test_documented_command_of_another_program_is_valid(command, tmp_path, monkeypatch):
    """Its flags are parsed, with stand-ins for the files, folders and packages that it needs."""
    monkeypatch.chdir(tmp_path)
    program, *words = documents.words_of(command)[1][1:]
    module = importlib.import_module(program.removesuffix(".py"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    values = {flag: value for flag, value in pairwise(words) if flag in ("--checkpoint", "--image", "--data_dir")}
    models = [values.pop("--checkpoint")] if "--checkpoint" in values else words[:1] * (program != "dataset.py")
    images = [*values.values(), *(word for word in words[1:2] if program == "predict.py" and not word.startswith("-"))]
    for names, stand_in in ((models, "ViT-Nano_2-letters.npz"), (images, "pictures")):
        for name in filter(lambda name: not published_name(name), names):
            Path(name).parent.mkdir(parents=True, exist_ok=True)
            Path(name).symlink_to(ROOT / "assets" / stand_in)
    if program == "dataset.py":
        for name in ("check", "prepare"):
            monkeypatch.setattr(module, name, lambda flags: None)
        assert module.main(words) == 0
        return
    module.parse(words)


def test_every_other_command_starts_something_that_exists():
    rest = [command for command in COMMANDS if command not in SHELL + PYTHON + VERBS]
    for command in rest:
        words, program = documents.words_of(command)[1], program_of(command)
        if words[0] == "pip":
            assert "-r" not in words or (ROOT / words[words.index("-r") + 1]).is_file(), command
        elif words[:2] == ["python", "-m"]:
            assert importlib.util.find_spec(program), command
            assert program != "models" or not words[3:] or published_name(words[3]), command
        elif words[:2] == ["python", "-c"]:
            exec(words[2], {})
        elif words[0] in ("bash", "python"):
            assert (ROOT / program).is_file() or program == "my_script.py", command
        else:
            assert words[0] in ("export", "source", "tensorboard"), command


EXPORT_EXAMPLES = re.findall(r"```python\n(.*?)```", documents.pages()["docs/export.md"], re.DOTALL)
STORY = documents.block_commands(README.partition("## Your own photographs")[2].partition("\n## ")[0])
TINY = ["--model_type", "ViT-Nano_2", "--pretrained_dir", str(ROOT / "assets/ViT-Nano_2-letters.npz"), "--num_steps", "2",
        "--eval_every", "2", "--device", "cpu"]


@pytest.fixture(scope="module")
def story(tmp_path_factory):
    """Run the commands of README.md in a folder with photographs, with a small model and 2 steps, without the shell's part of a
    command (behind > or |). Return the folder."""
    folder, request = tmp_path_factory.mktemp("story"), pytest.MonkeyPatch()
    with request.context() as patch:
        patch.chdir(folder)
        patch.setattr(plots, "save", lambda figure, path: Path(path).write_text("Matplotlib"))
        make_tree(Path("photos"), images=5, splits=("",))
        Path("new-photos").mkdir()
        Image.open("photos/ant/1.png").save("new-photos/1.jpg")
        Path("assets").symlink_to(ROOT / "assets")
        for command in STORY:
            variables, words = documents.words_of(command)
            if words[0] == "bash":
                words = ["python", "train.py", *(f"--{name.lower()}={value}" for name, value in variables.items()), *TINY]
            assert importlib.import_module(words[1].removesuffix(".py")).main(words[2:]) == 0, command
    return folder


def test_the_story_of_the_readme_runs(story):
    assert len(STORY) == 8
    assert (story / "output/first/mistakes.csv").exists() and (story / "photos-model/config.json").exists()
    assert {"curves.png", "confusion.png"} <= {path.name for path in (story / "output/first").iterdir()}
    assert list((story / "output/first").glob("attention-*.png"))


def test_the_python_examples_run(story, monkeypatch, capsys):
    monkeypatch.chdir(story)
    monkeypatch.syspath_prepend(ROOT)
    blocks, result = re.findall(r"```python\n(.*?)```", documents.pages()["docs/python.md"], re.DOTALL), {}
    assert len(blocks) == 4
    for block in blocks:
        exec(block, result)
    assert result["logits"].shape == (1, 10) and not torch.equal(result["maps"][-1], result["edited_maps"][-1])
    assert result["tokens"].shape == (1, 17, 64) and torch.equal(result["features"], result["tokens"][:, 0])
    assert "pos_embed resized 4x4 -> 4x8" in capsys.readouterr().out and result["answer"].label in ("ant", "bee")


@pytest.mark.parametrize(("crop", "interpolation"), [(0, "bilinear"), (0.875, "bicubic"), (0.9, "bilinear"), (1, "bicubic")])
def test_the_onnx_example_sees_images_as_the_run_does(crop, interpolation, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.effect_noise((45, 31), 90).convert("RGB").resize((61, 44)).save("photo.jpg", quality=95)
    mean, std, seen = (0.4, 0.5, 0.6), (0.2, 0.3, 0.4), {}
    notes = {"classes": '["ant", "bee"]', "preprocessing": json.dumps(
        {"size": [24, 20], "interpolation": interpolation, "eval_crop": crop, "mean": mean, "std": std})}

    class Session:
        def __init__(self, path):
            assert path == "flowers.onnx"

        def get_modelmeta(self):
            return types.SimpleNamespace(custom_metadata_map=notes)

        def run(self, outputs, inputs):
            seen.update(inputs)
            return [torch.tensor([[0.0, 1.0]])]

    monkeypatch.setitem(sys.modules, "onnxruntime", types.SimpleNamespace(InferenceSession=Session))
    exec(next(block for block in EXPORT_EXAMPLES if "onnxruntime" in block), {})
    image = eval_transform((24, 20), interpolation=interpolation, crop=crop)(Image.open("photo.jpg"))
    expected = normalize(image[None], mean, std).numpy()
    assert seen["images"].dtype == expected.dtype and seen["images"].shape == (1, 3, 24, 20)
    assert abs(seen["images"] - expected).max() < 1e-5


@pytest.mark.reference
def test_the_examples_of_exports_run(story, monkeypatch, capsys):
    """They copy and paste: each has its imports, and all give the same class."""
    for module in ("timm", "transformers", "onnxruntime", "onnxscript"):
        pytest.importorskip(module)
    monkeypatch.chdir(story)
    shutil.copy("new-photos/1.jpg", "photo.jpg")
    for form, output in (("folder", "flowers-model"), ("onnx", "flowers.onnx"), ("torch", "flowers.pt2")):
        assert importlib.import_module("export").main(["output/first", "--to", form, "--output", output]) == 0
    assert len(EXPORT_EXAMPLES) == 4
    expected = load_model("output/first").predict("photo.jpg")
    capsys.readouterr()
    for block in EXPORT_EXAMPLES[:3]:
        exec(block, result := {})
        assert expected.label in capsys.readouterr().out.splitlines()[-1], block
    exec(EXPORT_EXAMPLES[3], {"images": result["images"]})            # it continues the block before it
    assert capsys.readouterr().out == f"{expected.label}\n"
    probabilities = torch.tensor(result["logits"]).softmax(dim=-1)
    assert probabilities.max().item() == pytest.approx(expected.probability, abs=0.01)


def test_models_are_imported_from_another_folder(tmp_path):
    done = subprocess.run([sys.executable, "-c", "from models import list_models; print(list_models())"], cwd=tmp_path, text=True,
                          env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True)
    assert "'ViT-B_16'" in done.stdout, done.stderr


def test_commands_are_found():
    assert "bash train.sh" in COMMANDS and "bash test.sh" in COMMANDS
    assert len(SHELL) > 50 and len(PYTHON) > 20 and len(VERBS) > 20


def test_links_point_to_existing_pages_and_headings():
    for name, text in documents.pages().items():
        for link in documents.links(text):
            path, _, anchor = link.partition("#")
            target = os.path.normpath(f"{os.path.dirname(name)}/{path}".lstrip("/")) if path else name
            assert (ROOT / target).exists(), f"{name}: {link}"
            assert not anchor or anchor in documents.anchors(target), f"{name}: {link}"


def test_anchors_are_those_of_github(monkeypatch):
    text = "# What \"best\" means?\n```bash\n# not this\n```\n## `photos`\n## [A](b.md), c_d - e\n## `photos`\n"
    monkeypatch.setattr(documents, "pages", lambda: {"page.md": text})
    assert documents.anchors("page.md") == {"what-best-means", "photos", "a-c_d---e", "photos-1"}


def test_pages_named_in_the_code_exist():
    for path in [*ROOT.glob("*.py"), *ROOT.glob("*.sh"), *(ROOT / "utils").rglob("*.py"), *(ROOT / "models").rglob("*.py")]:
        for name in re.findall(r"docs/\w+\.md|MODEL_ZOO\.md", path.read_text()):
            assert (ROOT / name).is_file(), f"{path}: {name}"


def test_pages_stay_short():
    sizes = {name: len(text.encode()) for name, text in documents.pages().items()}
    assert sizes["README.md"] < 9_000 and sizes["CONTRIBUTING.md"] < 7_000
    assert not {name for name in sizes if name.startswith("docs/") and sizes[name] > 12_000}


def test_every_page_can_be_reached_from_the_readme():
    reached, new = set(), {"README.md"}
    while new:
        reached |= new
        new = {os.path.normpath(f"{os.path.dirname(name)}/{link.partition('#')[0]}".lstrip("/")) for name in new
               for link in documents.links(documents.pages()[name])} & documents.pages().keys() - reached
    assert {name for name in documents.pages() if not name.startswith("tests/")} <= reached


def test_the_readme_lists_the_models_that_auto_chooses():
    section = README.split("## Which model, and how long?")[1].split("\n## ")[0]
    assert re.findall(r"^\| [CG]PU, .* \| `(\S+)` \|", section, re.MULTILINE) == [
        row["model"] for device in ("cpu", "cuda") for row in reversed(configs.MODEL_OF_MACHINE) if row["device"] == device]
    for device in ("cpu", "cuda"):
        for row in configs.MODEL_OF_MACHINE:
            if row["device"] == device and row["memory"] and row["cores"]:
                assert f"{row['memory']} GiB" in section
    start = next(line for line in ZOO.splitlines() if line.startswith("| **start with**"))
    for row in configs.MODEL_OF_MACHINE:                     # every machine of the README is in the other page, too
        assert f"`{row['model']}`" + f" (from {row['cores']} cores on)" * (row["cores"] > 1) in start


def test_names_in_the_table_of_changes_are_in_its_files():
    section = CONTRIBUTING.split("## Where do I change X?")[1].split("\n## ")[0]
    for spans in (re.findall(r"`([^`]+)`", line) for line in section.splitlines()):
        code = "".join((ROOT / span).read_text() for span in spans if (ROOT / span).is_file())
        names = {span for span in spans if re.fullmatch(r"[A-Za-z_]+", span) and not (ROOT / span).exists()}
        assert all(name in code for name in names - {"PROGRAMS", "conversions"}), spans          # of files in a folder
    for subject in ("augmentation", "loss", "class weights", "learning-rate schedule", "the head", "images for a step", "log to"):
        assert subject in section, subject


def test_the_table_of_variables_is_complete_and_its_defaults_are_true():
    section = VARIABLES.split("## Variables of train.sh")[1].split("\n## ")[0]
    first_cells = "".join(line.split("|")[1] for line in section.splitlines() if "|" in line)
    documented = set(re.findall(r"`([A-Z][A-Z0-9_]+)`", first_cells))
    script = set(re.findall(r"^([A-Z0-9_]+)=\$\{\1:-", (ROOT / "train.sh").read_text(), re.MULTILINE))
    assert documented == script
    short = README.split("## Variables used most")[1].split("\n## ")[0]
    assert set(re.findall(r"`(\w+)`", "".join(re.findall(r"^\| (`[A-Z].*?) \|", short, re.MULTILINE)))) < script
    rows = {cells[1].strip(" `"): cells[3] for line in section.splitlines() if len(cells := line.split("|")) == 5}
    big, digits = preview({"dataset": "cifar10"}), preview({})
    for variable, flag in (("TRAIN_BATCH_SIZE", "train_batch_size"), ("NUM_STEPS", "num_steps"), ("WARMUP_STEPS", "warmup_steps"),
                           ("LEARNING_RATE", "learning_rate")):
        assert str(big[flag]) in rows[variable] and str(digits[flag]) in rows[variable], variable
    for variable, flag in (("EVAL_BATCH_SIZE", "eval_batch_size"), ("SEED", "seed"), ("FP16_OPT_LEVEL", "fp16_opt_level"),
                           ("DECAY_TYPE", "decay_type"), ("DATA_DIR", "data_dir"), ("PRECISION", "precision")):
        assert str(big[flag]) in rows[variable], variable
    assert all(f"`{name}`" in section + ZOO for name in list_models())


def test_every_name_in_the_zoo_has_its_download_url():
    rows = re.findall(r"^\| `([^`]+/[^`]+)` \| `([^`]+)` \|.*\((https?://[^)]+)\)|^\| `([^`]+/[^`]+)` \| `([^`]+)` \|.*<(https?://[^>]+)>",
                      ZOO, re.MULTILINE)
    rows = [[part for part in row if part] for row in rows]
    assert len(rows) > 40
    for name, model, url in rows:
        assert published_name(name) == name and published_url(name) == url, name
        assert model in list_models(), model


FILES = re.findall(r"^\| `([^`]+/[^`]+)` \| `[^`]+` \| (\d+)(?: \\\*)? \| (\w+) \|.*(https?://[^>)]+)", ZOO, re.MULTILINE)
VIEWS = re.findall(r"^\| `([\w+*/-]+)` \| ([\w, ]+?)(?: \\\*)? \| (\d+) \| (\w+) \| ([\d.]+) \|$",
                   documents.pages()["docs/expected_accuracy_imagenet.md"], re.MULTILINE)


def view_of(name: str, source: str) -> tuple[int, str, float] | None:
    """Return image size, interpolation and crop with which, by the page, `source` evaluates a published file."""
    for pattern, sources, *view in VIEWS:
        if fnmatch.fnmatchcase(name, pattern) and source in sources.split(", "):
            size, interpolation, crop = view
            given = parse(["--img_size", size, "--interpolation", interpolation, "--eval_crop", crop])
            return given["img_size"], given["interpolation"], given["eval_crop"]
    return None


def test_every_published_imagenet_head_has_the_settings_that_reproduce_its_accuracy():
    heads = [(name, int(size)) for name, size, head, _ in FILES if head == "1000" and not name.startswith("gsam/")]
    without = {"imagenet21k", "gsam", "dinov2", "deit3"}
    assert {name.partition("/")[0] for name, _ in heads} == {"augreg", *PUBLISHED, *META_FILES} - without
    for name, size in heads:
        views = [view for source in ("Google", "Meta", "timm") if (view := view_of(name, source))]
        assert views and {view[0] for view in views} == {size}, name
    assert view_of("deit/deit_base_patch16_384-8de9b5d1", "Meta") == (384, "bicubic", 0.875)
    assert view_of("deit/deit_base_patch16_384-8de9b5d1", "timm") == (384, "bicubic", 1.0)
    assert all(any(fnmatch.fnmatchcase(name, pattern) for name, _ in heads) for pattern, *_ in VIEWS)


@pytest.mark.reference
def test_the_page_lists_timms_files_with_timms_settings_of_evaluation():
    models = pytest.importorskip("timm.models")
    known = {url: (name, head) for name, _, head, url in FILES}
    fetched = [theirs for theirs in map(models.get_pretrained_cfg, models.list_pretrained()) if re.search(
        r"vit_models/(augreg|sam)/(?!Mixer)|fbaipublicfiles\.com/(mae/|deit/(deit_(?!3)|[A-Z]+\d+_))", theirs.url or "")]
    heads = [(known[theirs.url][0], theirs) for theirs in fetched if known[theirs.url][1] == "1000"]
    assert len(heads) > 40
    for name, theirs in heads:
        assert view_of(name, "timm") == (theirs.input_size[-1], theirs.interpolation, theirs.crop_pct), name
        assert theirs.crop_mode == "center"


def test_generated_tables_are_up_to_date():
    assert zoo_page.page(ZOO) == ZOO, "run python tests/support/zoo_page.py"
    tables = "MODEL_ZOO|docs/(recipe_|expected|measured|checkpoint)"
    pages = [text for name, text in documents.pages().items() if re.match(tables, name)]
    cells = [cell for text in pages for line in text.splitlines() if line.startswith("|") for cell in line.split(" | ")]
    assert len(pages) == 8 and max(map(len, cells)) <= 200
    assert all(zoo_page.owner(model) or model == EMBEDDED_MODEL for model in list_models())


def test_the_overview_of_recipes_marks_those_that_start_from_scratch():
    table = documents.pages()["docs/recipe_tables.md"]
    rows = dict(re.findall(r"^\| `([\w-]+)` \| (scratch|trained weights) \| .+ \|$", table, re.MULTILINE))
    scratch = {name for name, row in configs.RECIPES.items() if row.get("pretrained_dir") == "none"}
    assert set(rows) == {"auto", *configs.RECIPES} and {name for name in rows if rows[name] == "scratch"} == scratch
    assert all(name in FLAGS["recipe"].help for name in scratch)
    named = " ".join(documents.pages()["docs/recipes.md"].split()).split("The recipes ")[1].split(" start from scratch")[0]
    assert set(re.findall(r"`([\w-]+)`", named)) == scratch


def test_no_example_on_own_images_starts_from_scratch():
    own = [parse(words) for words in (documents.words_of(line)[1][2:] for line in PYTHON) if {"folder", "csv"} & set(words)]
    own += [dict(word.split("=", 1) for word in shlex.split(line) if re.match("[A-Z_]+=", word)) for line in SHELL
            if re.search("DATASET=(folder|csv)", line)]
    scratch = {name for name, row in configs.RECIPES.items() if row.get("pretrained_dir") == "none"}
    assert len(own) > 3 and not any(given.get("recipe", given.get("RECIPE")) in scratch for given in own)


RECIPE_TABLES = {"photos": documents.pages()["docs/recipe_photos.md"]} | {
    name: table for page in ("recipe_tables", "recipe_tables_imagenet")
    for name, table in re.findall(r"^## `([\w-]+)`\n(.*?)(?=^## |\Z)", documents.pages()[f"docs/{page}.md"],
                                  re.DOTALL | re.MULTILINE)}


@pytest.mark.parametrize("recipe", configs.RECIPES)
def test_the_table_of_a_recipe_has_its_settings(recipe):
    rows = re.findall(r"^\| `(\w+)` \| (.*?) \| (.+) \|$", RECIPE_TABLES[recipe], re.MULTILINE)
    given = parse([word for flag, here, _ in rows for word in (f"--{flag}", here)])
    row = {name: value for name, value in configs.RECIPES[recipe].items() if name != "function"}
    assert given == row and all(source.strip() for _, _, source in rows)


def test_every_default_checkpoint_can_be_found():
    for model in list_models():
        assert model == EMBEDDED_MODEL or published_name(model), model


def test_the_page_on_other_programs_lists_every_accepted_and_refused_name():
    page = (ROOT / "docs" / "other_programs.md").read_text()
    _, taken = page.split("\n## Accepted")
    taken, refused = taken.split("\n## Refused")
    rows = re.findall(r"^\| `--(\w+)` \| (.*) \|$", taken, re.MULTILINE)
    assert {row.name: list(row.aliases) for row in FLAGS.values() if row.aliases} == {
        name: re.findall(r"`--?(\w+)`", names) for name, names in rows}
    for name, (_, why) in ELSEWHERE.items():
        assert re.search(rf"^\| .*`--?{name}`.* \| {re.escape(why)} \|$", refused, re.MULTILINE), name


def test_files_named_in_the_documents_exist():
    of_others = "MODEL_ZOO|docs/(other_programs|recipe_tables|expected)"          # they name files of other programs
    pages = {name: text for name, text in documents.reader_pages().items() if not re.match(of_others, name)}
    path = r"`((?:models|utils|assets|tests|docs|benchmarks)/[\w./-]*|(?!test_)\w+\.(?:py|sh|md|ipynb))`"
    for page, text in pages.items():
        for name in re.findall(path, text):
            assert (ROOT / name).exists(), f"{page}: {name}"


def test_the_tables_of_promises_match_the_recorded_results():
    recorded = json.loads((ROOT / "docs" / "reliability.json").read_text())
    for name in figures.TABLES:
        text = documents.pages()[f"docs/{name}"]
        assert text == figures.page(name, text, recorded), "run python tests/support/figures.py"


def test_every_promise_and_exit_code_is_in_the_pages():
    tests, modules = ([file.read_text() for file in (ROOT / place).rglob("*.py")] for place in ("tests", "utils"))
    promised = {number for text in tests for number in re.findall(r'(?:contract|^[A-Z]+ = )\("(P\d+)"', text, re.MULTILINE)}
    promises = documents.pages()["docs/promises.md"].partition("## What was tried")[0]
    assert len(promised) > 15 and promised <= set(re.findall(r"^\| (P\d+) \| ", promises, re.MULTILINE))
    coded = {int(code) for text in modules for code in re.findall(r"^    exit_code = (\d+)", text, re.MULTILINE)}
    coded |= {code for name, code in vars(process).items() if name.startswith("EXIT_")}
    codes = re.findall(r"^\| (\d+) \| ", documents.pages()["docs/reliability.md"], re.MULTILINE)
    assert coded | {0, 1, 2, 143} == {int(code) for code in codes}
