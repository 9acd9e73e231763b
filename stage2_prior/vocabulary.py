"""The token layout: one vocabulary for codes and conditions.

    [0, K)        image codes
    [K, K + C)    classes
    K + C         the null token: the unconditional prompt; condition dropout replaces classes by it
    …             for each further condition: its tokens, then its own null token
    …             the mask token of a masked prior
    …             padding of the vocabulary, never used

A sequence is `prompt + codes`. The prompt has one token for the class, or the null token if there are no conditions at
all; then the tokens of the further conditions in their order. Codes are in raster order. A tokenizer with several codes
at each position, or with several grids, has this order: grid by grid, each in raster order, and the codes of a position
one after another. All codebooks of such a tokenizer share the tokens [0, K); the position of a code says to which
codebook it belongs.
"""

import json
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

from annotated_types import Ge

from configs.arguments import choice, described, instance, whole
from configs.files import read_json, write_json
from configs.names import one_form
from configs.sections import LARGEST
from stage1_vqgan import Grids, codes_shape, grids_text, num_codes
from stage2_prior.conditions import Count, Segment, checked_segments
from stage2_prior.prompt_tokens import PromptTokens

if TYPE_CHECKING:
    from pydantic import TypeAdapter

    from stage1_vqgan import VQGANImageProcessor, VQGANModel

FILE_NAME = "token_layout.json"

# The vocabulary is padded to a multiple of this number, because tensor cores multiply whole tiles.
PAD_TO_MULTIPLE_OF = 64

Family = Literal["causal", "masked"]


