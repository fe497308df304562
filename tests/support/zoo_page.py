"""Write the parts of MODEL_ZOO.md that follow from the code: contents, which model fits where, licences, a table for each family.

python tests/support/zoo_page.py
"""

import re
import sys
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from configs import FAMILIES, MODEL_OF_MACHINE, MODELS  # noqa: E402
from models.checkpoints import hub  # noqa: E402
from models.checkpoints.published import published_name, published_url  # noqa: E402
from utils.training import memory  # noqa: E402

PAGE = ROOT / "MODEL_ZOO.md"
FREE = re.compile(r"(apache|mit\b|bsd)")
# The heading of a family, how its models' names begin, and what it is.
GROUPS = (
    ("DINOv2", ("DINOv2-",), "Self-supervised on 142 million images (arXiv 2304.07193); `-reg` has four registers (2309.16588)."),
    ("DINOv3", ("DINOv3-",), "Self-supervised on 1.7 billion images (arXiv 2508.10104). Meta's own licence, which models "
     "made from them have too. Accept it on the page of the repository, and set `HF_TOKEN`."),
    ("LingBot-Vision and EUPE", ("LingBot-", "EUPE-"), "The architecture of DINOv3 with weights of other publishers."),
    ("TIPSv2", ("TIPSv2-",), "Images and texts; no normalization (mean 0, std 1)."),
    ("SigLIP and SigLIP 2", ("SigLIP-",), "Images and texts (arXiv 2303.15343, 2502.14786); `v2` and `siglip2` are the second. "
     "Names with `gap` use the mean instead of the pooling by attention."),
    ("CLIP of OpenAI, MetaCLIP and DFN", ("CLIP-",), "Images and texts (arXiv 2103.00020); with the quick form of GELU."),
    ("OpenCLIP", ("OpenCLIP-", "TinyCLIP-"), "CLIP trained by LAION and others, with the exact form of GELU; and smaller "
     "models made from it."),
    ("DeiT III", ("DeiT3-",), "Supervised on ImageNet-21k or ImageNet (arXiv 2204.07118)."),
    ("EVA and EVA-02", ("EVA02-", "EVA-"), "Trained to predict CLIP's features of masked images (arXiv 2303.11331); `-clip` are "
     "CLIP towers."),
    ("Perception Encoder", ("PE-",), "Images, videos and texts (arXiv 2504.13181)."),
    ("AIMv2", ("AIMv2-",), "Images and texts, autoregressive (arXiv 2411.14402). Apple's own licence."),
    ("I-JEPA", ("IJEPA-",), "Self-supervised (arXiv 2301.08243). Not for commercial use."),
    ("C-RADIO", ("C-RADIO",), "Distilled from several of the others (arXiv 2412.07679). NVIDIA's own licence."),
    ("BEiT-3 and InternViT", ("BEiT3-", "InternViT-"), "Images and texts (arXiv 2208.10442, 2312.14238)."),
    ("timm's own", ("ViT-Wee", "ViT-Little", "ViT-M", "ViT-Betwixt", "ViT-SO150M", "ViT-B_16-rope"),
     "Supervised on ImageNet-12k or ImageNet, with registers and the mean over the patches."),
    ("ViT, DeiT, CaiT and MAE at timm and transformers", ("ViT-", "R-ViT", "R26-", "R50-", "DeiT-", "CaiT-", "MAE-"),
     "The models of the sections below, in the files that timm and the publishers have on the hub."),
)
# For the table of "Which model?": the models, and the machines (heading, device, GiB, precision).
COMPARED = ("ViT-Ti_16", "DINOv2-S_14-reg", "DINOv2-B_14-reg", "DINOv2-L_14-reg", "DINOv2-g_14-reg")
MACHINES = (("CPU, 16 GB", "cpu", 16, "fp32"), ("8 GB", "cuda", 8, "bf16"), ("16 GB", "cuda", 16, "bf16"),
            ("24 GB", "cuda", 24, "bf16"), ("80 GB", "cuda", 80, "bf16"))
SIZE, CLASSES, LEAST, SOME, MANY = 224, 100, 8, 32, 512


def default_model(device: str, gib: int) -> str:
    """Return the model that `auto` chooses on such a machine. Where that depends on the number of cores, all of them."""
    rows = [row for row in reversed(MODEL_OF_MACHINE) if row["device"] == device and gib >= row["memory"]]
    if device != "cpu":
        return f"`{rows[-1]['model']}`"
    return ", ".join(f"`{row['model']}`" + f" (from {row['cores']} cores on)" * (row["cores"] > 0) for row in rows)


