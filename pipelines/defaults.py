"""Sampling defaults of a pipeline: the values of the arguments of `VQGANPipeline.generate` that are left out."""

from collections.abc import Collection, Mapping
from dataclasses import fields
from typing import Any

from configs.arguments import described, instance
from pipelines.prompts import Groups, guidance_groups, require_learnt, scale_lists
from stage2_prior import SamplingOptions, TokenLayout, UnmaskingOptions

# What an argument is where the pipeline has no default of its own.
STANDARD: dict[str, Any] = {field.name: field.default for field in fields(SamplingOptions)}
# The arguments of masked priors, which choose their own values for None.
UNMASKING = tuple(field.name for field in fields(UnmaskingOptions))
NAMES = (*STANDARD, *UNMASKING)


def checked_defaults(layout: TokenLayout, values: Any) -> dict[str, Any]:
    """Sampling defaults that a pipeline can have, as plain numbers and texts.

    Args:
        layout: the token layout.
        values: arguments of `generate` by their names; those in STANDARD and UNMASKING. The guidance scale is a number,
            or `{condition: number}` for several conditions.

    Raises:
        ValueError: a name is unknown, or `generate` would refuse a value.
    """
    instance("sampling_defaults", values, Mapping, "a dictionary of arguments of generate")
    if unknown := [name for name in values if name not in NAMES]:
        allowed = f"allowed are {', '.join(NAMES)}"
        raise ValueError(f"sampling_defaults: received the key {described(unknown[0])}; {allowed}")
    values = {name: value for name, value in values.items() if value is not None}
    scale = values.get("guidance_scale", 1.0)
    if scale_lists(scale):
        advice = "a default is a number, or {condition: number}; lists belong to one call of generate"
        raise ValueError(f"guidance_scale: received {described(scale)}; {advice}")
    scales, groups = guidance_groups(layout, scale)
    options = SamplingOptions(
        **{name: values[name] for name in values if name in STANDARD} | {"guidance_scale": scales}
    )
    require_learnt(layout, [one.name for one in layout.conditions if one.num_tokens], options, groups)
    unmasking = unmasking_options(layout, *(values.get(name) for name in UNMASKING))
    plain = {name: getattr(options if name in STANDARD else unmasking, name) for name in values}
    if "guidance_scale" in plain:
        plain["guidance_scale"] = _plain_scale(layout, scale)
    return plain


def _plain_scale(layout: TokenLayout, scale: Any) -> float | dict[str, float]:
    """A guidance scale as a number, or by names without spaces; of an only condition, always as a number."""
    if not isinstance(scale, Mapping):
        return float(scale)
    named = {"+".join(part.strip() for part in name.split("+")): float(value) for name, value in scale.items()}
    return named if len(layout.conditions) > 1 else next(iter(named.values()))


def resolved(defaults: Mapping[str, Any], asked: Mapping[str, Any], given: Collection[str]) -> dict[str, Any]:
    """The sampling arguments of a call, with defaults in place of those that are None.

    Args:
        defaults: of the pipeline, see `checked_defaults`.
        asked: arguments of the call by their names.
        given: names of the conditions that are given. Guidance by others changes nothing, so it is left out.

    Returns:
        All arguments in STANDARD, and those in UNMASKING that are not None.
    """
    chosen = {name: value for name, value in asked.items() if value is not None or name not in NAMES}
    usable = dict(defaults)
    if isinstance(scale := usable.get("guidance_scale", 1.0), Mapping):
        scale = {names: value for names, value in scale.items() if set(names.split("+")) & set(given)}
    usable["guidance_scale"] = scale if given and scale else 1.0
    if isinstance(chosen.get("order"), str) and chosen["order"] == "halton":
        usable.pop("order_temperature", None)  # this order has none
    elif "order_temperature" in chosen:
        usable.pop("order", None)  # only the standard order has one
    return {**STANDARD, **usable, **chosen}


def options_of(
    layout: TokenLayout, settings: Mapping[str, Any]
) -> tuple[SamplingOptions, Groups, UnmaskingOptions | None]:
    """How codes are chosen, with sampling arguments as `resolved` returns them.

    Raises:
        ValueError: a value is out of range, or is given for a causal prior.
    """
    values = dict(settings)
    unmasking = unmasking_options(layout, *(values.pop(name, None) for name in UNMASKING))
    scales, groups = guidance_groups(layout, values.pop("guidance_scale"))
    return SamplingOptions(guidance_scale=scales, **values), groups, unmasking


def unmasking_options(
    layout: TokenLayout, num_steps: Any, order: Any, order_temperature: Any
) -> UnmaskingOptions | None:
    """The steps and the order of a masked prior; None for a causal prior.

    Args:
        layout: the token layout.
        num_steps, order, order_temperature: see `VQGANPipeline.generate`.

    Raises:
        ValueError: a value is out of range, or is given for a causal prior.
    """
    asked = {"num_steps": num_steps, "order": order, "order_temperature": order_temperature}
    given = {name: value for name, value in asked.items() if value is not None}
    if layout.family == "masked":
        unmasking = UnmaskingOptions(**given)
        unmasking.steps(layout.length)
        return unmasking
    for name, value in given.items():
        advice = "this prior is causal: it chooses one code after another; leave it out"
        raise ValueError(f"{name}: received {described(value)}; {advice}")
    return None
