"""RESULTS.md out of results/*.json: python -m benchmarks.report"""

import json
from pathlib import Path

from . import goals, harness

HERE = Path(__file__).resolve().parent
RESULTS, PAGE = HERE / "results", HERE / "RESULTS.md"
HEAD = """# Results

Written by `python -m benchmarks.report` out of results/*.json; README.md says how to measure and what a ratio is. Above 1 is
better than the baseline, always: faster, or less memory.
"""


def write() -> None:
    PAGE.write_text(page({file.stem: json.loads(file.read_text()) for file in sorted(RESULTS.glob("*.json"))}))


def page(machines: dict[str, dict[str, dict]]) -> str:
    """machines: by name, the records by title"""
    if not machines:
        return HEAD + "\nNothing has been measured yet.\n"
    return HEAD + "".join(f"\n{section(records)}" for records in machines.values())


def section(records: dict[str, dict]) -> str:
    """One machine: what it is, the goals, and a table for every question."""
    facts = list(records.values())[-1]["machine"]
    place = facts["gpu"] or facts["cpu"]
    lines = [f"## {place}, {facts['cores']} cores", "", _machine(facts), "", "### Goals", "",
             *goals.table(records, on_gpu=bool(facts["gpu"]))]
    for title, record in records.items():
        settings = ", ".join(f"{key} {value}" for key, value in record["settings"].items())
        versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
        lines += ["", f"### {title}", "", *harness.table(record), "", f"`{record['command']}` ({settings}; {record['date']})  ",
                  versions]
    return "\n".join(lines) + "\n"


def _machine(facts: dict) -> str:
    flags = f" ({', '.join(facts['flags'])})" if facts["flags"] else ""
    gpu = f"{facts['gpu']}; " if facts["gpu"] else ""
    return f"{gpu}{facts['cpu']}{flags}, {facts['cores']} cores, {facts['memory']} GiB."


if __name__ == "__main__":
    write()
