"""The sampling settings that a search tries."""

import json
import random
from collections.abc import Mapping
from itertools import product
from typing import Any

from configs import ConfigError, Problem
from pipelines.conditions import not_learnt
from pipelines.defaults import STANDARD
from pipelines.tuning.config import TRIED, TuneConfig
from stage2_prior import TokenLayout, UnmaskingOptions
from stage2_prior.sampling.unmasking import DEFAULT_ORDER_TEMPERATURE

# Arguments of `VQGANPipeline.generate` that differ from their standard values.
Settings = dict[str, Any]

# All of these make images more typical, so a setting changes at most one of them.
FILTERS = ("temperature", "top_k", "top_p", "min_p")


def candidates(config: TuneConfig, layout: TokenLayout, present: Settings) -> list[Settings]:
    """The present settings first, then the others to try: all of them, or `num_candidates` at random.

    Present settings that are not searched, such as a guidance interval, are those of all candidates.

    Raises:
        ConfigError: a key gives values of an argument that this prior does not have.
    """
    tried = values(config, layout, present)
    kept = {name: value for name, value in present.items() if name not in TRIED}
    filters = [{name: value} for name in FILTERS for value in tried[name]]
    free = [name for name in TRIED if name not in FILTERS]
    found = {}
    for some in product(*(tried[name] for name in free)):
        for one in filters:
            settings = plain(kept | dict(zip(free, some, strict=True)) | one, layout)
            found[key_of(settings)] = settings
    found.pop(key_of(present), None)
    others = list(found.values())
    if len(others) > config.num_candidates:
        others = random.Random(config.seed).sample(others, config.num_candidates)
    return [present, *others]


def values(config: TuneConfig, layout: TokenLayout, present: Settings) -> dict[str, list[Any]]:
    """The values to try of each argument; of one that the prior does not have, its standard value alone.

    Raises:
        ConfigError: a key gives values of an argument that this prior does not have.
    """
    lacks: dict[str, str] = {}
    names = [one.name for one in layout.conditions if one.num_tokens]
    if not names or not_learnt(layout, names):
        reason = "needs a prior that knows conditions and was also trained without them"
        lacks |= dict.fromkeys(("guidance_scale", "guidance_schedule"), f"guidance {reason}")
    if layout.family == "causal":
        lacks |= dict.fromkeys(("num_steps", "order_temperature"), "this prior is causal")
    elif present.get("order") == "halton":
        lacks["order_temperature"] = "the order 'halton', a default of this pipeline, has no noise"
    given = {name: getattr(config, name) for name in TRIED}
    problems = [
        Problem(name, f"received {given[name]}; {reason}; leave it out")
        for name, reason in lacks.items()
        if given[name] is not None
    ]
    if (steps := given["num_steps"]) and max(steps) > layout.length and "num_steps" not in lacks:
        allowed = f"an image has {layout.length} codes, so at most {layout.length} steps"
        problems.append(Problem("num_steps", f"received {steps}; {allowed}"))
    if problems:
        raise ConfigError(problems)
    own = TRIED | {"num_steps": [count for count in TRIED["num_steps"] if count <= layout.length] or [None]}
    return {name: [None] if name in lacks else given[name] or own[name] for name in TRIED}


def plain(settings: Mapping[str, Any], layout: TokenLayout) -> Settings:
    """Settings without those that change nothing."""
    standard = STANDARD | {"order": "confidence", "order_temperature": DEFAULT_ORDER_TEMPERATURE}
    standard["num_steps"] = UnmaskingOptions().steps(layout.length)
    changed = {name: value for name, value in settings.items() if value is not None and value != standard[name]}
    if changed.get("top_k", 0) >= layout.num_codes:
        del changed["top_k"]
    if "guidance_scale" not in changed:
        changed = {name: value for name, value in changed.items() if not name.startswith("guidance_")}
    elif "guidance_schedule" not in changed:
        changed.pop("guidance_power", None)
    return {name: changed[name] for name in sorted(changed)}


def key_of(settings: Settings) -> str:
    """A text that equal settings share."""
    return json.dumps(settings, sort_keys=True)
