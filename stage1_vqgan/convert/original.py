"""A tokenizer that was read from another code base → a `VQGANModel`. Its weights and its configuration must agree."""

import copy
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor

from configs import ConfigError, Problem, unknown_key
from configs.problems import listed, shown
from configs.values import read_value
from stage1_vqgan.configuration_architecture import VQGANArchitecture
from stage1_vqgan.configuration_vqgan import VQGANConfig
from stage1_vqgan.convert.names import count
from stage1_vqgan.modeling_vqgan import VQGANModel

# Size of images if no configuration states it; the weights do not contain it.
IMAGE_SIZE = 256

# Fields of VQGANConfig that equal the size of an axis: {field: (names of tensors, the axis)}.
AXES = {
    "in_channels": (("encoder.conv_in.weight",), 1),
    "base_channels": (("encoder.conv_in.weight",), 0),
    "latent_channels": (("encoder.conv_out.weight",), 0),
    "embed_dim": (("quant_conv.weight",), 0),
    "num_embeddings": (("quantize.embedding.weight", "quantize.embed.weight"), 0),
}


@dataclass(frozen=True)
class Claim:
    """The value that the configuration of the original implies for a field of VQGANConfig.

    Attributes:
        key: key in the configuration of the original.
        field: field of VQGANConfig.
        value: value of the field.
    """

    key: str
    field: str
    value: Any


@dataclass(kw_only=True)
class Original:
    """A tokenizer of another code base.

    Attributes:
        weights: float32 tensors, by their names in VQGANModel.
        name_in_file: translates a name in VQGANModel to the name in the file.
        claims: claims of its configuration.
        settings: fields of VQGANConfig that follow from the code base or the kind of quantizer.
        discriminator: weights of its discriminator, by their names in PatchDiscriminator; may be empty.
        notes: lines for the user: what was left out or decided.
    """

    weights: dict[str, Tensor]
    name_in_file: Callable[[str], str] = str
    claims: list[Claim] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    discriminator: dict[str, Tensor] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def leave_out(tensors: Mapping[str, Tensor], groups: Mapping[str, str]) -> tuple[dict[str, Tensor], list[str]]:
    """Removes tensors that are not weights of the tokenizer.

    Args:
        tensors: all tensors of a file.
        groups: {regular expression for the start of a name: description of these tensors}.

    Returns:
        The other tensors, and a line for the user for each group that was removed.
    """
    kept, notes = dict(tensors), []
    for pattern, words in groups.items():
        names = [name for name in kept if re.match(pattern, name)]
        for name in names:
            del kept[name]
        if names:
            notes.append(f"left out: {words} ({len(names)} tensor{'s' if len(names) > 1 else ''})")
    return kept, notes


def renamed(weights: Mapping[str, Tensor], rename: Callable[[str], str]) -> dict[str, Tensor]:
    """Renames tensors.

    Raises:
        ConfigError: two tensors get the same name.
    """
    names: dict[str, str] = {}
    for name in weights:
        if names.setdefault(rename(name), name) != name:
            raise ConfigError(
                [Problem("checkpoint", f"{names[rename(name)]} and {name} are the same weight; one is too many")]
            )
    return {here: weights[there] for here, there in names.items()}


def multiplier(width: int, base: int) -> int | float:
    """The width of a level as a multiple of the base width; an integer if possible."""
    return width // base if width % base == 0 else width / base


def section(values: Any, *keys: str) -> dict[str, Any]:
    """The section of a configuration at a path of keys.

    Raises:
        ConfigError: the section does not exist.
    """
    for depth, key in enumerate(keys, 1):
        if not isinstance(values, dict) or not isinstance(values.get(key), dict):
            raise ConfigError(
                [Problem(f"config: {'.'.join(keys[:depth])}", "is missing; it must be a section of keys and values")]
            )
        values = values[key]
    return values


