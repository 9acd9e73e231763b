"""Configuration of the VQGAN tokenizer."""

from collections.abc import Iterator
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from .configuration_architecture import VQGANArchitecture
from .quantizers import Grids, build_options, num_codes, option_problems


@strict
class VQGANConfig(VQGANArchitecture, PreTrainedConfig):
    r"""Configuration of a [`VQGANModel`].

    Args:
        fingerprint: hash that identifies the codes of this tokenizer; set when a trained tokenizer is saved.

    All other arguments are the fields of [`VQGANArchitecture`], and those of every `PreTrainedConfig`.

    Source: Esser et al. 2021, "Taming transformers for high-resolution image synthesis", section 3.1 and appendix A.
    """

    model_type = "tessella_vqgan"
    _auto_class = "AutoConfig"

    fingerprint: str | None = None

    @property
    def grids(self) -> Grids:
        """The grids of an image's codes at the training resolution, each as (h, w, codes at each position)."""
        return build_options(self.quantizer, self.quantizer_options).grids(self.grid_size, self.grid_size)

    @property
    def num_codes_per_image(self) -> int:
        """L, number of codes of an image at the training resolution."""
        return num_codes(self.grids)

    def validate_architecture(self) -> None:
        """Checks the rules that types cannot express. The constructor calls it.

        Raises:
            ValueError: names every wrong field, the value received and what is allowed.
        """
        problems = [f"{name}: received {value!r}; {allowed}" for name, value, allowed in self.architecture_problems()]
        if problems:
            raise ValueError("\n".join(problems))

    def architecture_problems(self) -> Iterator[tuple[str, Any, str]]:
        """Problems of the network and of its quantizer, as `(field, value received, what is allowed)`."""
        yield from super().architecture_problems()
        yield from option_problems(self.quantizer, self.quantizer_options, self.num_embeddings, self.embed_dim)


__all__ = ["VQGANConfig"]
