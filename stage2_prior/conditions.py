"""Conditions: what the prompt of a prior holds in front of the codes, and the names of classes.

A prompt is a list of segments. Each has its own tokens and its own null token, which stands for "not given".
"""

from collections.abc import Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from functools import cached_property
from math import prod
from numbers import Integral
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from annotated_types import Ge
from torch import Tensor

from configs.arguments import choice, described, instance, is_number, whole
from configs.names import is_whole, one_form
from configs.problems import cut, did_you_mean, listed, nearest
from configs.sections import LARGEST

# The name of the segment with the classes of `data.label_column`.
CLASS = "class"

Count = Annotated[int, Ge(1)]
Kind = Literal["class", "text", "image"]


@dataclass(frozen=True)
class Segment:
    """A condition: a fixed number of tokens in the prompt.

    Args:
        name: name of the condition, as in the setting `conditions`.
        kind: "class"; "text", tokens of a text; or "image", codes of a condition image.
        num_tokens: number of its tokens, without its null token: classes, tokens of the text tokenizer, or codes.
        length: number of its places in the prompt. A shorter text fills its last places with null tokens.
        has_null: whether training includes sequences without this condition alone, and with the others.
        class_names: names of the classes; only of kind "class".
        grids: h, w and number of codes at each position of each grid; only of kind "image".
        image_shape: (H, W) of the condition image in pixels; only of kind "image".
        fingerprint: of the tokenizer of the text or of the condition image.
        transform: how training made the condition image from the image itself, for instance "gray"; empty if it had an
            image of its own.

    Raises:
        ValueError: a field has another type, or a number is out of range.
    """

    __pydantic_config__: ClassVar[Any] = {"extra": "forbid", "strict": True}

    name: str
    kind: Kind
    num_tokens: int
    length: Count = 1
    has_null: bool = True
    class_names: tuple[str, ...] = ()
    grids: tuple[tuple[Count, Count, Count], ...] = ()
    image_shape: tuple[Count, ...] = ()
    fingerprint: str = ""
    transform: str = ""

    def __post_init__(self) -> None:
        for name in ("name", "fingerprint", "transform"):
            instance(f"segments.{name}", getattr(self, name), str, "text")
        choice("segments.kind", self.kind, ["class", "text", "image"])
        instance("segments.has_null", self.has_null, bool, "True or False")
        plain = {
            "num_tokens": whole("segments.num_tokens", self.num_tokens, least=0, most=LARGEST),
            "length": whole("segments.length", self.length, most=LARGEST),
            "class_names": tuple(map(one_form, self.class_names)),
            "grids": tuple(tuple(map(int, grid)) for grid in self.grids),
            "image_shape": tuple(map(int, self.image_shape)),
        }
        for name, value in plain.items():
            object.__setattr__(self, name, value)
        sizes = {"class": (len(self.class_names), 1), "image": (self.num_tokens, sum(map(prod, self.grids)))}
        expected = sizes.get(self.kind, (self.num_tokens, self.length))
        if (self.num_tokens, self.length) != expected:
            raise ValueError(
                f"segments.{self.name}: received {self.num_tokens} tokens and length {self.length}; its "
                f"{'class_names' if self.kind == 'class' else 'grids'} say {expected[0]} and {expected[1]}"
            )

    @property
    def codes_shape(self) -> tuple[int, ...]:
        """Shape of the codes of a condition image, as its tokenizer takes them."""
        from stage1_vqgan import codes_shape

        return codes_shape(self.grids)

    @cached_property
    def classes(self) -> "ClassNames":
        """The names of the classes."""
        return ClassNames(self.class_names, self.name)

    @property
    def summary(self) -> str:
        """The segment in words, such as "style (4 classes)"."""
        if self.kind == "class":
            return f"{self.name} ({self.num_tokens:,} classes)"
        if self.kind == "text":
            return f"{self.name} (text of {self.length:,} tokens out of {self.num_tokens:,})"
        image = f"image, {self.transform}" if self.transform else "image"
        return f"{self.name} ({image}: {self.length:,} codes out of {self.num_tokens:,})"

    def to_dict(self) -> dict[str, Any]:
        """The fields that are not at their defaults, as plain values for JSON."""
        defaults = {field.name: field.default for field in fields(self)}
        return {
            name: value
            for name, value in asdict(self).items()
            if defaults[name] in (MISSING,) or value != defaults[name]
        }


