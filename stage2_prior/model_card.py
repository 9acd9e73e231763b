"""The card of a prior that is uploaded alone."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from configs.card import (
    card_metadata,
    cell,
    comment,
    install_block,
    license_part,
    part,
    picture,
    table,
    training_part,
    with_front_matter,
)
from configs.card_facts import dataset_ids
from configs.files import read_json
from configs.loss_curves import Panel
from configs.model_folder import ADAPTER_CONFIG_NAME
from stage2_prior.vocabulary import FILE_NAME, TokenLayout

PANELS = [Panel("Cross-entropy of a code (nats)", {"loss": "training", "eval_loss": "validation"})]
PICTURES = {"samples": "samples.png"}
TASK = "unconditional-image-generation"  # the Hub knows no task for classes
SHOWN_CLASSES = 1000


def prior_card(folder: Path, name: str, license: str) -> str:
    """A new card for the prior in a folder.

    Args:
        folder: holds the model, its token layout and the facts of its run.
        name: folder or Hub id in the examples.
        license: an identifier of the Hub.
    """
    layout = TokenLayout.from_pretrained(folder)
    metadata: dict[str, Any] = {"pipeline_tag": TASK}
    if (folder / ADAPTER_CONFIG_NAME).is_file():
        metadata["base_model"] = read_json(folder / ADAPTER_CONFIG_NAME).get("base_model_name_or_path")
    body = [
        "# Prior over the codes of images",
        part("pictures", picture(folder, PICTURES["samples"], "Generated images", "Images of its codes.")),
        part("use", summary(layout), *use_blocks(layout, name)),
        part("details", "## Details", table(detail_rows(layout)), *class_blocks(layout)),
        training_part(folder),
        license_part(license),
        f"## Limits\n\n{LIMITS}",
    ]
    tags = ["autoregressive", "image-generation"]
    return with_front_matter(
        card_metadata(license, dataset_ids(folder), tags, **metadata), "\n" + "\n\n".join(body) + "\n"
    )


LIMITS = (
    "The prior writes codes of images like those that it was trained on. It may repeat parts of them. The codes mean "
    "something only to the tokenizer with the fingerprint above."
)


def summary(layout: TokenLayout) -> str:
    """One paragraph: what the prior does."""
    return (
        f"A causal language model that writes images as {layout.length} codes out of {layout.num_codes:,}. A tokenizer "
        f"with the fingerprint `{layout.tokenizer_fingerprint}` turns them into pixels."
    )


def prompt(layout: TokenLayout) -> tuple[int, str]:
    """The token of an example's prompt, and what it means; for a prompt of one token."""
    if not layout.num_classes:
        return layout.null_token, "the only prompt"
    number = example_class(layout)
    return layout.num_codes + number, f"class {number}, {comment(layout.class_names[number])}"


def prompt_code(layout: TokenLayout) -> tuple[str, str]:
    """An example's prompt for four images, as a Python expression, and what it means."""
    if not layout.segments:
        first, what = prompt(layout)
        return f"torch.full((4, 1), {first})", what
    tokens = (layout.null_prompt() if layout.has_null else layout.offsets).tolist()
    parts = [(tokens[places.start], places.stop - places.start) for places in layout.places.values()]
    text = " + ".join(f"[{token}]" if length == 1 else f"[{token}] * {length}" for token, length in parts)
    what = "no condition" if layout.has_null else "the first token of each condition"
    return f"torch.tensor({text}).repeat(4, 1)", what


def use_blocks(layout: TokenLayout, name: str) -> list[str]:
    """Examples with transformers alone, and with this package."""
    tokens, what = prompt_code(layout)
    codes = f"prior.generate(prompt, do_sample=True)[:, {layout.prompt_length}:]"
    return [
        "## Use",
        "It is an ordinary causal language model. transformers loads it without other code:",
        f"""```python
import torch
from transformers import AutoModelForCausalLM

prior = AutoModelForCausalLM.from_pretrained("{name}")
prompt = {tokens}  # {what}, four times
codes = {codes}.view(4, {", ".join(map(str, layout.codes_shape))})
```""",
        "tessella joins it with its tokenizer:",
        install_block(),
        f"""```bash
hf download {name} --local-dir prior
python -m pipelines.build --tokenizer TOKENIZER --prior prior --output_dir pipeline
```""",
    ]


def detail_rows(layout: TokenLayout) -> list[tuple[str, str]]:
    """Rows for a table of facts."""
    if layout.segments:
        return [("Code grid", f"{layout.codes_text} codes"), *segment_rows(layout), ("Layout", f"`{FILE_NAME}`")]
    prompt = f"always token {layout.null_token}"
    if layout.num_classes:
        prompt = f"class c is token {layout.num_codes} + c"
        prompt += f"; no class is token {layout.null_token}" if layout.has_null else ""
    return [("Code grid", f"{layout.codes_text} codes"), ("Prompt", prompt), ("Layout", f"`{FILE_NAME}`")]


def segment_rows(layout: TokenLayout) -> list[tuple[str, str]]:
    """Rows about the conditions, in the order of the prompt: their places, counted from 0, and their tokens."""
    rows = []
    for segment in layout.conditions:
        places, first = layout.places[segment.name], layout.first_tokens[segment.name]
        where = f"place {places.start}" if segment.length == 1 else f"places {places.start} to {places.stop - 1}"
        tokens = f"tokens {first:,} to {first + segment.num_tokens - 1:,}, none is {layout.null_of(segment.name):,}"
        rows.append(("Prompt", f"{where}: {cell(segment.summary)}; {tokens}"))
    return rows


def class_blocks(layout: TokenLayout) -> list[str]:
    """Tables of classes: id, name and, if the layout knows it, the number of images."""
    blocks = ["### Classes", class_table(layout.class_names, layout.class_counts)] if layout.num_classes else []
    for segment in layout.segments:
        if segment.kind == "class":
            blocks += [f"### Classes of {segment.name}", class_table(segment.class_names, ())]
    return blocks


def example_class(layout: TokenLayout) -> int:
    """The id of a class that examples use: the first one with images."""
    return next((number for number, count in enumerate(layout.class_counts) if count), 0)


def class_table(names: Sequence[str], counts: Sequence[int]) -> str:
    """A table of class ids, names and numbers of training images."""
    rows = [(number, cell(name)) for number, name in enumerate(names[:SHOWN_CLASSES])]
    if len(counts) != len(names):
        text = table(rows, ("id", "name"))
    else:
        text = table(
            [(*row, f"{count:,}") for row, count in zip(rows, counts, strict=False)], ("id", "name", "training images")
        )
    hidden = len(names) - SHOWN_CLASSES
    more = f"\n\n{hidden:,} more classes are in the token layout." if hidden > 0 else ""
    tag = "<details open>" if len(names) <= 20 else "<details>"
    return f"{tag}<summary>{len(names):,} classes</summary>\n\n{text}{more}\n\n</details>"
