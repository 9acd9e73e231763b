"""The prompt of a token layout: its segments, their tokens and their places.

Shape letters: P prompt length, L codes of an image, K codebook size, C classes.
"""

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from configs.randomness import Numbers
from stage2_prior.conditions import CLASS, ClassNames, Segment


class PromptTokens:
    """The part of `TokenLayout` that is about the prompt."""

    num_codes: int
    class_names: tuple[str, ...]
    has_null: bool
    segments: tuple[Segment, ...]
    family: str

    if TYPE_CHECKING:

        @property
        def length(self) -> int: ...

    @property
    def num_classes(self) -> int:
        """C."""
        return len(self.class_names)

    @property
    def null_token(self) -> int:
        """The token of the unconditional prompt."""
        return self.num_codes + self.num_classes

    @cached_property
    def conditions(self) -> tuple[Segment, ...]:
        """All segments of the prompt. The first is named "class", unless there are only other conditions."""
        if not self.num_classes and self.segments:
            return self.segments
        has_null = self.has_null and not self.segments  # else the null token only stands where all others are null
        first = Segment(CLASS, "class", self.num_classes, 1, has_null, self.class_names)
        return first, *self.segments

    @cached_property
    def first_tokens(self) -> dict[str, int]:
        """The first token of each segment, by its name. Its null token follows its last token."""
        first, found = self.null_token + 1, {CLASS: self.num_codes}
        for segment in self.segments:
            found[segment.name] = first
            first += segment.num_tokens + 1
        return {segment.name: found[segment.name] for segment in self.conditions}

    @cached_property
    def places(self) -> dict[str, slice]:
        """The places of each segment in the prompt, by its name."""
        found, start = {}, 0
        for segment in self.conditions:
            found[segment.name] = slice(start, start + segment.length)
            start += segment.length
        return found

    @property
    def prompt_length(self) -> int:
        """P, number of tokens in front of the codes."""
        return sum(segment.length for segment in self.conditions)

    @property
    def sequence_length(self) -> int:
        """P + L, number of tokens of prompt and codes."""
        return self.prompt_length + self.length

    @property
    def num_positions(self) -> int:
        """Number of tokens that a prior reads: P + L; a causal prior does not read the last code."""
        return self.sequence_length - (self.family == "causal")

    @cached_property
    def offsets(self) -> Tensor:
        """The first token of the segment at each place of the prompt, int64 `(P,)`."""
        firsts = torch.tensor([self.first_tokens[segment.name] for segment in self.conditions])
        return firsts.repeat_interleave(torch.tensor([segment.length for segment in self.conditions]))

    def null_of(self, name: str) -> int:
        """The null token of a segment."""
        (segment,) = [segment for segment in self.conditions if segment.name == name]
        return self.first_tokens[name] + segment.num_tokens

    def null_prompt(self, names: Sequence[str] | None = None) -> Tensor:
        """int64 `(P,)`: the null token of the named segments at their places, -1 at other places; of all by default."""
        prompt = torch.full((self.prompt_length,), -1)
        for name, places in self.places.items():
            if names is None or name in names:
                prompt[places] = self.null_of(name)
        return prompt

    # ------------------------------------------------------------------ labels

    def class_tokens(self, labels: Numbers) -> Numbers:
        """Tokens of int64 class labels `(B,)`, a tensor or an array."""
        return labels + self.num_codes

    def names_of(self, tokens: Tensor) -> list[str]:
        """Class names of condition tokens `(B,)`; the null token has none."""
        return [self.class_names[token - self.num_codes] for token in tokens.tolist()]

    def class_ids(self, labels: Sequence[Any]) -> Tensor:
        """Class ids, int64 `(B,)`, of labels that are ids or names.

        Raises:
            ValueError: a label is not one of the classes.
        """
        return self._classes.ids(labels)

    @cached_property
    def _classes(self) -> ClassNames:
        return ClassNames(self.class_names)
