"""Looks up published files in published.csv, and downloads those on the Hugging Face hub.

published.csv has a line for each file: those on Google's and Meta's servers (published.py), timm's weights as timm 1.0.31 lists
them, and the publishers' own repositories in transformers' format. The name of a model stands for the first of its lines.
Licenses are those that the repositories state.

    HF_ENDPOINT     another server with the same files (a mirror)
    HF_TOKEN        an access token, for repositories that need one; sent only to that server
"""

import csv
import dataclasses
import difflib
import functools
import os
import re
import urllib.parse
from pathlib import Path

from models.errors import WeightsError

from .described import CONFIG, PREPROCESSOR, WEIGHTS, is_weights_folder, weights_in
from .download import DownloadError, check_reachable, download

TABLE = Path(__file__).with_name("published.csv")
HUB = "https://huggingface.co"
# Before ORG/NAME, these mean a repository of the hub, not a folder. The first two are timm's spelling.
PREFIXES = ("hf-hub:", "hf_hub:", f"{HUB}/")
ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")
INDEX = f"{WEIGHTS[0]}.index.json"                          # of weights that are split into several files
NOT_FOUND, NO_ACCESS = 404, (401, 403)
FREE = re.compile(r"(apache|mit\b|bsd)", re.IGNORECASE)      # licenses that only require their notice
SIMILAR, ALIKE = 3, 0.75            # the most names that are suggested, and the least ratio of equal letters


@dataclasses.dataclass(frozen=True)
class PublishedFile:
    name: str                   # FOLDER/FILE of published.py, timm's name, or the publisher's repository
    model: str                  # the row of configs.py; "" for an architecture that is not built here
    repository: str             # on the hub; "" for a file on another server
    parameters: float           # millions, without the head
    pixels: int                 # side of the images
    license: str                # "" if not stated
    classes: int                # outputs of its head or projection; 0 without either

    @property
    def place(self) -> str:
        """The folder ORG/NAME for its files: that of the repository, except for one that timm lists under two names.

        Only the name determines the architecture (quick GELU) there, so each name has a folder.
        """
        of_two = self.repository.startswith("timm/") and "/" not in self.name
        return f"timm/{self.name}" if of_two else self.repository


@functools.cache
def table() -> tuple[PublishedFile, ...]:
    """Read published.csv. Its column `repository` is "-" for another server, and empty for ORG/NAME or timm/NAME of the name."""
    with open(TABLE, newline="", encoding="utf-8") as stream:
        return tuple(PublishedFile(
            row["name"], row["model"],
            "" if row["repository"] == "-" else
            row["repository"] or (row["name"] if "/" in row["name"] else f"timm/{row['name']}"),
            float(row["parameters"]), int(row["pixels"]), row["license"], int(row["classes"])) for row in csv.DictReader(stream))


@functools.cache
def _by_name() -> dict[str, PublishedFile]:
    """Index the table by name, place, repository, timm's name without its tag and our model; the first line of a key wins."""
    found: dict[str, PublishedFile] = {}
    for keys in (lambda file: [file.name], lambda file: [file.place], lambda file: [file.repository],
                 lambda file: [] if "/" in file.name else [arch := file.name.partition(".")[0], f"timm/{arch}"],
                 lambda file: [file.model]):
        for file in table():
            for key in filter(None, keys(file)):
                found.setdefault(key, file)
    return found


@functools.cache
def _publishers() -> frozenset[str]:
    return frozenset(file.repository.partition("/")[0] for file in table() if file.repository)


def published_file(text: str) -> PublishedFile | None:
    """Return the line for a name of a file, timm's name without its tag (timm's default), a repository or one of our models."""
    return _by_name().get(_bare(text))


def did_you_mean(typed: str) -> str:
    """Return ' Did you mean X or Y?' with the names of models and published files most similar to `typed`, or ''."""
    known: dict[str, str] = {}                          # letters and digits, with and without the publisher -> name
    for file in filter(lambda file: file.model, table()):
        for name in filter(None, (file.model, file.name, file.name.rpartition("/")[2], file.name.partition(".")[0])):
            known.setdefault(_letters(name), file.model if name == file.model else file.name)
    begun = [name for name in known if len(typed) > SIMILAR and name.startswith(_letters(typed))]
    close = begun[:SIMILAR] or difflib.get_close_matches(_letters(typed), known, SIMILAR, ALIKE)
    *others, last = list(dict.fromkeys(known[name] for name in close)) or [""]
    return f" Did you mean {' or '.join(filter(None, [', '.join(others), last]))}?" if last else ""


def _letters(text: str) -> str:
    return "".join(re.findall(r"[a-z0-9+]", text.lower()))


def model_of(text: str) -> str | None:
    """Return the row of configs.py for the name of a file: "" if it is not built here, None if the name is unknown."""
    known = published_file(text)
    return known.model if known else None


