"""The table of published files, by the names of models that they belong to; and those on the Hugging Face hub, by timm's names
and by the repositories of their publishers.

published.csv has a line for each: files of Google's and Meta's servers (published.py), timm's weights as timm 1.0.31 lists them,
and the publishers' own in transformers' names. Of several lines of a model the first is the one that its name means. Licences
are those that the repositories state.

    HF_ENDPOINT     another server with the same tree (a mirror)
    HF_TOKEN        the key of an account, for repositories that ask for one: sent to that server alone
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
# Before ORG/NAME: the hub's repository and no folder, whoever published it. The first two are timm's spelling.
PREFIXES = ("hf-hub:", "hf_hub:", f"{HUB}/")
ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")
INDEX = f"{WEIGHTS[0]}.index.json"                          # beside weights in several files
NOT_FOUND, NO_ACCESS = 404, (401, 403)
FREE = re.compile(r"(apache|mit\b|bsd)", re.IGNORECASE)      # licences that ask for nothing but their notice
SIMILAR, ALIKE = 3, 0.75            # how many names are suggested, and the ratio of equal letters from which on they are


@dataclasses.dataclass(frozen=True)
class PublishedFile:
    name: str                   # FOLDER/FILE of published.py, timm's, or the publisher's repository
    model: str                  # the row of configs.py; "": one that is not built here
    repository: str             # on the hub; "": it is on another server
    parameters: float           # millions, without the head
    pixels: int                 # the side of its images
    license: str                # "": not stated
    classes: int                # of its head, or what it projects to; 0: it has none

    @property
    def place(self) -> str:
        """ORG/NAME where its files are kept here: the repository, but for one that timm has under two names, of which only the
        name tells the architecture (quick GELU)."""
        of_two = self.repository.startswith("timm/") and "/" not in self.name
        return f"timm/{self.name}" if of_two else self.repository


@functools.cache
def table() -> tuple[PublishedFile, ...]:
    """The column `repository` is "-" on another server, and empty where the name says it: ORG/NAME, or timm/NAME."""
    with open(TABLE, newline="", encoding="utf-8") as stream:
        return tuple(PublishedFile(
            row["name"], row["model"],
            "" if row["repository"] == "-" else
            row["repository"] or (row["name"] if "/" in row["name"] else f"timm/{row['name']}"),
            float(row["parameters"]), int(row["pixels"]), row["license"], int(row["classes"])) for row in csv.DictReader(stream))


@functools.cache
def _by_name() -> dict[str, PublishedFile]:
    """By name, by repository, by timm's name without its tag, by our model: of several the first."""
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
    """The line that a name means: its own, timm's without its tag (then timm's default), a repository, or a model of ours."""
    return _by_name().get(_bare(text))


def did_you_mean(typed: str) -> str:
    """Return ' Did you mean X or Y?' with the names of models and published files that are most like `typed`, or ''."""
    known: dict[str, str] = {}                          # with and without the publisher: letters and digits -> name
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
    """The row of configs.py that a name of a file means: "" where it is none of those here, None for what is no name."""
    known = published_file(text)
    return known.model if known else None


def repository_of(text: str) -> str | None:
    """ORG/NAME of the repository that a name means (PublishedFile.place); None for what is none. ORG/NAME alone must be of an ORG
    in the table: a folder may be called so too."""
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
    """The file of weights in `folder`, downloaded into it with its config.json unless it is there. Raises WeightsError.

    The weights come last: where they are, all is.
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
    """In the config.json of a repository with two names, that of the file which was asked for."""
    known = published_file(place)
    if known is None or known.place == known.repository or not config.is_file():
        return
    said, mine = config.read_text(encoding="utf-8", errors="replace"), f'"architecture": "{known.name.partition(".")[0]}"'
    named = re.sub(r'"architecture"\s*:\s*"\w*"', mine, said)
    if named != said:
        part = config.with_name(f"{config.name}.part")
        part.write_text(named, encoding="utf-8")
        os.replace(part, config)


def _is_of_timm(config: Path) -> bool:
    return '"architecture"' in config.read_text(encoding="utf-8", errors="replace")


def _get(place: str, name: str, folder: Path) -> Path | None:
    """None where the repository has no such file."""
    try:
        return download(address(place, name), folder / name, headers=_headers())
    except DownloadError as error:
        if error.status in NO_ACCESS:
            raise WeightsError(_refused(place, folder, error.status, error.code)) from error
        if error.status == NOT_FOUND:
            return None
        raise _unreached(place, folder, name, error) from error


def check_access(place: str, folder: Path) -> None:
    """Raises WeightsError where the weights are neither in `folder` nor the hub answers for them: it does not, or it wants an
    account."""
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
                         f"of {page_of(place)} on another machine, and put both into {folder}")


def _refused(place: str, folder: Path, status: int, code: str = "") -> str:
    by_hand = f"Or put its {WEIGHTS[0]} and {CONFIG} into {folder}"
    if code == "RepoNotFound" and _headers():
        return f"{place}: the hub has no such repository, or HF_TOKEN has no access to it ({status}). {by_hand}"
    if not _headers():
        return (f"{place}: the hub gives it to signed-in accounts only, or has no such repository ({status}). Accept the "
                f"terms at {page_of(place)} if there are any, and set HF_TOKEN to a token of your account. {by_hand}")
    return (f"{place}: the hub refuses it to the account of HF_TOKEN ({status}). Accept the terms at {page_of(place)}, "
            f"and wait until access is granted; or check the token. {by_hand}")


def _lacks(place: str, folder: Path) -> str:
    files = f"{CONFIG} and {' or '.join(WEIGHTS)}"
    if check_reachable(address(place, INDEX), folder / INDEX, _headers()) == 0:
        return (f"{place}: its weights are in several files ({INDEX}). Download them on their own, save them in one file "
                "(save_pretrained with a larger max_shard_size), and give that folder")
    return (f"{place}: the hub has no such repository, or not {files} in it ({NOT_FOUND} from {endpoint()}). See "
            f"{page_of(place)}; other files of weights are given themselves")
