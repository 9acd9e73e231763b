"""Prompts: what `VQGANPipeline.generate` is given for each condition, and guidance by condition."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from configs.arguments import described, is_number
from configs.problems import listed
from pipelines.arguments import listed_labels
from pipelines.conditions import ARGUMENTS, ConditionTokenizer, not_learnt
from stage2_prior import CLASS, SamplingOptions, Segment, TokenLayout

# For each scale of the guidance, the names of its conditions; None is all of them.
Groups = tuple[tuple[str, ...] | None, ...]


class Given(NamedTuple):
    """What is given for a condition.

    Attributes:
        segment: the condition.
        key: the argument that messages name.
        values: labels, texts or images.
        is_single: whether one value was given without a list, which serves all images.
    """

    segment: Segment
    key: str
    values: Sequence[Any]
    is_single: bool


def given_conditions(
    layout: TokenLayout, class_labels: Any = None, text: Any = None, condition_images: Any = None
) -> list[Given]:
    """What is given, in the order of the prompt.

    Args:
        layout: the token layout.
        class_labels, text, condition_images: see `VQGANPipeline.generate`.

    Raises:
        ValueError: the pipeline has no such condition, a list is empty, or two lists have different lengths.
    """
    found: dict[str, Any] = {}
    for kind, value in (("class", class_labels), ("text", text), ("image", condition_images)):
        if value is not None:
            found |= _by_name(layout, kind, value)
    given = [_given(layout, segment, found[segment.name]) for segment in layout.conditions if segment.name in found]
    number_of_prompts(given)
    return given


def _by_name(layout: TokenLayout, kind: str, value: Any) -> dict[str, Any]:
    names = [segment.name for segment in layout.conditions if segment.kind == kind]
    if isinstance(value, Mapping):
        if unknown := [name for name in value if name not in names]:
            raise ValueError(f"{ARGUMENTS[kind]}: received the condition {described(unknown[0])}; {_known(layout)}")
        if not value:
            raise ValueError(f"{ARGUMENTS[kind]}: received an empty dictionary; {_known(layout)}")
        return dict(value)
    if len(names) != 1:
        advice = "several such conditions need {name: value}; " if names else ""
        raise ValueError(f"{ARGUMENTS[kind]}: received {described(value)}; {advice}{_known(layout)}")
    return {names[0]: value}


def _known(layout: TokenLayout) -> str:
    """The conditions of a pipeline in words."""
    by_kind = {
        argument: [repr(segment.name) for segment in layout.conditions if segment.kind == kind]
        for kind, argument in ARGUMENTS.items()
    }
    known = [f"{argument} ({listed(names, 10)})" for argument, names in by_kind.items() if names]
    return f"this pipeline knows {', '.join(known)}"


def classes_of(layout: TokenLayout) -> list[Segment]:
    """The conditions with classes."""
    return [segment for segment in layout.conditions if segment.kind == "class" and segment.num_tokens]


def class_condition(layout: TokenLayout, name: Any = None, key: str = "condition") -> Segment:
    """The condition with classes that is meant; None and "class" also mean the only one, whatever its name.

    Args:
        layout: the token layout.
        name: name of the condition.
        key: the argument that messages name.

    Raises:
        ValueError: there are no classes, no such condition, or several to choose from.
    """
    classes = {segment.name: segment for segment in classes_of(layout)}
    if not classes:
        raise ValueError(f"{key}: received {described(name)}; this prior has no classes; use the likelihood of images")
    names = listed([repr(one) for one in classes], 10)
    if len(classes) == 1:
        classes.setdefault(CLASS, *classes.values())
    wanted = CLASS if name is None else name
    if isinstance(wanted, str) and wanted in classes:
        return classes[wanted]
    raise ValueError(f"{key}: received {described(name)}; must be one of the conditions with classes, {names}")


def labels_of(layout: TokenLayout, given: Sequence[Given], prompts: Tensor) -> list[Any] | None:
    """The classes of images with these prompts `(N, P)`, see `VQGANPipelineOutput.labels`."""
    named = {}
    for segment in [one.segment for one in given if one.segment.kind == "class"]:
        ids = prompts[:, layout.places[segment.name]].flatten() - layout.first_tokens[segment.name]
        named[segment.name] = [segment.class_names[number] for number in ids.tolist()]
    classes = [segment.name for segment in classes_of(layout)]
    if classes and classes[0] in named and (classes[0] == CLASS or len(classes) == 1):
        return named[classes[0]]
    return [dict(zip(named, row, strict=True)) for row in zip(*named.values(), strict=True)] or None


def argument_of(layout: TokenLayout, segment: Segment) -> str:
    """The argument of a condition, with its name if there are several of its kind."""
    is_only = sum(other.kind == segment.kind for other in layout.conditions) == 1
    argument = ARGUMENTS[segment.kind]
    return argument if is_only else f"{argument}[{segment.name!r}]"


def _given(layout: TokenLayout, segment: Segment, value: Any) -> Given:
    key = argument_of(layout, segment)
    if segment.kind == "class":
        is_list = getattr(value, "ndim", 0) > 0 or (isinstance(value, Sequence) and not isinstance(value, str | bytes))
        return Given(segment, key, listed_labels(value), not is_list)
    is_list = isinstance(value, list | tuple) or getattr(value, "ndim", 0) == 4
    values = list(value) if is_list else [value]
    if not values:
        raise ValueError(f"{key}: received an empty list; needs at least one value")
    for text in values if segment.kind == "text" else ():
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"{key}: received {described(text)}; must be text that is not empty")
    return Given(segment, key, values, not is_list)


def condition_ids(one: Given, layout: TokenLayout, tokenizers: Mapping[str, ConditionTokenizer]) -> Tensor:
    """The ids of given values among the tokens of their condition, int64 `(n, length)`.

    Raises:
        ValueError: a class is unknown, or a text or an image cannot be encoded.
    """
    segment = one.segment
    if segment.kind != "class":
        return tokenizers[segment.name].ids(one.values, segment, one.key)
    classes = layout.class_ids if segment.name == CLASS else segment.classes.ids
    return classes(one.values)[:, None]


def prompt_lists(given: Sequence[Given], guidance_scale: Any = 1.0) -> list[tuple[str, int]]:
    """The arguments that have one value for each prompt, and their lengths."""
    lists = [(one.key, len(one.values)) for one in given if not one.is_single]
    return lists + [("guidance_scale", len(scales)) for scales in scale_lists(guidance_scale)]


def number_of_prompts(given: Sequence[Given], guidance_scale: Any = 1.0) -> int:
    """The number of different prompts: the length that all lists have; 1 without a list.

    Raises:
        ValueError: two lists have different lengths.
    """
    (first, count), *others = prompt_lists(given, guidance_scale) or [("", 1)]
    for key, length in others:
        if length != count:
            advice = "give lists of one length; a single value without a list serves all images"
            raise ValueError(f"{key}: received {length} values, but {first} has {count}; {advice}")
    return count


def asked_prompts(given: Sequence[Given], count: int, guidance_scale: Any = 1.0) -> list[dict[str, Any]]:
    """What was asked of each of `count` images, as arguments of `generate`: `{argument: {condition: value}}`.

    If there is a list of guidance scales, each has its `guidance_scale` too.
    """
    each, asked = count // number_of_prompts(given, guidance_scale), []
    for number in range(count):
        prompt: dict[str, Any] = {}
        for one in given:
            value = one.values[0 if one.is_single else number // each]
            prompt.setdefault(ARGUMENTS[one.segment.kind], {})[one.segment.name] = value
        if scale_lists(guidance_scale):
            prompt["guidance_scale"] = scale_of_prompt(guidance_scale, number // each)
        asked.append(prompt)
    return asked


def require_given(layout: TokenLayout, given: Collection[str], rest: str = "") -> None:
    """Checks that the prior can do without all conditions that are not given.

    Args:
        layout: the token layout.
        given: names of the conditions that are given.
        rest: what the message adds.

    Raises:
        ValueError: names a condition that the prior needs.
    """
    missing = [segment.name for segment in layout.conditions if segment.name not in given]
    if lacking := not_learnt(layout, missing):
        raise ValueError(f"{argument_of(layout, lacking[0])}: {_without_dropout(layout, lacking)}{rest}")


# ---------------------------------------------------------------------- guidance


def guidance_groups(layout: TokenLayout, scale: Any) -> tuple[Any, Groups]:
    """The scales of the guidance, as `SamplingOptions` takes them, and the names of the conditions of each.

    Args:
        layout: the token layout.
        scale: a number, for all conditions together; or `{name: number}`, where "a+b" stands for a and b together. In
            place of a number, a list has one for each prompt.

    Raises:
        ValueError: a name is unknown, or nothing is given.
    """
    if isinstance(scale, Mapping | list | tuple) and not all([scale, *scale_lists(scale)]):
        allowed = "must be a number, a list with one for each prompt, or {condition: number}"
        raise ValueError(f"guidance_scale: received {described(scale)}; {allowed}")
    if not isinstance(scale, Mapping):
        return (tuple(scale),) if scale_lists(scale) else scale, (None,)
    known = [segment.name for segment in layout.conditions]
    acting: dict[tuple[str, ...], Any] = {}
    for key, value in scale.items():
        names = tuple(name.strip() for name in str(key).split("+"))
        if not set(names) <= set(known):
            allowed = f"allowed are {listed([repr(name) for name in known], 10)}, or several joined by +"
            raise ValueError(f"guidance_scale: received the condition {described(key)}; {allowed}")
        if not (is_number(value) and value == 1):  # a scale of 1.0 changes nothing
            acting[names] = tuple(value) if scale_lists(value) else value
    return (tuple(acting.values()), tuple(acting)) if acting else (1.0, (None,))


def scale_lists(guidance_scale: Any) -> list[Sequence[Any]]:
    """The lists of guidance scales, which have one for each prompt."""
    scales = guidance_scale.values() if isinstance(guidance_scale, Mapping) else [guidance_scale]
    return [scale for scale in scales if isinstance(scale, list | tuple)]


def scale_of_prompt(guidance_scale: Any, number: int) -> Any:
    """The guidance scale of one prompt, as `generate` takes it."""
    if isinstance(guidance_scale, Mapping):
        return {name: scale_of_prompt(scale, number) for name, scale in guidance_scale.items()}
    return float(guidance_scale[number] if scale_lists(guidance_scale) else guidance_scale)


def require_learnt(
    layout: TokenLayout, given: Collection[str], options: SamplingOptions, groups: Groups = (None,)
) -> None:
    """Checks that training has seen the null tokens of the prompts: those of what is missing, and of the guidance.

    Args:
        layout: the token layout.
        given: names of the conditions that are given.
        options: the scales of the guidance.
        groups: the conditions of each scale of the guidance.

    Raises:
        ValueError: the prior cannot do without a condition, or guidance acts on none that is given.
    """
    require_given(layout, given, "" if layout.segments else " and guidance_scale 1.0")
    missing = [segment.name for segment in layout.conditions if segment.name not in given]
    for names, acts, scale in zip(groups, options.acting, options.group_scales, strict=True):
        if not acts:
            continue
        group = [segment for segment in layout.conditions if names is None or segment.name in names]
        if lacking := not_learnt(layout, [*missing, *(segment.name for segment in group)]):
            raise ValueError(f"guidance_scale: {_without_dropout(layout, lacking)} and guidance_scale 1.0")
        if not any(segment.name in given for segment in group):
            needs = " or ".join(dict.fromkeys(argument_of(layout, segment) for segment in group))
            received = described(scale) if names is None else f"the condition {'+'.join(names)!r}"
            raise ValueError(f"guidance_scale: received {received}; guidance needs {needs} (or use 1.0)")


def _without_dropout(layout: TokenLayout, lacking: Sequence[Segment]) -> str:
    names = listed([repr(segment.name) for segment in lacking], 10)
    dropout = f"dropout of {names} alone" if layout.segments else "condition dropout"
    if layout.segments and CLASS in [segment.name for segment in lacking]:
        advice = "declare it in conditions, with kind class and a dropout, and set data.use_labels false"
        dropout += f" (the class of data.label_column has none; for a new training, {advice})"
    needs = listed(list(dict.fromkeys(argument_of(layout, segment) for segment in lacking)), 10)
    return f"this prior was trained without {dropout}, so it has not learnt the null token; it needs {needs}"
