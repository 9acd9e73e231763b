"""Settings of a conversion."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

from configs import Section
from configs.sections import Positive


@dataclass(kw_only=True)
class ConvertConfig(Section):
    """Converts a tokenizer from or to another code base.

    from: code base of the checkpoint: "taming" (CompVis/taming-transformers, also the VQ models of latent-diffusion),
        "llamagen", "diffusers" or "janus" (JanusVQVAE of transformers, alone or in a whole Janus)
    to: code base to convert a trained tokenizer to: "diffusers" or "janus"
    checkpoint: with `from`, the weights file, or the folder of a diffusers VQModel or of a Janus; with `to`, the folder
        or Hub id of the trained tokenizer
    config: YAML or JSON configuration of the checkpoint; fields that it lacks are read from the weights
    output: folder to create
    image_size: size in pixels for which the result is configured: a side, or [height, width]; by default that of the
        checkpoint. The weights stay as they are, and attention stays in its levels
    verify: safetensors file with inputs, codes and reconstructions of the original (io.input, io.indices, io.recon) to
        compare with; for diffusers and janus only the inputs are read, because the comparison runs their classes, by
        default on random inputs
    """

    source: Literal["taming", "llamagen", "diffusers", "janus"] | None = field(default=None, metadata={"key": "from"})
    target: Literal["diffusers", "janus"] | None = field(default=None, metadata={"key": "to"})
    checkpoint: str
    config: str | None = None
    output: str
    image_size: Positive | list[Positive] | None = None
    verify: str | None = None

    def problems(self) -> Iterable[tuple[str, Any, str]]:
        if (self.source is None) == (self.target is None):
            yield "", None, "give either --from, the code base of the checkpoint, or --to, the code base to convert to"
        elif self.config is not None and (self.target is not None or self.source == "diffusers"):
            yield "config", self.config, "the checkpoint is a folder with a config.json; leave this out"
