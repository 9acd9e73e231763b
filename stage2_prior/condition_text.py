"""Texts as conditions: their tokenizer, and their tokens in a prompt.

A text tokenizer is the `tokenizer.json` of any Hugging Face tokenizer, or a small one that is trained on the captions.
"""

import hashlib
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

from configs.files import make_folder, write_text
from configs.problems import one_line
from stage2_prior.conditions import Segment

TOKENIZER_NAME = "tokenizer.json"

# Workers that load images are forked later. A process that has used the threads of tokenizers warns at each fork.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# Bytes of the largest tokenizer.json that is read; those of published language models have up to 40 million.
LARGEST = 2**28


def load_text_tokenizer(folder: str | Path) -> Tokenizer:
    """Loads the text tokenizer in a folder. It neither cuts nor pads texts.

    Args:
        folder: holds a `tokenizer.json`.

    Raises:
        FileNotFoundError: the folder holds no such file.
        ValueError: the file is not a tokenizer.
    """
    return tokenizer_of(read_tokenizer_file(folder), Path(folder) / TOKENIZER_NAME)


def read_tokenizer_file(folder: str | Path) -> str:
    """The text of the `tokenizer.json` in a folder; see `load_text_tokenizer`."""
    path = Path(folder) / TOKENIZER_NAME
    if (size := path.stat().st_size) > LARGEST:
        raise ValueError(f"{path}: this file has {size:,} bytes; tokenizers are read up to at most {LARGEST:,}")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeError as error:
        raise ValueError(f"{path}: this file is not JSON ({error}); download or save it again") from error


def tokenizer_of(text: str, path: Path) -> Tokenizer:
    """The tokenizer in the text of a `tokenizer.json`; see `load_text_tokenizer`."""
    try:
        tokenizer = Tokenizer.from_str(text)
    except Exception as error:  # tokenizers raises no exception of its own
        reason = one_line(error, 200)
        raise ValueError(f"{path}: this file is not a tokenizer ({reason}); download or save it again") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def text_fingerprint(text: str) -> str:
    """Fingerprint of a text tokenizer: a hash of its `tokenizer.json`, 16 hexadecimal digits."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def vocabulary_size(tokenizer: Tokenizer) -> int:
    """Number of tokens: the largest id plus one."""
    return max(tokenizer.get_vocab().values(), default=-1) + 1


def encode_texts(tokenizer: Tokenizer, texts: Sequence[str | None], segment: Segment) -> Tensor:
    """The tokens of texts in the places of a segment.

    Args:
        tokenizer: see `load_text_tokenizer`.
        texts: the texts; None is no text.
        segment: a segment of kind "text".

    Returns:
        int64 `(B, length)`, token ids of the tokenizer. A longer text loses its end. Unused places hold the null token
        of the segment, which is its `num_tokens`.
    """
    ids = torch.full((len(texts), segment.length), segment.num_tokens)
    for row, tokens in zip(ids, text_tokens(tokenizer, texts), strict=True):
        used = tokens[: segment.length]
        row[: len(used)] = torch.tensor(used, dtype=torch.int64)
    return ids


def text_tokens(tokenizer: Tokenizer, texts: Sequence[str | None]) -> list[list[int]]:
    """The token ids of texts, without special tokens; none for None."""
    found = tokenizer.encode_batch_fast([text or "" for text in texts], add_special_tokens=False)
    return [encoding.ids for encoding in found]


def decode_text(tokenizer: Tokenizer, ids: Sequence[int], segment: Segment) -> str:
    """The text of the tokens in the places of a segment."""
    return tokenizer.decode([token for token in ids if token < segment.num_tokens], skip_special_tokens=False)


def train_text_tokenizer(texts: Iterable[str | None], vocab_size: int) -> Tokenizer:
    """Trains a byte-level BPE on texts.

    It can write every text: its first tokens are the 256 bytes. The same texts give the same tokenizer.

    Args:
        texts: texts, for instance captions; None is left out.
        vocab_size: largest number of tokens, at least 256.

    Source: Radford et al. 2019, "Language models are unsupervised multitask learners", section 2.2.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator((text for text in texts if text), trainer)
    return tokenizer


def save_text_tokenizer(text: str, folder: str | Path) -> None:
    """Writes a `tokenizer.json`, byte for byte, so that its fingerprint stays."""
    write_text(make_folder(folder) / TOKENIZER_NAME, text)