@dataclass(frozen=True)
class TokenLayout(PromptTokens):
    """Meaning of the tokens of a prior. The code store, the prior and the pipeline each store a copy.

    Args:
        num_codes: K, entries of the tokenizer's codebook.
        class_names: names of the C classes in the order of their labels; empty for an unconditional prior.
        grid: h and w of an image's codes; of several grids, of the last one.
        downsampling_factor: pixels of the image's side per code.
        tokenizer_fingerprint: fingerprint of the tokenizer that computed the codes.
        has_null: whether training includes the null token: the prior is unconditional, or has condition dropout.
        class_counts: number of training images of each class; empty if it is unknown. A fact about the data, so layouts
            with other counts are equal.
        grids: h, w and number of codes at each position of each grid; empty for one grid with one code at each.
        segments: the conditions beside the class.
        family: "causal", or "masked", which has a mask token.

    Raises:
        ValueError: a field has another type, a number is below 1, or two conditions have one name.
    """

    num_codes: Count
    class_names: tuple[str, ...]
    grid: tuple[Count, Count]
    downsampling_factor: Count
    tokenizer_fingerprint: str
    has_null: bool = True
    class_counts: tuple[Annotated[int, Ge(0)], ...] = field(default=(), compare=False)
    grids: tuple[tuple[Count, Count, Count], ...] = ()
    segments: tuple[Segment, ...] = ()
    family: Family = "causal"

    def __post_init__(self) -> None:
        instance("class_names", self.class_names, (list, tuple), "a tuple of names")
        for class_name in self.class_names:
            instance("class_names", class_name, str, "a tuple of names")
        instance("grid", self.grid, (list, tuple), "h and w, two whole numbers")
        if len(self.grid) != 2:
            raise ValueError(f"grid: received {described(self.grid)}; must be h and w, two whole numbers")
        instance("tokenizer_fingerprint", self.tokenizer_fingerprint, str, "text")
        instance("has_null", self.has_null, bool, "True or False")
        instance("class_counts", self.class_counts, (list, tuple), "a tuple of numbers")
        if len(self.class_counts) not in (0, len(self.class_names)):
            counts = f"{len(self.class_counts)} numbers for {len(self.class_names)} classes"
            raise ValueError(f"class_counts: received {counts}; must have one for each, or none")
        plain = {
            "num_codes": whole("num_codes", self.num_codes, most=LARGEST),
            "class_names": tuple(map(one_form, self.class_names)),
            "grid": tuple(whole("grid", side, most=LARGEST) for side in self.grid),
            "downsampling_factor": whole("downsampling_factor", self.downsampling_factor, most=LARGEST),
            "class_counts": tuple(whole("class_counts", count, least=0, most=2**40) for count in self.class_counts),
        }
        plain["grids"] = _grids(self.grids, plain["grid"])
        plain["segments"] = checked_segments(self.segments)
        choice("family", self.family, get_args(Family))
        for name, value in plain.items():
            object.__setattr__(self, name, value)

    @property
    def used_tokens(self) -> int:
        """Number of tokens without the padding."""
        segments = sum(segment.num_tokens + 1 for segment in self.segments)
        return self.null_token + 1 + segments + (self.family == "masked")

    @property
    def mask_token(self) -> int:
        """The token of a code that a masked prior shall predict.

        Raises:
            AttributeError: the prior is causal.
        """
        if self.family != "masked":
            raise AttributeError("a causal prior has no mask token")
        return self.used_tokens - 1

    @property
    def vocab_size(self) -> int:
        """Number of tokens, padding included."""
        return -(-self.used_tokens // PAD_TO_MULTIPLE_OF) * PAD_TO_MULTIPLE_OF

    # ------------------------------------------------------------------ the codes

    @property
    def length(self) -> int:
        """L, number of codes of an image."""
        return num_codes(self.all_grids)

    @property
    def codes_shape(self) -> tuple[int, ...]:
        """Shape of an image's codes as the tokenizer takes them: `(h, w)`, `(h, w, G)` or `(L,)`."""
        return codes_shape(self.all_grids)

    @property
    def codes_text(self) -> str:
        """The grids in words."""
        return grids_text(self.all_grids)

    @property
    def all_grids(self) -> Grids:
        """`grids`, or the one grid with one code at each position."""
        return self.grids or ((*self.grid, 1),)

    @property
    def image_shape(self) -> tuple[int, int]:
        """(H, W), height and width of a decoded image in pixels."""
        return self.grid[0] * self.downsampling_factor, self.grid[1] * self.downsampling_factor

    @property
    def pixels(self) -> int:
        """Number of pixels of a decoded image, H·W."""
        return self.grid[0] * self.grid[1] * self.downsampling_factor**2

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain values for JSON. `tokens` lists the ranges of tokens in order."""
        tokens = {"codes": self.num_codes, "classes": self.num_classes, "null": 1}
        tokens |= {segment.name: segment.num_tokens + 1 for segment in self.segments}
        tokens |= {"mask": 1} if self.family == "masked" else {}
        values = {"tokens": tokens | {"padding": self.vocab_size - self.used_tokens}, **asdict(self)}
        values["segments"] = [segment.to_dict() for segment in self.segments]
        unset = {"grids": (), "segments": [], "family": "causal"}  # as in layouts of versions without these fields
        return {name: value for name, value in values.items() if name not in unset or value != unset[name]}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "TokenLayout":
        """Inverse of `to_dict`.

        Raises:
            ValueError: a field is missing, unknown or has a wrong type. The message names every such field.
        """
        from pydantic import ValidationError

        if not isinstance(values, dict):
            raise ValueError(f"token_layout: received {values!r}; must be an object with the layout's fields")
        try:
            fields = {name: value for name, value in values.items() if name != "tokens"}
            return _reader().validate_json(json.dumps(fields))
        except ValidationError as error:
            problems = [
                f"token_layout.{'.'.join(map(str, problem['loc']))}: received {problem['input']!r}; {problem['msg']}"
                for problem in error.errors()
            ]
            raise ValueError("\n".join(problems)) from error

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes `token_layout.json`."""
        write_json(Path(folder) / FILE_NAME, self.to_dict())

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "TokenLayout":
        """Reads `token_layout.json` from a folder.

        Raises:
            FileNotFoundError: the folder holds no such file.
            ValueError: the file is not JSON, or a field is wrong.
        """
        return cls.from_dict(read_json(Path(folder) / FILE_NAME))

    def require_fingerprint(
        self, fingerprint: str | None, field: str = "tokenizer", advice: str = "use that tokenizer"
    ) -> None:
        """Refuses a tokenizer with another fingerprint than `tokenizer_fingerprint`.

        Args:
            fingerprint: fingerprint of the tokenizer to check.
            field: configuration field or argument that names this tokenizer, for the message.
            advice: what the user can do, for the message.

        Raises:
            ValueError: the fingerprints differ.
        """
        if fingerprint != self.tokenizer_fingerprint:
            raise ValueError(
                f"{field}: received the tokenizer {fingerprint}, but the codes are of another tokenizer "
                f"({self.tokenizer_fingerprint}); {advice}"
            )

    def set_image_size(self, tokenizer: "VQGANModel", image_processor: "VQGANImageProcessor") -> None:
        """Sets the image size of the tokenizer and its image processor to that of the images of these codes.

        Its weights take images of any size, so stage 2 may encode images of another size than stage 1 trained on.
        """
        height, width = self.image_shape
        tokenizer.config.image_size = height if height == width else [height, width]
        image_processor.size = {"height": height, "width": width}

    def require_tokenizer(self, tokenizer: "VQGANModel", advice: str = "use that tokenizer") -> None:
        """Refuses a tokenizer whose codes this layout does not describe.

        Args:
            tokenizer: tokenizer to check.
            advice: what the user can do, for the message.

        Raises:
            ValueError: the fingerprints, numbers of codes, grids or downsampling factors differ.
        """
        config = tokenizer.config
        self.require_fingerprint(config.fingerprint or tokenizer.compute_fingerprint(), advice=advice)
        has = {
            "num_codes": config.num_embeddings,
            "grid": config.grid,
            "grids": config.grids,
            "downsampling_factor": config.downsampling_factor,
        }
        mine = {name: getattr(self, name) for name in has} | {"grids": self.all_grids}
        for name, value in has.items():
            if mine[name] != value:
                raise ValueError(
                    f"token_layout.{name}: received {mine[name]}, but the tokenizer has {value}; "
                    "restore the layout that was saved with the prior"
                )


def _grids(grids: Any, grid: Any) -> Grids:
    """The field `grids` as a tuple of three numbers each; `grid` are h and w of the last one."""
    message = "h, w and number of codes of each grid, three whole numbers"
    instance("grids", grids, (list, tuple), message)
    for each in grids:
        instance("grids", each, (list, tuple), message)
        if len(each) != 3:
            raise ValueError(f"grids: received {described(each)}; must be {message}")
    plain: Any = tuple(tuple(whole("grids", number, most=LARGEST) for number in each) for each in grids)
    if plain and plain[-1][:2] != grid:
        raise ValueError(f"grids: received {plain}; the last must have h and w of grid, {grid}")
    return () if plain == ((*grid, 1),) else plain


@cache
def _reader() -> "TypeAdapter[TokenLayout]":
    """Converts and checks the fields of a layout that was read from a file."""
    from pydantic import ConfigDict, TypeAdapter, with_config

    return TypeAdapter(with_config(ConfigDict(extra="forbid", strict=True))(TokenLayout))
