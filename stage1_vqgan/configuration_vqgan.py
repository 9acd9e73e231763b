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
        fingerprint_fields: `image_size` and `attn_resolutions`, where an earlier version made the fingerprint: then
            they are part of it. None for all others.

    All other arguments are the fields of [`VQGANArchitecture`], and those of every `PreTrainedConfig`.

    Source: Esser et al. 2021, "Taming transformers for high-resolution image synthesis", section 3.1 and appendix A.
    """

    model_type = "tessella_vqgan"
    _auto_class = "AutoConfig"

    fingerprint: str | None = None
    fingerprint_fields: dict[str, Any] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if not any(self.architecture_problems()):  # the constructor refuses these next
            self.attn_levels = [level for level, attends in enumerate(self.attention) if attends]
            del self.__dict__["attn_resolutions"]  # so that it is not saved

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Reads the contents of config.json. That of an earlier version has `attn_resolutions` for `attn_levels`."""
        return super().from_dict(_by_level(config_dict), **kwargs)

    @property
    def grids(self) -> Grids:
        """The grids of an image's codes at the training resolution, each as (h, w, codes at each position)."""
        return build_options(self.quantizer, self.quantizer_options).grids(*self.grid)

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


def _by_level(values: dict[str, Any]) -> dict[str, Any]:
    """Replaces `attn_resolutions` by `attn_levels`; resolutions of no level were allowed, and are left out."""
    known = VQGANArchitecture()
    named, size = values.get("attn_resolutions"), values.get("image_size", known.image_size)
    multiplier = values.get("channel_multiplier", known.channel_multiplier)
    if not isinstance(named, list) or not isinstance(size, int) or not isinstance(multiplier, list | tuple):
        return values
    old = {"attn_resolutions": named, "image_size": size}
    levels = [level for level in range(len(multiplier)) if size >> level in named]
    others = {name: value for name, value in values.items() if name != "attn_resolutions"}
    return others | {"attn_levels": levels, "fingerprint_fields": old if values.get("fingerprint") else None}


__all__ = ["VQGANConfig"]
