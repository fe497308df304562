"""Runs the notebook without Jupyter, and stores its outputs: python tests/support/run_notebook.py [--set NAME=VALUE] [PATH]

Without PATH the notebook itself gets the outputs. NAME=VALUE replaces a variable of its first cell of code, in a copy:

    python tests/support/run_notebook.py --set 'PHOTOS="flowers"' --set 'CHECKPOINT="output/flowers"' /tmp/looked_at.ipynb
"""

import argparse
import ast
import base64
import contextlib
import io
import json
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "1000")         # as train.py, before PyTorch is loaded

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot
from matplotlib.figure import Figure
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOK = ROOT / "visualize_attention_map.ipynb"


def read_cells(kind: str = "code") -> list[dict]:
    return [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == kind]


def with_values(cells: list[dict], values: dict[str, str]) -> list[str]:
    """The sources of the cells, with other values of the variables in the first one."""
    sources = ["".join(cell["source"]) for cell in cells]
    for name, value in values.items():
        sources[0], count = re.subn(rf"^{name} = \S+", lambda _, line=f"{name} = {value}": line, sources[0], flags=re.M)
        assert count == 1, name
    return sources


def run(sources: list[str]) -> Iterator[list[dict]]:
    """Run cells one after the other -> the outputs of each, as a notebook stores them. Magics are skipped."""
    shown = []
    names = {"display": lambda figure: shown.append(("display_data", figure))}
    for number, source in enumerate(sources, 1):
        shown.clear()
        body = ast.parse("\n".join(line for line in source.splitlines() if not line.startswith("%")))
        last = body.body.pop() if body.body and isinstance(body.body[-1], ast.Expr) else None
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(compile(body, f"cell {number}", "exec"), names)
            value = last and eval(compile(ast.Expression(last.value), f"cell {number}", "eval"), names)
        lines = printed.getvalue().splitlines(True)
        outputs = [{"name": "stdout", "output_type": "stream", "text": lines}] if lines else []
        outputs += [{"data": _data(figure), "metadata": {}, "output_type": kind} for kind, figure in shown]
        if isinstance(value, Figure):
            outputs.append({"data": _data(value), "execution_count": number, "metadata": {}, "output_type": "execute_result"})
        pyplot.close("all")
        yield outputs


def _data(figure: Figure) -> dict:
    """The picture has 256 colors: a third of the bytes."""
    whole, small = io.BytesIO(), io.BytesIO()
    figure.savefig(whole, format="png", bbox_inches="tight")
    image = Image.open(whole).convert("RGB")
    image.quantize(256, Image.Quantize.MAXCOVERAGE, kmeans=3, dither=Image.Dither.NONE).save(small, "PNG", optimize=True)
    return {"image/png": base64.b64encode(small.getvalue()).decode() + "\n", "text/plain": [repr(figure)]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("path", nargs="?", type=Path, default=NOTEBOOK)
    parser.add_argument("--set", action="append", default=[])
    args = parser.parse_args()
    os.chdir(ROOT)
    sys.path.insert(0, str(ROOT))
    notebook = json.loads(NOTEBOOK.read_text())
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    values = dict(one.split("=", 1) for one in args.set)
    sources = with_values(cells, values)
    for number, (cell, source, outputs) in enumerate(zip(cells, sources, run(sources)), 1):
        cell |= {"execution_count": number, "outputs": outputs, "source": source.splitlines(True)}
    args.path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
