"""One token space for codes and conditions.

    [0, K)        image codes
    [K, K + C)    classes
    K + C         null: the unconditional prompt, and what condition dropout puts in place of a class
    …             padding of the vocabulary, never used

A sequence is `[condition] + codes in raster order`.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from numbers import Integral
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from configs.files import write_json
from configs.randomness import Numbers

FILE_NAME = "token_layout.json"

# Widths of the embedding and the output layer are padded to this: tensor cores want whole tiles.
PAD_TO_MULTIPLE_OF = 64


@dataclass(frozen=True)
class TokenLayout:
    """What the tokens of a prior mean; kept with the code store, the prior and the pipeline.

    Args:
        num_codes: K, entries of the tokenizer's codebook.
        class_names: names of the C classes in the order of their labels; empty for an unconditional prior.
        grid: h and w of an image's codes.
        downsampling_factor: pixels of the image's side per code.
        tokenizer_fingerprint: of the tokenizer the codes come from.
        has_null: whether the prior knows the null token: it is unconditional, or was trained with condition dropout.
    """

    num_codes: int
    class_names: tuple[str, ...]
    grid: tuple[int, int]
    downsampling_factor: int
    tokenizer_fingerprint: str
    has_null: bool = True

    @property
    def num_classes(self) -> int:
        """C."""
        return len(self.class_names)

    @property
    def null_token(self) -> int:
        """The unconditional prompt."""
        return self.num_codes + self.num_classes

    @property
    def vocab_size(self) -> int:
        """Size of the token space, padding included."""
        return -(-(self.null_token + 1) // PAD_TO_MULTIPLE_OF) * PAD_TO_MULTIPLE_OF

    @property
    def length(self) -> int:
        """Codes of an image, h·w."""
        return self.grid[0] * self.grid[1]

    @property
    def pixels(self) -> int:
        """Pixels of a decoded image, H·W."""
        return self.length * self.downsampling_factor**2

    def class_tokens(self, labels: Numbers) -> Numbers:
        """Tokens of int64 class labels `(B,)`, a tensor or an array."""
        return labels + self.num_codes

    def class_ids(self, labels: Sequence[Any]) -> Tensor:
        """int64 `(B,)` class ids of labels given as ids or as names.

        Raises:
            ValueError: a label is not one of the classes.
        """
        ids = []
        for label in labels:
            if isinstance(label, str) and label in self.class_names:
                ids.append(self.class_names.index(label))
            elif isinstance(label, Integral) and not isinstance(label, bool) and 0 <= int(label) < self.num_classes:
                ids.append(int(label))
            elif self.num_classes == 0:
                raise ValueError("class_labels: this prior is unconditional; use num_images instead")
            else:
                names = ", ".join(self.class_names[:20]) + (", …" if self.num_classes > 20 else "")
                raise ValueError(
                    f"class_labels: received {label!r}; allowed are ids 0 to {self.num_classes - 1} or names: {names}"
                )
        return torch.tensor(ids, dtype=torch.int64)

    def to_dict(self) -> dict[str, Any]:
        """As plain values, for JSON; `tokens` spells out the segments in order."""
        padding = self.vocab_size - self.null_token - 1
        tokens = {"codes": self.num_codes, "classes": self.num_classes, "null": 1, "padding": padding}
        return {"tokens": tokens, **asdict(self)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "TokenLayout":
        """Inverse of `to_dict`."""
        fields = {name: value for name, value in values.items() if name != "tokens"}
        return cls(**{**fields, "class_names": tuple(fields["class_names"]), "grid": tuple(fields["grid"])})

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes `token_layout.json`."""
        write_json(Path(folder) / FILE_NAME, self.to_dict())

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "TokenLayout":
        """Reads `token_layout.json` from a folder."""
        return cls.from_dict(json.loads((Path(folder) / FILE_NAME).read_text()))
