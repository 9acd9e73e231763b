"""The prompts of a grid of samples, and the words beside its rows."""

from collections.abc import Mapping

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from stage1_vqgan import spread
from stage2_prior.code_store import CodeStore
from stage2_prior.condition_text import decode_text, load_text_tokenizer
from stage2_prior.condition_tokenizers import FOLDER
from stage2_prior.conditions import Segment
from stage2_prior.data import CodeDataset
from stage2_prior.vocabulary import TokenLayout

MOST_ROWS = 10  # a row for each class, or for each prompt
LONGEST_NAME = 40  # characters of a description


def grid_rows(store: CodeStore, layout: TokenLayout, num_images: int) -> tuple[int, Tensor, list[str]]:
    """How a grid is divided: images in a row, prompts of all images int64 `(N, P)`, and the words beside each row.

    With further conditions, each row has the prompt of a validation image, spread evenly over the split. Otherwise each
    row has one class, spread evenly over all classes.
    """
    validation = store.split("validation")
    choices = len(validation) if layout.segments else layout.num_classes
    rows = min(MOST_ROWS, num_images, choices or MOST_ROWS)
    columns = -(-num_images // rows)
    if not layout.segments:
        prompts = grid_prompts(layout, num_images, columns)
        names = layout.names_of(prompts[::columns, 0]) if layout.num_classes else [""] * rows
        return columns, prompts, names
    chosen = np.array(list(spread(len(validation), -(-num_images // columns))))
    shown = torch.from_numpy(CodeDataset(validation, layout).read(chosen)[2])
    texts = [segment.name for segment in layout.segments if segment.kind == "text"]
    tokenizers = {name: load_text_tokenizer(store.folder / FOLDER / name) for name in texts}
    return columns, shown.repeat_interleave(columns, 0)[:num_images], describe(shown, layout, tokenizers)


def grid_prompts(layout: TokenLayout, num_images: int, columns: int) -> Tensor:
    """Condition tokens of the images of a grid, row by row, each row of one class: int64 `(N, 1)`."""
    if not layout.num_classes:
        return torch.full((num_images, 1), layout.null_token)
    rows = -(-num_images // columns)
    classes = torch.arange(rows) * layout.num_classes // rows
    return layout.class_tokens(classes.repeat_interleave(columns)[:num_images])[:, None]


def describe(prompts: Tensor, layout: TokenLayout, tokenizers: Mapping[str, Tokenizer]) -> list[str]:
    """Texts and classes of prompts int64 `(B, P)` in words; of condition images alone their names.

    Args:
        prompts: the prompts.
        layout: the token layout.
        tokenizers: those of the texts, by the names of the conditions.
    """
    ids = prompts - layout.offsets
    in_words = [s for s in layout.conditions if s.kind != "image"] or list(layout.conditions)
    in_words.sort(key=lambda segment: segment.kind != "text")  # a picture has little room, and a text says most
    parts = [_words(segment, ids[:, layout.places[segment.name]], tokenizers) for segment in in_words]
    return [" · ".join(filter(None, words)) for words in zip(*parts, strict=True)]


def _words(segment: Segment, ids: Tensor, tokenizers: Mapping[str, Tokenizer]) -> list[str]:
    """What a condition says, for each row of its ids `(B, length)`."""
    if segment.kind == "class":
        names = [*segment.class_names, ""]  # the null token
        return [names[number] for number in ids[:, 0].tolist()]
    if segment.kind == "image":
        return [segment.name] * len(ids)
    return [_short(decode_text(tokenizers[segment.name], row, segment)) for row in ids.tolist()]


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= LONGEST_NAME else text[: LONGEST_NAME - 1] + "…"
