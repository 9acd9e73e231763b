"""The fingerprint of a tokenizer, and checks of the weights that were read from a file."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from .configuration_vqgan import VQGANConfig
from .quantizers import QUANTIZERS

# Fields that determine the codes of an image; the fingerprint is a hash of these fields and the weights. The names of
# the weights say which levels attend.
FINGERPRINT_FIELDS = (
    "in_channels",
    "base_channels",
    "channel_multiplier",
    "num_res_blocks",
    "attn_resolutions",
    "image_size",
    "norm_num_groups",
    "latent_channels",
    "embed_dim",
    "num_embeddings",
    "quantizer",
)

# Those that are only part of a fingerprint of an earlier version.
EARLIER_FIELDS = {"attn_resolutions", "image_size"}

# Arguments of `from_pretrained` that say where the files are.
HUB_OPTIONS = {"cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token"}

# transformers lists the weights that do not fit a configuration under these names.
MISFITS = ("missing_keys", "unexpected_keys", "mismatched_keys")

SHOWN_NAMES = 3


def facts_of(config: VQGANConfig) -> dict[str, Any]:
    """The fields and the quantizer's options that determine the codes of an image."""
    kind = QUANTIZERS[config.quantizer].Options
    options = kind(**config.quantizer_options)
    earlier = (config.fingerprint and config.fingerprint_fields) or {}
    facts = {
        name: earlier[name] if name in EARLIER_FIELDS else getattr(config, name)
        for name in FINGERPRINT_FIELDS
        if name not in EARLIER_FIELDS or name in earlier
    }
    return facts | {name: getattr(options, name) for name in sorted(kind.DECIDE_CODES)}


def weights_of_codes(parameters: Iterable[tuple[str, Tensor]]) -> list[tuple[str, Tensor]]:
    """The weights that determine the codes of an image, by name; buffers of a quantizer only matter in training."""
    return [pair for pair in sorted(parameters) if pair[0].startswith(("encoder.", "quant_conv.", "quantize."))]


def fingerprint_of(config: VQGANConfig, parameters: Iterable[tuple[str, Tensor]]) -> str:
    """Hash of the weights that determine the codes, as float32, and of `facts_of(config)`; 16 hexadecimal digits."""
    digest = hashlib.sha256(json.dumps(facts_of(config)).encode())
    for name, tensor in weights_of_codes(parameters):
        digest.update(name.encode())
        digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def verify_fingerprint(name: Any, stored: VQGANConfig, parameters: Iterable[tuple[str, Tensor]]) -> None:
    """Compares the fingerprint in config.json with the weights.

    It cannot be computed again if the weights were cast to fewer bits before they were saved: the check passes then.

    Args:
        name: folder or Hub id, for the message.
        stored: the configuration in config.json.
        parameters: the weights in model.safetensors as float32.

    Raises:
        ValueError: the weights or the fields have another fingerprint.
    """
    weights = weights_of_codes(parameters)
    found = stored.fingerprint and fingerprint_of(stored, weights)
    if found != stored.fingerprint and not any(_fits(weights, half) for half in (torch.bfloat16, torch.float16)):
        raise ValueError(
            f"{name}: fingerprint: config.json has {stored.fingerprint}, but its other fields and the weights have "
            f"{found}; one of these files was changed, or is of another tokenizer: restore it, or save or download the "
            "folder again"
        )


def refuse_weights(name: Any, info: Mapping[str, Any], weights: Mapping[str, Tensor]) -> None:
    """Refuses weights that do not fit the model, or hold infinite values or "not a number".

    Args:
        name: folder or Hub id, for the message.
        info: what transformers says about missing, unexpected and misshapen weights.
        weights: the weights of the model; each value is read once.

    Raises:
        ValueError: names the first of these weights.
    """
    wrong = {
        **{kind.removesuffix("_keys"): info[kind] for kind in MISFITS},
        "not finite": [key for key, value in weights.items() if _is_broken(value)],
    }
    found = [f"{len(keys):,} {kind}: {_listed(keys)}" for kind, keys in wrong.items() if keys]
    if found:
        raise ValueError(
            f"{name}: model.safetensors: the weights do not fit the configuration: {'; '.join(found)}; save or "
            "download the folder again"
        )


def _fits(weights: list[tuple[str, Tensor]], dtype: torch.dtype) -> bool:
    """Whether a dtype of fewer bits can hold all weights."""
    return all(torch.equal(weight, weight.to(dtype).to(weight.dtype)) for _, weight in weights)


def _is_broken(value: Tensor) -> bool:
    # the extremes of values that are not all finite are not finite either
    return value.is_floating_point() and value.numel() > 0 and not torch.stack(value.aminmax()).isfinite().all()


def _listed(keys: Iterable[Any]) -> str:
    names = sorted(map(str, keys))
    more = f" and {len(names) - SHOWN_NAMES:,} more" if len(names) > SHOWN_NAMES else ""
    return ", ".join(names[:SHOWN_NAMES]) + more