def read_claims(
    values: Mapping[str, Any],
    prefix: str,
    fields: Mapping[str, str],
    fixed: Mapping[str, Collection[Any]],
    ignored: Collection[str] = (),
) -> list[Claim]:
    """The claims of a section of a configuration.

    Args:
        values: keys and values of the section.
        prefix: path of the section for messages, each key followed by a dot.
        fields: {key: field of VQGANConfig}.
        fixed: {key: the only values that a VQGANModel supports}.
        ignored: keys without influence on codes and images.

    Raises:
        ConfigError: a key is unknown, or a value has the wrong type or is not supported by VQGANModel.
    """
    hints = VQGANArchitecture.__annotations__ | {"image_size": int | list[int], "attn_resolutions": list[int]}
    claims, problems = [], []
    for name, value in values.items():
        key = f"{prefix}{name}"
        if name in fields:
            try:
                claims.append(Claim(key, fields[name], read_value(hints[fields[name]], value, strict=True)))
            except ValueError as error:
                problems.append(Problem(f"config: {key}", str(error)))
        elif name in fixed:
            if not any(value == allowed and type(value) is type(allowed) for allowed in fixed[name]):
                received = shown(value) if isinstance(value, str | int | float | None) else type(value).__name__
                allowed = " or ".join(map(shown, fixed[name]))
                problems.append(Problem(f"config: {key}", f"received {received}; supported is only {allowed}"))
        elif name not in ignored:
            known = [*fields, *fixed, *ignored]
            problems.append(
                Problem(f"config: {key}", f"{unknown_key(str(name), known)} (remove it if it is for training)")
            )
    if problems:
        raise ConfigError(problems)
    return claims


def contradictions(claims: list[Claim], found: Mapping[str, tuple[Any, str]]) -> list[Problem]:
    """The problems of claims that differ from the weights; `found` is `{field: (value, evidence in the weights)}`."""
    return [
        Problem(
            f"config: {claim.key}", f"is {_plain(claim.value)}, but the weights have {found[claim.field][0]} ({where})"
        )
        for claim in claims
        if claim.field in found and _plain(claim.value) != found[claim.field][0] and (where := found[claim.field][1])
    ]


def build_model(original: Original, image_size: int | list[int] | None = None) -> VQGANModel:
    """Builds the tokenizer, in evaluation mode.

    Args:
        original: the weights and what its configuration says.
        image_size: size for the configuration, in place of that of the original; attention stays in its levels.

    Raises:
        ConfigError: the weights contradict the configuration, or are not exactly those of a VQGANModel; or no image
            can have this size.
    """
    config = _config(original)
    if image_size is not None:
        config = _resized(config, image_size)
    with torch.device("meta"):
        model = VQGANModel(config)
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    require_complete(original.weights, expected, "tokenizer", original.name_in_file)
    model.load_state_dict(original.weights, assign=True)
    return model.eval()


def require_complete(
    weights: Mapping[str, Tensor],
    expected: Mapping[str, tuple[int, ...]],
    kind: str,
    name_in_file: Callable[[str], str] = str,
) -> None:
    """Refuses weights that are not exactly those of a model.

    Args:
        weights: tensors by their names.
        expected: the names and shapes that the model has.
        kind: the kind of the model, for the message.
        name_in_file: translates a name to the name in the file.

    Raises:
        ConfigError: tensors are missing, unexpected or of another shape.
    """
    shapes = {name: tuple(value.shape) for name, value in weights.items()}
    misshapen = [
        f"{name_in_file(name)} {shapes[name]}, needed {shape}"
        for name, shape in expected.items()
        if name in shapes and shapes[name] != shape
    ]
    problems = [
        Problem("checkpoint", f"{len(names)} {wrong}: {listed(names)}")
        for wrong, names in (
            ("missing", [name_in_file(name) for name in expected if name not in shapes]),
            ("unexpected", [name_in_file(name) for name in shapes if name not in expected]),
            ("of another shape", misshapen),
        )
        if names
    ]
    if problems:
        raise ConfigError(problems, f"these are not the weights of a complete {kind}")


def _resized(config: VQGANConfig, image_size: int | list[int]) -> VQGANConfig:
    """The configuration for images of another size.

    Raises:
        ConfigError: the downsampling factor does not divide it, or it is not one side or two.
    """
    resized = copy.deepcopy(config)
    resized.image_size = image_size
    problems = [
        Problem(name, f"received {value!r}; {allowed}") for name, value, allowed in resized.architecture_problems()
    ]
    if problems:
        raise ConfigError(problems)
    return resized


