"""The documents of the project: their pages, and the commands, links and headings in them."""

import re
import shlex
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PLACES = "*.md", "docs/*.md", "benchmarks/*.md", "assets/*.md", "tests/fixtures/**/*.md"
COMMAND = re.compile(r"(?:[A-Z_]+=\S* )*(?:bash \w+\.sh|python (?:\w+\.py|-m [\w.]+|-c '))[^`]*")
ENDS = ">", "|", "&", "&&", ";"


@cache
def pages() -> dict[str, str]:
    """Return the text of every page, by its path from the root."""
    return {path.relative_to(ROOT).as_posix(): path.read_text() for place in PLACES for path in sorted(ROOT.glob(place))}


def reader_pages() -> dict[str, str]:
    """Return the pages whose commands a reader of README.md is to type."""
    return {name: text for name, text in pages().items() if name in ("README.md", "MODEL_ZOO.md", "CONTRIBUTING.md")
            or name.startswith("docs/")}


def block_commands(text: str) -> list[str]:
    """Return the lines of the bash blocks, with continued lines joined. Of a whole script only those that start our programs."""
    found = []
    for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL):
        lines = [line for line in block.replace("\\\n", " ").splitlines() if line.strip()]
        found += [line for line in lines if COMMAND.match(line)] if block.startswith("#!") else lines
    return found


def inline_commands(text: str) -> list[str]:
    """Return the commands between backticks, without those with a placeholder (a bare word in capitals, or ...), and without
    those of other programs: the first column of a table "there" and "here"."""
    found, theirs = [], False
    for line in re.sub(r"```.*?```", "", text, flags=re.DOTALL).splitlines():
        theirs = line.startswith("|") and (theirs or line == "| there | here |")
        for span in re.findall(r"`([^`]+)`", line.split("|", 2)[2] if theirs else line):
            if COMMAND.fullmatch(span) and "..." not in span and not re.search(r" [A-Z]+(?= |$)", span):
                found.append(span)
    return found


def words_of(command: str) -> tuple[dict[str, str], list[str]]:
    """Return the variables that a command sets, and its words, without what a shell does behind a > or |. The part in front of
    a pipe into one of our programs is left out."""
    words = shlex.split(command, comments=True)
    if "|" in words and "python" in words[words.index("|"):]:
        words = words[words.index("|") + 1:]
    words = words[:next((at for at, word in enumerate(words) if word in ENDS), None)]
    first = next((at for at, word in enumerate(words) if not re.match(r"[A-Z_][A-Z0-9_]*=", word)), len(words))
    return dict(word.split("=", 1) for word in words[:first]), words[first:]


def links(text: str) -> list[str]:
    """Return the targets of the links and pictures that are not addresses of the web."""
    text = re.sub(r"```.*?```|`[^`]*`", "", text, flags=re.DOTALL)
    return [target for target in re.findall(r"(?:\]\(|<img src=\")([^)\s\"]+)", text) if not re.match(r"[a-z]+:", target)]


@cache
def anchors(name: str) -> set[str]:
    """Return the anchors that GitHub gives the headings of a page: lower case, no punctuation, hyphens for spaces, numbers for
    repeats."""
    found: list[str] = []
    text = re.sub(r"^```.*?^```", "", pages()[name], flags=re.DOTALL | re.MULTILINE)
    for title in re.findall(r"^#{1,6} (.+)$", text, re.MULTILINE):
        title = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", title)
        anchor = re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")
        repeats = sum(other == anchor or re.fullmatch(re.escape(anchor) + r"-\d+", other) is not None for other in found)
        found.append(f"{anchor}-{repeats}" if repeats else anchor)
    return set(found)