def repository_of(text: str) -> str | None:
    """Return ORG/NAME of the repository that a name means (PublishedFile.place), or None.

    A plain ORG/NAME could also be a folder, so ORG must occur in the table.
    """
    if known := published_file(text):
        return known.place or None
    bare = _bare(text)
    meant = bare != text or bare.partition("/")[0] in _publishers()
    return bare if meant and ID.fullmatch(bare) else None


def _bare(text: str) -> str:
    prefix = next((prefix for prefix in (*PREFIXES, f"{endpoint()}/") if text.startswith(prefix)), "")
    return text.removeprefix(prefix).rstrip("/") if prefix else text


def endpoint() -> str:
    return (os.environ.get("HF_ENDPOINT") or HUB).rstrip("/")


def page_of(place: str) -> str:
    return f"{HUB}/{_published_at(place)}"


def address(place: str, file: str = WEIGHTS[0]) -> str:
    return f"{endpoint()}/{urllib.parse.quote(_published_at(place))}/resolve/main/{file}"


def _published_at(place: str) -> str:
    known = published_file(place)
    return known.repository if known else place


def _headers() -> dict[str, str]:
    token = (os.environ.get("HF_TOKEN") or "").strip()
    return {"Authorization": f"Bearer {token}"} if token else {}


def fetch(place: str, folder: Path) -> Path:
    """Return the file of weights in `folder`; download it with its config.json if it is missing. Raises WeightsError.

    The weights are downloaded last, so a folder with weights is complete.
    """
    if is_weights_folder(folder):
        _name_architecture(place, folder / CONFIG)
        return weights_in(folder)
    if not _get(place, CONFIG, folder):
        raise WeightsError(_lacks(place, folder))
    _name_architecture(place, folder / CONFIG)
    if not _is_of_timm(folder / CONFIG):
        _get(place, PREPROCESSOR, folder)
    for name in WEIGHTS:
        if found := _get(place, name, folder):
            return found
    raise WeightsError(_lacks(place, folder))


def _name_architecture(place: str, config: Path) -> None:
    """For a repository with two names, write the architecture of the requested name into its config.json."""
    known = published_file(place)
    if known is None or known.place == known.repository or not config.is_file():
        return
    text, entry = config.read_text(encoding="utf-8", errors="replace"), f'"architecture": "{known.name.partition(".")[0]}"'
    named = re.sub(r'"architecture"\s*:\s*"\w*"', entry, text)
    if named != text:
        part = config.with_name(f"{config.name}.part")
        part.write_text(named, encoding="utf-8")
        os.replace(part, config)


def _is_of_timm(config: Path) -> bool:
    return '"architecture"' in config.read_text(encoding="utf-8", errors="replace")


def _get(place: str, name: str, folder: Path) -> Path | None:
    """Download one file of a repository; return None if it has no such file. Raises WeightsError."""
    try:
        return download(address(place, name), folder / name, headers=_headers())
    except DownloadError as error:
        if error.status in NO_ACCESS:
            raise WeightsError(_refused(place, folder, error.status, error.code)) from error
        if error.status == NOT_FOUND:
            return None
        raise _unreached(place, folder, name, error) from error


def check_access(place: str, folder: Path) -> None:
    """Raise WeightsError if the weights are not in `folder` and the hub cannot be reached or refuses access."""
    if is_weights_folder(folder):
        return
    try:
        status = check_reachable(address(place), folder / WEIGHTS[0], _headers())
    except DownloadError as error:
        raise _unreached(place, folder, WEIGHTS[0], error) from error
    if status in NO_ACCESS:
        raise WeightsError(_refused(place, folder, status))


def _unreached(place: str, folder: Path, name: str, error: DownloadError) -> DownloadError:
    return DownloadError(f"could not download {address(place, name)} ({error.reason}); download {CONFIG} and {WEIGHTS[0]} "
                         f"from {page_of(place)} on another machine, and put both into {folder}")


def _refused(place: str, folder: Path, status: int, code: str = "") -> str:
    by_hand = f"Or put its {WEIGHTS[0]} and {CONFIG} into {folder}"
    if code == "RepoNotFound" and _headers():
        return f"{place}: the hub has no such repository, or HF_TOKEN has no access to it ({status}). {by_hand}"
    if not _headers():
        return (f"{place}: the hub has no such repository, or only for signed-in accounts ({status}). Accept the terms at "
                f"{page_of(place)} if there are any, and set HF_TOKEN to a token of your account. {by_hand}")
    return (f"{place}: the hub refuses access to the account of HF_TOKEN ({status}). Accept the terms at {page_of(place)} "
            f"and wait until access is granted, or check the token. {by_hand}")


def _lacks(place: str, folder: Path) -> str:
    files = f"{CONFIG} and {' or '.join(WEIGHTS)}"
    if check_reachable(address(place, INDEX), folder / INDEX, _headers()) == 0:
        return (f"{place}: its weights are in several files ({INDEX}). Download them, save them in one file "
                "(save_pretrained with a larger max_shard_size), and use that folder")
    return (f"{place}: the hub has no such repository, or it lacks {files} ({NOT_FOUND} from {endpoint()}). See "
            f"{page_of(place)}; download another file of weights yourself and use its path")
