"""The options of the conversion of a prior."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from annotated_types import Ge, Le

from configs import Section
from configs.sections import LARGEST, Positive

Side = Annotated[int, Ge(1), Le(2**12)]
NO_LLAMAGEN = (
    "no stock model of transformers computes these priors exactly: their rotary positions are rows and columns, and "
    "the key of their class token is zero (see Published priors in the README of stage2_prior). Their tokenizers can "
    "be converted: stage1_vqgan.convert --from llamagen"
)


@dataclass(kw_only=True)
class ConvertConfig(Section):
    """Converts a prior of another code base to a stock model of transformers, and to a pipeline with its tokenizer.

    from: code base of the checkpoint: "taming" (Net2NetTransformer of CompVis/taming-transformers, or its GPT alone);
        "llamagen" is refused, because no stock model is exact
    checkpoint: the weights file; a tokenizer in it (first_stage_model) is converted too
    config: YAML or JSON configuration of the checkpoint
    output_dir: folder to create: a pipeline, or without a tokenizer a prior
    tokenizer: folder or Hub id of the tokenizer, if the checkpoint does not hold it
    num_heads: attention heads, if the configuration does not state n_head
    num_classes: number of classes, or 0 for an unconditional prior, if the configuration does not state
        cond_stage_config
    start_code: the code that starts every sequence of an unconditional prior, if the configuration does not state
        sos_token; by default 0, as in the original
    grid: h and w of the codes of an image; by default those of the tokenizer
    downsampling_factor: pixels of an image's side for each code; by default that of the tokenizer
    """

    source: Literal["taming", "llamagen"] = field(metadata={"key": "from"})
    checkpoint: str
    config: str | None = None
    output_dir: str
    tokenizer: str | None = None
    num_heads: Positive | None = None
    num_classes: Annotated[int, Ge(0), Le(2**20)] | None = None
    start_code: Annotated[int, Ge(0), Le(LARGEST)] | None = None
    grid: list[Side] | None = None
    downsampling_factor: Side | None = None

    def problems(self) -> Iterable[tuple[str, Any, str]]:
        if self.source == "llamagen":
            yield "from", self.source, NO_LLAMAGEN
        if self.start_code is not None and self.num_classes:
            yield "start_code", self.start_code, f"a prior with classes (num_classes {self.num_classes}) has none"
        if self.grid is not None and len(self.grid) != 2:
            yield "grid", self.grid, "must be h and w, two whole numbers"
