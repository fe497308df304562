"""Write into docs/ what the tests of the promises tried: they collect it in docs/reliability.json, the pages show it as tables.

python -m pytest -m contract --full --figures docs/reliability.json     tries all promises at full counts
python tests/support/figures.py                                                 writes the tables into the pages of TABLES
"""

import json
import re
import string
from pathlib import Path

DOCS = Path(__file__).resolve().parents[2] / "docs"
BEGIN, END = "<!-- figures: tests/support/figures.py writes what follows -->\n", "<!-- figures end -->\n"
REASON = re.compile(r" \((?:Connection closed|Read error).*")     # depends on timing


def add(file: Path, found: dict[str, list[dict]]) -> None:
    """Replace the rows of the tests in `found` (rows by test); keep the rows of other tests."""
    kept = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(dict(sorted((kept | found).items())), indent=1) + "\n")


def counts_table(rows: dict[str, list[dict]]) -> str:
    """Return the table of how often each promise was tried, and the machine."""
    lines = ["| promise | what was tried | times | lost or wrong |", "|---|---|---:|---:|"]
    shown = [row for some in rows.values() for row in some if "nodes" not in row]
    for row in sorted(shown, key=lambda row: (int(row["promise"][1:]), row["what"])):
        lines.append(f"| {row['promise']} | {row['what']} | {row['tried']:,} | {row['lost']} |")
    machines = sorted({f"{row['machine']}, torch {row['torch']}" for some in rows.values() for row in some})
    seconds = sum(max(row["seconds"] for row in some) for some in rows.values())
    return "\n".join(lines) + f"\n\nMachine: {'; '.join(machines)}; {seconds / 60:.0f} minutes of tests in all.\n"


def nodes_table(rows: dict[str, list[dict]]) -> str:
    """Return the table of what two nodes printed and how they ended. Letters stand for messages, which are listed below it."""
    messages: dict[str, str] = {}

    def letter(line: str) -> str:
        return messages.setdefault(REASON.sub(" (...) ...", line), string.ascii_uppercase[len(messages)])

    lines = ["| what happens | node 0 prints | code | node 1 prints | code | seconds |", "|---|---|---:|---|---:|---:|"]
    for row in (row["nodes"] for some in rows.values() for row in some if "nodes" in row):
        cells = [row["fault"]]
        for printed, code in zip(row["printed"], row["codes"]):
            cells += [", ".join(map(letter, printed)) or "-", {None: "-", -9: "killed"}.get(code, str(code))]
        lines.append(f"| {' | '.join(cells)} | {row['seconds']} |")
    listed = [f"| {name} | `{line}` |" for line, name in messages.items()]
    return "\n".join([*lines, "", "| | message |", "|---|---|", *listed]) + "\n"


TABLES = {"several_nodes.md": nodes_table, "promises.md": counts_table}


def page(name: str, text: str, rows: dict[str, list[dict]]) -> str:
    """Return the text of a page of docs/ with its table made of these rows."""
    before, _, rest = text.partition(BEGIN)
    return before + BEGIN + TABLES[name](rows) + END + rest.partition(END)[2]


if __name__ == "__main__":
    recorded = json.loads((DOCS / "reliability.json").read_text())
    for name in TABLES:
        (DOCS / name).write_text(page(name, (DOCS / name).read_text(), recorded))
