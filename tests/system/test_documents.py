"""README, MODEL_ZOO and CONTRIBUTING match the code."""

import fnmatch
import importlib
import json
import re
import shlex
from pathlib import Path

import figures
import pytest
import zoo_page

import configs
from models import list_models
from models.checkpoints.published import META_FILES, PUBLISHED, published_name, published_url
from utils import process
from utils.build.opened import EMBEDDED_MODEL
from utils.config import FLAGS, Facts, parse, preview, resolve
from utils.config.spelling import ELSEWHERE
from utils.report import plots

ROOT = Path(__file__).resolve().parents[2]
README, ZOO, CONTRIBUTING = ((ROOT / name).read_text() for name in ("README.md", "MODEL_ZOO.md", "CONTRIBUTING.md"))


def commands(text: str) -> list[str]:
    """The lines of the bash blocks, continued lines joined."""
    blocks = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    return [line for block in blocks for line in block.replace("\\\n", " ").splitlines() if line.strip()]


FACTS = Facts(50_000, 10, start_head_classes=10)
SHELL = [line for line in commands(README) + commands(ZOO) if re.search(r"bash (train|train_fp16|sweep)\.sh", line)]
PYTHON = [line for line in commands(README) + commands(ZOO) if line.startswith("python train.py")]


@pytest.mark.parametrize("line", SHELL)
def test_a_documented_script_command_makes_a_valid_run(run_script, line):
    """Dry: the variables become flags that train.py accepts together."""
    words = shlex.split(line)
    at = words.index("bash")
    variables = dict(word.split("=", 1) for word in words[:at])
    script = words[at + 1].replace("sweep.sh", "train.sh")          # a sweep hands everything on
    done = run_script(script, *words[at + 2:], **variables | {"DRY_RUN": "1"})
    assert done.returncode == 0, done.stderr
    printed = shlex.split(done.stdout.splitlines()[-1])
    given = parse(printed[printed.index("train.py") + 1:])
    if "resume_path" not in given:
        resolve(given, FACTS)


@pytest.mark.parametrize("line", PYTHON)
def test_a_documented_python_command_is_valid(line):
    given = parse(shlex.split(line)[2:])
    if "resume_path" not in given:
        resolve(given, FACTS)


