"""The card (README.md) of a model: metadata for the Hub, parts that commands write, and the words of the author.

A part stands between two markers. A command that knows new facts replaces it. Everything else belongs to the author and
stays, and so does a part whose markers the author has removed. A README.md without any marker was written by hand: no
command changes it.

The facts of a card lie beside it, in the folder `card`: pictures, settings, facts.json.
"""

import html
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import yaml

from configs.files import read_json, write_text

CARD_NAME, FACTS_FOLDER, FACTS_NAME = "README.md", "card", "facts.json"
PART = re.compile(r"<!-- tessella: (\w+) -->\n(.*?)<!-- end of \1 -->", re.DOTALL)
FRONT = re.compile(r"\A---\n(.*?\n)---\n", re.DOTALL)
UNKNOWN = "unknown"  # an identifier of the Hub

# Metadata that commands decide. What the author writes under other keys stays.
MANAGED = ("license", "library_name", "pipeline_tag", "model-index")


def part(name: str, *blocks: str) -> str:
    """A part of a card that commands write: Markdown blocks between two markers."""
    text = "\n\n".join(block.strip() for block in blocks if block.strip())
    return f"<!-- tessella: {name} -->\n{text}\n<!-- end of {name} -->"


def write_card(folder: Path, render: Callable[[str], str], license: str | None = None) -> None:
    """Writes or updates the card of a folder.

    Args:
        folder: holds the card and its facts.
        render: returns a new card for the identifier of a license.
        license: replaces the license in an older card.
    """
    path = folder / CARD_NAME
    old = path.read_text(encoding="utf-8") if path.is_file() else ""
    if old.strip() and not PART.search(old):
        return
    new = render(license or str(front_matter(old).get("license") or UNKNOWN))
    write_text(path, merged(old, new) if old.strip() else new)


def merged(old: str, new: str) -> str:
    """The old card with the parts and the managed metadata of the new one."""
    parts = {found[1]: found[0] for found in PART.finditer(new)}
    body = PART.sub(lambda found: parts.get(found[1], found[0]), FRONT.sub("", old))
    before, after = front_matter(old), front_matter(new)
    kept = {key: value for key, value in before.items() if key not in MANAGED}
    return with_front_matter({**after, **kept}, body)


def front_matter(card: str) -> dict[str, Any]:
    """The metadata of a card; empty if it has none that can be read."""
    found = FRONT.match(card)
    try:
        values = yaml.safe_load(found[1]) if found else {}
    except yaml.YAMLError:
        values = {}
    return values if isinstance(values, dict) else {}


def with_front_matter(values: dict[str, Any], body: str) -> str:
    """A card of metadata and Markdown."""
    return f"---\n{yaml.safe_dump(values, sort_keys=False, allow_unicode=True)}---\n{body}"


def card_metadata(license: str, datasets: Iterable[str], tags: Iterable[str], **others: Any) -> dict[str, Any]:
    """The metadata of a card, through `huggingface_hub.ModelCardData`.

    Args:
        license: an identifier of the Hub.
        datasets: ids on the Hub of the data sets.
        tags: what the model page can be found by.
        **others: further fields, for instance eval_results.
    """
    from huggingface_hub import ModelCardData

    data = ModelCardData(
        license=license, library_name="tessella", datasets=list(datasets) or None, tags=[*tags, "tessella"], **others
    )
    return dict(data.to_dict())


def measured(task: str, dataset: str, dataset_id: str | None, metrics: dict[str, float]) -> list[Any]:
    """Metrics for the `eval_results` of `card_metadata`, as huggingface_hub.EvalResult.

    Args:
        task: a task of the Hub.
        dataset: name of the data set.
        dataset_id: its id on the Hub, if it is there.
        metrics: by their names.
    """
    from huggingface_hub import EvalResult

    return [
        EvalResult(
            task_type=task,
            dataset_type=dataset_id or "other",
            dataset_name=dataset,
            metric_type=name,
            metric_name=name.replace("_", " "),
            metric_value=round(value, 6),
        )
        for name, value in metrics.items()
    ]


# ---------------------------------------------------------------------- blocks of Markdown


def cell(value: Any) -> str:
    """Text of a stranger or a number, as it can stand in a table or a sentence."""
    return html.escape(" ".join(str(value).split()), quote=False).replace("|", "\\|").replace("`", "\\`")


def comment(text: str) -> str:
    """Text of a stranger, as it can stand in a comment of a code block: other characters than words become `?`."""
    return re.sub(r"[^\w .,&'()+-]", "?", " ".join(text.split()))


def table(rows: Iterable[tuple[Any, ...]], head: tuple[str, ...] = ("", "")) -> str:
    """A table in Markdown."""
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def picture(folder: Path, name: str, text: str, caption: str = "") -> str:
    """A picture of the folder of facts with its caption; nothing if there is no such picture."""
    if not (folder / FACTS_FOLDER / name).is_file():
        return ""
    return f"![{text}]({FACTS_FOLDER}/{name})" + (f"\n\n*{caption}*" if caption else "")


def license_part(license: str) -> str:
    """The part that names the license, or says that there is none."""
    text = f"License: `{license}`."
    if license == UNKNOWN:
        text = "**The author has not chosen a license yet.** Ask before you use the model."
    return part("license", "## License", text)


def training_part(folder: Path) -> str:
    """The part on the training runs: data, steps, time, hardware, settings and losses of each."""
    facts = read_facts(folder).get("runs", {})
    if not facts:
        return part("training")
    names = list(facts)
    rows = [(label, *(_fact(facts[name], key) for name in names)) for key, label in RUN_FACTS.items()]
    rows.append(("Settings", *(f"[{name}.yaml]({FACTS_FOLDER}/{name}.yaml)" for name in names)))
    curves = [picture(folder, f"{name}_losses.png", f"Losses of the {name}") for name in names]
    return part("training", "## Training", table(rows, ("", *(name.capitalize() for name in names))), *curves)


RUN_FACTS = {
    "data": "Data",
    "steps": "Optimizer steps",
    "batch": "Images in one step",
    "seconds": "Time",
    "hardware": "Hardware",
    "results": "On held-out images",
}


def _fact(facts: dict[str, Any], key: str) -> str:
    value = facts.get(key)
    if value is None:
        return "not recorded"
    if key == "seconds":
        return duration(value)
    if isinstance(value, dict):
        return ", ".join(f"{cell(name)} {number:.4g}" for name, number in value.items()) or "not measured"
    return f"{value:,}" if isinstance(value, int) else cell(value)


def duration(seconds: float) -> str:
    """Seconds, minutes or hours, as people say them."""
    for unit, size in (("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"


def read_facts(folder: Path, name: str = FACTS_NAME) -> dict[str, Any]:
    """A file of the facts of a card; empty if there is none."""
    path = folder / FACTS_FOLDER / name
    return read_json(path) if path.is_file() else {}


def install_block() -> str:
    """How to install this package: by the address that it was installed from, if that is public."""
    from configs.versions import origin_address, own_version

    address = origin_address()
    line = f"pip install {address}" if address else f"pip install .  # in the source code of tessella {own_version()}"
    return f"```bash\n{line}\n```"