def images(model: str, device: str, gib: int, precision: str, size: int) -> str:
    """Return how many images fit into memory at once, as a power of two of at most MANY; "-" if fewer than LEAST."""
    need = memory.need(MODELS[model].to_dict(), (size, size), CLASSES, precision=precision, optimizer="adamw", device_type=device)
    budget = int(gib * 2**30 * memory.USABLE_FRACTION[device])
    if need.step(LEAST) > budget:
        return "-"
    most = need.fitting(budget)
    return str(min(MANY, 1 << most.bit_length() - 1))


def which_model() -> str:
    """Return the table of "Which model?"."""
    lines = ["| model, image size | parameters | " + " | ".join(heading for heading, *_ in MACHINES) + " |",
             "|---|---:|" + "---:|" * len(MACHINES)]
    lines.append("| **start with** (what `auto` chooses) | | " + " | ".join(
        default_model(device, gib) for _, device, gib, _ in MACHINES) + " |")
    for model in COMPARED:
        for size in (SIZE, *[518] * (model == "DINOv2-B_14-reg")):
            cells = [images(model, device, gib, precision, size) for _, device, gib, precision in MACHINES]
            parameters = hub.published_file(model).parameters
            lines.append(f"| `{model}`, {size} px | {parameters:,.0f} M | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def models_of(beginnings: tuple[str, ...]) -> list[str]:
    """Return the models of a family."""
    return [model for model in MODELS if model.startswith(beginnings) and owner(model) == beginnings]


def owner(model: str) -> tuple[str, ...]:
    """Return the beginnings of the family of a model; () if it has none."""
    return next((beginnings for _, beginnings, _ in GROUPS if model.startswith(beginnings)), ())


def family_tables() -> str:
    """Return heading, sentence and table of each family."""
    parts = []
    for title, beginnings, words in GROUPS:
        old = not any(model in FAMILIES for model in models_of(beginnings))
        files = [file for model in models_of(beginnings) for file in hub.table()
                 if file.model == model and (file.repository or not old)]
        parts.append(f"### {title}\n\n{words}\n\n{table(files)}")
    return "\n".join(parts)


def table(files: Iterable[hub.PublishedFile]) -> str:
    """Return the table of these files. The file that a model's name means is in bold."""
    lines = ["| `MODEL_TYPE` | name for `PRETRAINED_DIR` | px | parameters | head | licence | from |",
             "|---|---|---:|---:|---:|---|---|"]
    for file in files:
        default = published_name(file.model) == (file.place or file.name)
        license = file.license or "not stated"
        shown = license if FREE.match(license) else f"**{license}**"
        link = f"[hub]({hub.page_of(file.repository)})" if file.repository else f"[file]({published_url(file.name)})"
        bold = "**" * default
        lines.append(f"| {bold}`{file.model}`{bold} | `{file.name}` | {file.pixels} | {file.parameters:,.1f} M | "
                     f"{file.classes or '-'} | {shown} | {link} |")
    return "\n".join(lines) + "\n"


def licences() -> str:
    """Return the table of licences that are not free."""
    found: dict[str, list[hub.PublishedFile]] = {}
    for file in hub.table():
        if file.model and not FREE.match(file.license):
            found.setdefault(file.license or "not stated", []).append(file)
    lines = ["| licence | files here | of |", "|---|---:|---|"]
    for license, files in sorted(found.items()):
        families = sorted({re.match(r"(R\d*-)?[A-Za-z0-9]+(-RADIO\w+)?", file.model)[0] for file in files})
        lines.append(f"| **{license}** | {len(files)} | {', '.join(families)} |")
    return "\n".join(lines) + "\n"


def contents(text: str) -> str:
    """Return links to the sections, and to the families."""
    lines = []
    for marks, title in re.findall(r"^(##|###) (.+)$", text, re.MULTILINE):
        if (marks == "##" and title != "Contents") or title in {title for title, *_ in GROUPS}:
            anchor = re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")
            lines.append(f"{'  ' * (marks == '###')}- [{title}](#{anchor})")
    return "\n".join(lines) + "\n"


def page(text: str) -> str:
    """Return the text of MODEL_ZOO.md with its generated parts replaced."""
    for name, part in (("which", which_model()), ("licences", licences()), ("families", family_tables())):
        text = put(text, name, part)
    return put(text, "contents", contents(text))


def put(text: str, name: str, part: str) -> str:
    """Return the text with what is between the two comments of a part replaced."""
    begin, end = f"<!-- {name}: tests/support/zoo_page.py writes what follows -->\n", f"<!-- {name} end -->\n"
    before, _, rest = text.partition(begin)
    _, found, after = rest.partition(end)
    assert found, name
    return f"{before}{begin}\n{part}\n{end}{after}"


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