def test_the_python_example_runs(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    code, = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    result = {}
    exec(code, result)
    assert result["logits"].shape == (4, 10) and "pos_embed resized 4x4 -> 4x8" in capsys.readouterr().out


STORY = commands(README.partition("## Train, look, predict, export")[2].partition("\n## ")[0])


def test_the_story_runs(tmp_path, monkeypatch):
    """Its lines, with a few steps; without what the shell does behind a > or |."""
    assert len(STORY) == 8
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(plots, "save", lambda figure, path: Path(path).touch())
    (tmp_path / "assets").symlink_to(ROOT / "assets")
    for line in STORY:
        words = shlex.split(line, comments=True)
        words = words[:next((at for at, word in enumerate(words) if word in (">", "|")), None)]
        if "digits-model" in words and not (ROOT / "export.py").exists():
            continue
        more = ["--num_steps", "2", "--eval_every", "2", "--device", "cpu"] if words[1] == "train.py" else []
        assert importlib.import_module(words[1].removesuffix(".py")).main(words[2:] + more) == 0, line
    assert Path("output/story/mistakes.csv").exists() and list(Path("output/story").glob("attention-*.png"))


def test_the_commands_are_there():
    assert "bash train.sh" in commands(README) and "bash test.sh" in commands(README)
    assert len(SHELL) > 6 and len(PYTHON) > 3


def test_the_table_of_variables_is_complete_and_its_defaults_are_true():
    section = README.split("## Variables of train.sh")[1].split("\n## ")[0]
    first_cells = "".join(line.split("|")[1] for line in section.splitlines() if "|" in line)
    documented = set(re.findall(r"`([A-Z][A-Z0-9_]+)`", first_cells))
    script = set(re.findall(r"^([A-Z0-9_]+)=\$\{\1:-", (ROOT / "train.sh").read_text(), re.MULTILINE))
    assert documented == script
    rows = {cells[1].strip(" `"): cells[3] for line in section.splitlines() if len(cells := line.split("|")) == 5}
    big, digits = preview({"dataset": "cifar10"}), preview({})
    for variable, flag in (("TRAIN_BATCH_SIZE", "train_batch_size"), ("NUM_STEPS", "num_steps"), ("WARMUP_STEPS", "warmup_steps"),
                           ("LEARNING_RATE", "learning_rate")):
        assert str(big[flag]) in rows[variable] and str(digits[flag]) in rows[variable], variable
    for variable, flag in (("EVAL_BATCH_SIZE", "eval_batch_size"), ("SEED", "seed"), ("FP16_OPT_LEVEL", "fp16_opt_level"),
                           ("DECAY_TYPE", "decay_type"), ("DATA_DIR", "data_dir"), ("PRECISION", "precision")):
        assert str(big[flag]) in rows[variable], variable
    assert all(f"`{name}`" in section + ZOO for name in list_models())


def test_every_name_in_the_zoo_has_the_url_it_is_downloaded_from():
    rows = re.findall(r"^\| `([^`]+/[^`]+)` \| `([^`]+)` \|.*\((https?://[^)]+)\)|^\| `([^`]+/[^`]+)` \| `([^`]+)` \|.*<(https?://[^>]+)>",
                      ZOO, re.MULTILINE)
    rows = [[part for part in row if part] for row in rows]
    assert len(rows) > 40
    for name, model, url in rows:
        assert published_name(name) == name and published_url(name) == url, name
        assert model in list_models(), model


FILES = re.findall(r"^\| `([^`]+/[^`]+)` \| `[^`]+` \| (\d+)(?: \\\*)? \| (\w+) \|.*(https?://[^>)]+)", ZOO, re.MULTILINE)
VIEWS = re.findall(r"^\| `([\w+*/-]+)` \| ([\w, ]+?)(?: \\\*)? \| (\d+) \| (\w+) \| ([\d.]+) \|$", ZOO, re.MULTILINE)


def view_of(name: str, source: str) -> tuple[int, str, float] | None:
    """Image size, interpolation and crop by which the page says that `source` evaluates a published file."""
    for pattern, sources, *view in VIEWS:
        if fnmatch.fnmatchcase(name, pattern) and source in sources.split(", "):
            size, interpolation, crop = view
            given = parse(["--img_size", size, "--interpolation", interpolation, "--eval_crop", crop])
            return given["img_size"], given["interpolation"], given["eval_crop"]
    return None


def test_every_published_head_of_imagenet_says_how_its_figure_is_reproduced():
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
def test_the_page_has_the_files_of_timm_and_evaluates_them_as_timm_does():
    models = pytest.importorskip("timm.models")
    known = {url: (name, head) for name, _, head, url in FILES}
    fetched = [theirs for theirs in map(models.get_pretrained_cfg, models.list_pretrained()) if re.search(
        r"vit_models/(augreg|sam)/(?!Mixer)|fbaipublicfiles\.com/(mae/|deit/(deit_(?!3)|[A-Z]+\d+_))", theirs.url or "")]
    heads = [(known[theirs.url][0], theirs) for theirs in fetched if known[theirs.url][1] == "1000"]
    assert len(heads) > 40
    for name, theirs in heads:
        assert view_of(name, "timm") == (theirs.input_size[-1], theirs.interpolation, theirs.crop_pct), name
        assert theirs.crop_mode == "center"


def test_what_is_made_of_rows_is_as_its_script_makes_it():
    assert zoo_page.page(ZOO) == ZOO, "run python tests/support/zoo_page.py"
    cells = [cell for line in ZOO.splitlines() if line.startswith("|") for cell in line.split(" | ")]
    assert max(map(len, cells)) <= 200
    assert all(zoo_page.owner(model) or model == EMBEDDED_MODEL for model in list_models())


def test_the_overview_of_recipes_says_which_start_from_scratch():
    table = ZOO.split("\n## Recipes\n")[1]
    rows = dict(re.findall(r"^\| `([\w-]+)` \| (scratch|trained weights) \| .+ \|$", table, re.MULTILINE))
    scratch = {name for name, row in configs.RECIPES.items() if row.get("pretrained_dir") == "none"}
    assert set(rows) == {"auto", *configs.RECIPES} and {name for name in rows if rows[name] == "scratch"} == scratch
    assert all(name in FLAGS["recipe"].help for name in scratch)
    named = README.split("## Recipes and knobs")[1].split(" start from scratch\n")[0].splitlines()[-1]
    assert set(re.findall(r"`([\w-]+)`", named)) == scratch


def test_no_example_on_images_of_one_s_own_starts_from_scratch():
    own = [parse(words) for words in (shlex.split(line)[2:] for line in PYTHON) if {"folder", "csv"} & set(words)]
    own += [dict(word.split("=", 1) for word in shlex.split(line) if re.match("[A-Z_]+=", word)) for line in SHELL
            if re.search("DATASET=(folder|csv)", line)]
    scratch = {name for name, row in configs.RECIPES.items() if row.get("pretrained_dir") == "none"}
    assert len(own) > 3 and not any(given.get("recipe", given.get("RECIPE")) in scratch for given in own)


RECIPE_TABLES = dict(re.findall(r"^### `([\w-]+)`\n(.*?)(?=^##)", ZOO.split("\n## Recipes\n")[1], re.DOTALL | re.MULTILINE))


@pytest.mark.parametrize("recipe", configs.RECIPES)
def test_the_table_of_a_recipe_holds_its_row(recipe):
    rows = re.findall(r"^\| `(\w+)` \| (.*?) \| (.+) \|$", RECIPE_TABLES[recipe], re.MULTILINE)
    given = parse([word for flag, here, _ in rows for word in (f"--{flag}", here)])
    row = {name: value for name, value in configs.RECIPES[recipe].items() if name != "function"}
    assert given == row and all(source.strip() for _, _, source in rows)


def test_every_default_checkpoint_can_be_found():
    for model in list_models():
        assert model == EMBEDDED_MODEL or published_name(model), model


def test_the_page_on_other_programs_has_every_name():
    page = (ROOT / "docs" / "other_programs.md").read_text()
    taken, refused = page.split("\n## Refused")
    rows = re.findall(r"^\| `--(\w+)` \| (.*) \|$", taken, re.MULTILINE)
    assert {row.name: list(row.aliases) for row in FLAGS.values() if row.aliases} == {
        name: re.findall(r"`--?(\w+)`", names) for name, names in rows}
    for name, (_, why) in ELSEWHERE.items():
        assert re.search(rf"^\| .*`--?{name}`.* \| {re.escape(why)} \|$", refused, re.MULTILINE), name


def test_named_files_exist():
    for text in (README, CONTRIBUTING):
        for name in re.findall(r"`((?:models|utils|assets|tests|docs|benchmarks)/[\w./-]*|\w+\.(?:py|sh|md|ipynb))`", text):
            assert (ROOT / name).exists(), name


def test_the_figures_of_reliability_are_those_that_were_recorded():
    page = (ROOT / "docs" / "reliability.md").read_text()
    assert page == figures.document(page, json.loads((ROOT / "docs" / "reliability.json").read_text()))


def test_every_promise_and_exit_code_is_in_the_page():
    page = (ROOT / "docs" / "reliability.md").read_text()
    tests, modules = ([file.read_text() for file in (ROOT / place).rglob("*.py")] for place in ("tests", "utils"))
    promised = {number for text in tests for number in re.findall(r'(?:contract|^[A-Z]+ = )\("(P\d+)"', text, re.MULTILINE)}
    assert len(promised) > 15
    assert promised <= set(re.findall(r"^\| (P\d+) \| ", page.partition("## What was tried")[0], re.MULTILINE))
    coded = {int(code) for text in modules for code in re.findall(r"^    exit_code = (\d+)", text, re.MULTILINE)}
    coded |= {code for name, code in vars(process).items() if name.startswith("EXIT_")}
    assert coded | {0, 1, 2, 143} == {int(code) for code in re.findall(r"^\| (\d+) \| ", page, re.MULTILINE)}
