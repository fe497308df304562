"""What the contract's tests tried, for docs/reliability.md: collected in reliability.json, shown as a table.

python -m pytest -m contract --full --figures docs/reliability.json     the whole contract at full counts
python tests/support/figures.py                                                 writes the table into docs/reliability.md
"""

import json
from pathlib import Path

DOCS = Path(__file__).resolve().parents[2] / "docs"
BEGIN, END = "<!-- figures: tests/support/figures.py writes what follows -->\n", "<!-- figures end -->\n"


def add(file: Path, found: dict[str, list[dict]]) -> None:
    """Replaces the rows of the tests in `found`, by test; those of other tests stay."""
    kept = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(dict(sorted((kept | found).items())), indent=1) + "\n")


def table(rows: dict[str, list[dict]]) -> str:
    lines = ["| promise | what was tried | times | lost or wrong |", "|---|---|---:|---:|"]
    shown = [row for some in rows.values() for row in some if "nodes" not in row]
    for row in sorted(shown, key=lambda row: (int(row["promise"][1:]), row["what"])):
        lines.append(f"| {row['promise']} | {row['what']} | {row['tried']:,} | {row['lost']} |")
    machines = sorted({f"{row['machine']}, torch {row['torch']}" for some in rows.values() for row in some})
    seconds = sum(max(row["seconds"] for row in some) for some in rows.values())
    return "\n".join(lines) + f"\n\nMachine: {'; '.join(machines)}; {seconds / 60:.0f} minutes of tests in all.\n"


def nodes_table(rows: dict[str, list[dict]]) -> str:
    """Of the rows that say what two nodes printed, and how they ended."""
    lines = ["| what happens | node 0 prints | code | node 1 prints | code | seconds |", "|---|---|---:|---|---:|---:|"]
    for row in (row["nodes"] for some in rows.values() for row in some if "nodes" in row):
        cells = [row["fault"]]
        for printed, code in zip(row["printed"], row["codes"]):
            cells += ["<br>".join(f"`{line}`" for line in printed) or "-", {None: "-", -9: "killed"}.get(code, str(code))]
        lines.append(f"| {' | '.join(cells)} | {row['seconds']} |")
    return "\n".join(lines) + "\n"


def document(text: str, rows: dict[str, list[dict]]) -> str:
    """The text with the tables of these rows in their places, which are in the order of TABLES."""
    written = ""
    for make in TABLES:
        before, _, rest = text.partition(BEGIN)
        written += before + BEGIN + make(rows) + END
        text = rest.partition(END)[2]
    return written + text


TABLES = (nodes_table, table)

if __name__ == "__main__":
    page = DOCS / "reliability.md"
    page.write_text(document(page.read_text(), json.loads((DOCS / "reliability.json").read_text())))