def checked_segments(segments: Any) -> tuple[Segment, ...]:
    """The segments of a layout. Their names are identifiers, because they are keys, arguments and names of folders.

    Raises:
        ValueError: one is no segment, or has a name that is no identifier or is taken.
    """
    instance("segments", segments, (list, tuple), "a tuple of segments")
    names = {CLASS, "codes", "classes", "null", "mask", "padding"}
    for segment in segments:
        instance("segments", segment, Segment, "a tuple of segments")
        if not segment.name.isidentifier() or segment.name in names:
            raise ValueError(f"segments: received the name {segment.name!r}; must be a new identifier")
        names.add(segment.name)
    return tuple(segments)


class ClassNames:
    """The names of classes in the order of their ids.

    Args:
        names: the names.
        key: argument that messages name.
    """

    def __init__(self, names: Sequence[str], key: str = "class_labels"):
        self.names, self.key = names, key

    def ids(self, labels: Sequence[Any]) -> Tensor:
        """Class ids, int64 `(B,)`, of labels that are ids or names.

        Raises:
            ValueError: a label is not one of the classes.
        """
        is_list = isinstance(labels, Sequence | np.ndarray) and getattr(labels, "ndim", 1) == 1
        if not is_list or isinstance(labels, str | bytes):
            raise ValueError(f"{self.key}: received {described(labels)}; must be a list of ids or names")
        return torch.tensor([self._id(label) for label in labels], dtype=torch.int64)

    def _id(self, label: Any) -> int:
        if isinstance(label, str) and one_form(label) in self._ids:
            return self._ids[one_form(label)]
        if is_number(label, Integral) and 0 <= int(label) < len(self.names):
            return self._id_of_number(int(label))
        if not self.names:
            raise ValueError(f"{self.key}: this prior has no classes; leave it out (generate takes num_images instead)")
        raise ValueError(f"{self.key}: {unknown_label(label, self.names)}")

    def _id_of_number(self, number: int) -> int:
        """The number, if it is an id and no name of another class.

        Raises:
            ValueError: another class has this number as its name.
        """
        for other in self._ids_by_number.get(number, ()):
            if other != number:
                name = self.names[other]
                raise ValueError(
                    f"{self.key}: received {number}, which has two readings: class {name!r} (id {other}), and id "
                    f"{number} (class {self.names[number]!r}); write the name as text, {name!r} or "
                    f"{self.names[number]!r}"
                )
        return number

    @cached_property
    def _ids_by_number(self) -> dict[int, list[int]]:
        """The ids of the classes whose names are a number."""
        ids: dict[int, list[int]] = {}
        for id_, name in enumerate(self.names):
            if is_whole(name):
                ids.setdefault(int(name), []).append(id_)
        return ids

    @cached_property
    def _ids(self) -> dict[str, int]:
        return {name: number for number, name in reversed(list(enumerate(self.names)))}


def unknown_label(label: Any, names: Sequence[str]) -> str:
    """The message for an unknown class label: the ids, the first names, and the names that are most like it."""
    shown = listed([cut(name, 40) for name in names], 10)
    message = f"received {described(label)}; allowed are ids 0 to {len(names) - 1} or names: {shown}"
    by_letters = {name.casefold(): name for name in names}
    near = nearest(one_form(label).casefold(), by_letters, 3) if isinstance(label, str) else []
    return message + did_you_mean([by_letters[name] for name in near])
