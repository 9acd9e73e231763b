"""Settings of one condition of the prior beside the class; `Stage2Config.conditions` holds them by name."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from annotated_types import Ge, Le

from configs import Section
from configs.sections import Fraction, Positive
from stage2_prior.transforms import parse_transform

# Names that a token layout uses for other things; and real, because class_accuracy_real is a figure of its own.
TAKEN = ("class", "codes", "classes", "null", "mask", "padding", "real")

# The keys that a condition of each kind may have, beside kind and dropout.
KEYS = {
    "class": ("column",),
    "text": ("column", "tokenizer", "vocab_size", "max_tokens"),
    "image": ("column", "transform", "tokenizer", "image_size"),
}
ALL_KEYS = tuple(dict.fromkeys(key for keys in KEYS.values() for key in keys))


@dataclass(kw_only=True)
class ConditionConfig(Section):
    """A condition beside the class: what stands in the prompt at its place.

    kind: "class", a class of its own; "text"; or "image", the codes of another image. By default "image" if transform
        is given, and "text" if max_tokens or vocab_size is
    column: column of the data set with class labels, texts or images
    transform: makes the condition image from the image itself, after augmentation, in place of a column:
        "downscale 4", "gray", "edges" or "mask 0.5" (hides a rectangle at the centre with half the height and width)
    tokenizer: of a text, folder or Hub id of any Hugging Face tokenizer with a tokenizer.json; by default a byte-level
        BPE is trained on the texts of the training split. Of an image, folder or Hub id of a tokenizer of stage 1; by
        default the one at the top level
    vocab_size: largest vocabulary of a trained text tokenizer, by default 1024
    max_tokens: places of a text in the prompt, by default 16; a longer text loses its end
    image_size: side in pixels of the images of a column, or [height, width]; by default that of the image itself, or
        that of the condition's own tokenizer
    dropout: fraction of training sequences without this condition, for guidance by this condition alone
    """

    kind: Literal["class", "text", "image"] | None = None
    column: str | None = None
    transform: str | None = None
    tokenizer: str | None = None
    vocab_size: Annotated[int, Ge(256), Le(2**24)] | None = None
    max_tokens: Annotated[int, Ge(1), Le(65536)] | None = None
    image_size: Positive | list[Positive] | None = None
    dropout: Fraction = 0.0

    def settle(self) -> None:
        """Finds the kind, and fills in the defaults of a text."""
        if self.kind is None and self.transform is not None:
            self.kind = "image"
        if self.kind is None and (self.max_tokens is not None or self.vocab_size is not None):
            self.kind = "text"
        if self.kind == "text":
            self.max_tokens = self.max_tokens or 16
            self.vocab_size = self.vocab_size or (1024 if self.tokenizer is None else None)

    def problems(self) -> Iterable[tuple[str, Any, str]]:
        if self.kind is None:
            yield "kind", None, "say what the column holds: class, text or image"
            return
        for key in ALL_KEYS:
            if getattr(self, key) is not None and key not in KEYS[self.kind]:
                yield key, getattr(self, key), f"a condition of kind {self.kind} has no {key}; leave it out"
        if self.kind == "image" and (self.column is None) == (self.transform is None):
            yield "column", self.column, "an image needs either column or transform"
        elif self.kind != "image" and self.column is None:
            yield "column", None, f"name the column of the data set that holds the {self.kind}"
        if self.tokenizer is not None and self.vocab_size is not None and self.kind == "text":
            yield "vocab_size", self.vocab_size, "tokenizer has its own vocabulary; leave one of them out"
        if isinstance(self.image_size, list) and len(self.image_size) != 2:
            yield "image_size", self.image_size, "must be the side of a square, or [height, width]"
        if self.transform is not None and self.image_size is not None:
            yield "image_size", self.image_size, "transform decides the size of the condition image; leave it out"
        if self.transform is not None and self.kind == "image":
            try:
                parse_transform(self.transform)
            except ValueError as error:
                yield "transform", self.transform, str(error)

    @property
    def image_shape(self) -> list[int] | None:
        """[H, W] of `image_size`."""
        size = self.image_size
        return [size, size] if isinstance(size, int) else size

    def identity(self) -> dict[str, Any]:
        """The settings that determine the tokens, without the tokenizer, whose fingerprint a code store records."""
        has_own = {"own_tokenizer": True} if self.kind == "image" and self.tokenizer is not None else {}
        sizes = {"image_size": self.image_shape, "max_tokens": self.max_tokens, "vocab_size": self.vocab_size}
        given = {"kind": self.kind, "column": self.column, "transform": self.transform, **sizes, **has_own}
        return {name: value for name, value in given.items() if value is not None}


def name_problem(name: str) -> str | None:
    """What is wrong with the name of a condition."""
    if not name.isidentifier():
        return "must be a name of letters, digits and _, such as style"
    if name in TAKEN:
        return f"the name {name} has another meaning; choose another"
    return None
