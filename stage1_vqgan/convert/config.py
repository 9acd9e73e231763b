"""Settings of a conversion."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

from configs import Section


@dataclass(kw_only=True)
class ConvertConfig(Section):
    """Converts a tokenizer of another code base, or a tokenizer for another one.

    from: where the checkpoint is from: "taming" (CompVis/taming-transformers, also latent-diffusion's VQ models),
        "llamagen" or "diffusers"
    to: for what the checkpoint, a trained tokenizer, is converted: "diffusers"
    checkpoint: file of weights; for diffusers the folder of a VQModel; with `to`, folder or Hub id of a tokenizer
    config: the original's YAML or JSON; what it does not say is read from the weights
    output: folder to make
    verify: safetensors with inputs, codes and reconstructions of the original (io.input, io.indices, io.recon) to
        compare with; diffusers itself is run instead, on these inputs or on random ones
    """

    source: Literal["taming", "llamagen", "diffusers"] | None = field(default=None, metadata={"key": "from"})
    target: Literal["diffusers"] | None = field(default=None, metadata={"key": "to"})
    checkpoint: str
    config: str | None = None
    output: str
    verify: str | None = None

    def problems(self) -> Iterable[tuple[str, Any, str]]:
        if (self.source is None) == (self.target is None):
            yield "", None, "give either --from, where the checkpoint is from, or --to, for what it is converted"
        elif self.config is not None and "diffusers" in (self.source, self.target):
            yield "config", self.config, "the checkpoint is a folder with its own config.json; leave this out"