def levels_with_attention(weights: Collection[str], num_levels: int) -> list[int]:
    """Numbers of the levels with attention in the encoder or the decoder."""
    return [
        level
        for level in range(num_levels)
        if any(name.startswith((f"encoder.down.{level}.attn.", f"decoder.up.{level}.attn.")) for name in weights)
    ]


def _config(original: Original) -> VQGANConfig:
    found = dict(_found(original.weights))
    claimed = {claim.field: claim.value for claim in original.claims}
    num_levels = max(1, count(original.weights, r"encoder\.down\.(\d{1,4})\."))
    factor = 2 ** (num_levels - 1)
    image_size = claimed.get("image_size", IMAGE_SIZE if IMAGE_SIZE % factor == 0 else factor)
    side = image_size if isinstance(image_size, int) else min(image_size)
    resolutions = [side >> level for level in range(num_levels)]
    levels = levels_with_attention(original.weights, num_levels)
    found["attn_levels"] = levels, f"attn in levels {listed(list(map(str, levels))) or 'none'}; 0 is the largest"
    attends = [resolutions[level] for level in levels]
    found["attn_resolutions"] = attends, f"attn in levels of {listed([str(size) for size in attends]) or 'no'} pixels"
    claims = [
        replace(claim, value=[size for size in resolutions if size in claim.value])
        if claim.field == "attn_resolutions"
        else claim
        for claim in original.claims
    ]
    problems = contradictions(claims, found)
    fields = {
        "image_size": image_size,
        **original.settings,
        **claimed,
        **{name: value for name, (value, _) in found.items()},
    }
    fields.pop("attn_resolutions")  # attn_levels says the same
    unknown = [name for name in (*AXES, "channel_multiplier", "num_res_blocks") if name not in fields]
    if unknown:
        message = (
            f"neither the weights nor a configuration state {listed(unknown)}; are these the weights of a tokenizer?"
        )
        problems.append(Problem("checkpoint", message))
    if problems:
        raise ConfigError(problems)
    try:
        return VQGANConfig(**fields)
    except (ValueError, StrictDataclassError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise ConfigError([Problem("checkpoint", line) for line in lines], "no such tokenizer can be built") from None


def _found(weights: Mapping[str, Tensor]) -> Iterator[tuple[str, tuple[Any, str]]]:
    """Fields that the weights determine, as `(field of VQGANConfig, (value, evidence in the weights))`."""
    for name, (tensors, axis) in AXES.items():
        for tensor in tensors:
            if tensor in weights and weights[tensor].ndim > axis:
                yield name, (weights[tensor].shape[axis], f"{tensor} is {tuple(weights[tensor].shape)}")
    num_levels = count(weights, r"encoder\.down\.(\d{1,4})\.")
    blocks = [count(weights, rf"encoder\.down\.{level}\.block\.(\d{{1,4}})\.") for level in range(num_levels)]
    if not blocks or not max(blocks):
        return
    yield "num_res_blocks", (max(blocks), "blocks in a level of the encoder")
    attends = any(re.match(r"(encoder|decoder)\.mid\.attn_1\.", name) for name in weights)
    yield "mid_attention", (attends, "attn_1 in the middle" if attends else "no attn_1 in the middle")
    base = weights.get("encoder.conv_in.weight")
    widths = [_width(weights, level) for level in range(num_levels)]
    if base is not None and len(base) and all(widths):
        multipliers = [multiplier(width, len(base)) for width in widths]
        yield "channel_multiplier", (multipliers, f"levels of {listed(list(map(str, widths)))} channels")


def _width(weights: Mapping[str, Tensor], level: int) -> int:
    """Channels of a level: the most frequent output size of its convolutions, so that a wrong tensor is noticed."""
    widths = [
        len(value)
        for name, value in weights.items()
        if name.startswith(f"encoder.down.{level}.block.") and name.endswith("weight") and value.ndim == 4
    ]
    return max(widths, key=widths.count, default=0)


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
