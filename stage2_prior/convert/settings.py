"""The configuration of a Net2NetTransformer of taming-transformers, checked. No class that it names is imported."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Gt, Le

from configs import ConfigError, Problem, unknown_key
from configs.problems import shown
from configs.sections import Fraction, NonNegative, Positive
from configs.values import read_value
from stage1_vqgan import read_mapping, section

# Fields of the GPT, transformer_config.params.
NETWORK: dict[str, Any] = {
    "vocab_size": Positive,
    "block_size": Positive,
    "n_layer": Positive,
    "n_head": Positive,
    "n_embd": Positive,
    "embd_pdrop": Fraction,
    "resid_pdrop": Fraction,
    "attn_pdrop": Fraction,
    "n_unmasked": NonNegative,
}
# Fields of the whole, model.params. With pkeep 0 the GPT never sees the codes before a code.
NET2NET: dict[str, Any] = {
    "transformer_config": dict[str, Any],
    "first_stage_config": Any,  # the conversion of the tokenizer reads it
    "cond_stage_config": Any,
    "permuter_config": Any,
    "first_stage_key": Any,
    "cond_stage_key": Any,
    "downsample_cond_size": Any,
    "ckpt_path": Any,
    "ignore_keys": Any,
    "pkeep": Annotated[float, Gt(0), Le(1)],
    "sos_token": NonNegative,
    "unconditional": bool,
}
CONDITIONS = "supported are Labelator (classes) and '__is_unconditional__', whose prompts are one token"


@dataclass(frozen=True)
class Settings:
    """What a configuration states about a prior.

    Attributes:
        network: fields of the GPT.
        prefix: path of these fields in the configuration, with a dot at its end.
        num_classes: number of classes, 0 for an unconditional prior, None if it is not stated.
        start_code: the code that starts the sequences of an unconditional prior, None if it is not stated.
        has_tokenizer: whether it describes the tokenizer too.
    """

    network: dict[str, Any] = field(default_factory=dict)
    prefix: str = ""
    num_classes: int | None = None
    start_code: int | None = None
    has_tokenizer: bool = False


def read_settings(path: Path) -> Settings:
    """Reads the YAML of the original, or a file whose section `config` has the fields of the GPT.

    Raises:
        ConfigError: the file cannot be read, a key is unknown, or it describes what a stock GPT-2 cannot compute.
    """
    values = read_mapping(path)
    if "model" not in values:
        return Settings(_network(section(values, "config"), "config."), "config.")
    require_class(section(values, "model"), "model", "Net2NetTransformer")
    prefix = "model.params."
    params = _fields(section(values, "model", "params"), NET2NET, prefix)
    outer = section(values, "model", "params", "transformer_config")
    require_class(outer, f"{prefix}transformer_config", "GPT")
    if params.get("permuter_config") is not None:
        require_class(params["permuter_config"], f"{prefix}permuter_config", "Identity")
    inside = f"{prefix}transformer_config.params."
    network = _network(section(values, "model", "params", "transformer_config", "params"), inside)
    has_tokenizer = "first_stage_config" in params
    return Settings(network, inside, _classes(params, prefix), params.get("sos_token"), has_tokenizer)


def _network(values: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    network = _fields(values, NETWORK, prefix)
    if network.get("n_unmasked", 0) > 1:
        reason = "its first tokens see each other, but those of a GPT-2 see only the tokens before them"
        raise ConfigError([Problem(f"config: {prefix}n_unmasked", f"received {network['n_unmasked']}; {reason}")])
    return network


def _fields(values: Mapping[str, Any], hints: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """The values of a section, each of the type of its field."""
    found, problems = {}, []
    for name, value in values.items():
        try:
            if name not in hints:
                raise ValueError(unknown_key(str(name), hints))
            found[name] = value if hints[name] is Any else read_value(hints[name], value, strict=True)
        except ValueError as error:
            problems.append(Problem(f"config: {prefix}{name}", str(error)))
    if problems:
        raise ConfigError(problems)
    return found


def _classes(params: Mapping[str, Any], prefix: str) -> int | None:
    """The number of classes that the conditions state; 0 for an unconditional prior."""
    condition, key = params.get("cond_stage_config"), f"{prefix}cond_stage_config"
    if params.get("unconditional") or condition == "__is_unconditional__":
        return 0
    if condition is None:
        return None
    if not isinstance(condition, dict):
        raise ConfigError([Problem(f"config: {key}", f"received {shown(condition)}; {CONDITIONS}")])
    require_class(condition, key, "Labelator", CONDITIONS)
    options = _fields(
        section(condition, "params"), {"n_classes": Positive, "quantize_interface": bool}, f"{key}.params."
    )
    return options.get("n_classes")


def require_class(values: Any, key: str, name: str, allowed: str | None = None) -> None:
    """Refuses a section whose `target` names another class; a section without a target is accepted."""
    target = values.get("target") if isinstance(values, Mapping) else values
    if target is not None and str(target).rpartition(".")[2] != name:
        message = (
            f"received {shown(str(target))}; {allowed or f'supported is only {name}'} (this is read, not imported)"
        )
        raise ConfigError([Problem(f"config: {key}.target", message)])
