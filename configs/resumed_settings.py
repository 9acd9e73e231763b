"""Compares the settings of a resumed run with those that it was started with."""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from configs.loader import defaults, to_dict
from configs.problems import ConfigError, Problem, listed, shown
from configs.secrets import secret_keys
from configs.yaml_files import read_yaml

ALLOW = "give --allow_config_changes true"

# Keys that may change when a run resumes, because they do not influence the trained weights.
FREE_KEYS = {
    "data.max_skipped_fraction",
    "output_dir",
    "logging_steps",
    "metrics",
    "num_sample_images",
    "save_steps",
    "save_total_limit",
    "resume_from_checkpoint",
    "allow_config_changes",
    "dataloader_num_workers",
    "ddp_timeout",
    "report_to",
    "push_to_hub",
    "hub_model_id",
    "hub_private_repo",
    "license",
}

logger = logging.getLogger(__name__)


def require_same_settings(config: Any, path: Path, warn: bool) -> None:
    """Refuses settings that differ from those in the config.yaml of a run, unless `config.allow_config_changes`.

    Args:
        config: the resolved settings.
        path: the config.yaml; without one, there is nothing to compare.
        warn: whether to log a warning that names the allowed changes.

    Raises:
        ConfigError: settings differ, or the file is malformed or holds a secret.
    """
    if not path.is_file():
        return
    old, new = _read(path), to_dict(config)
    foreign = [key for key in old if key not in new]
    if len(foreign) > 1 and new.keys() - old.keys():
        message = f"received {shown(str(path.parent))}; it holds a run of another command, with {listed(foreign)}"
        raise ConfigError([Problem("output_dir", f"{message}; choose another output_dir")])
    changed = list(differences(_completed(old, defaults(type(config))), new))
    if not changed:
        return
    if config.allow_config_changes:
        if warn:
            changes = ", ".join(f"{key}: {shown(old)} -> {shown(new)}" for key, old, new in changed)
            logger.warning("resuming with changed settings: %s", changes)
        return
    advice = f"choose another output_dir, remove {path.parent} to start over, or {ALLOW}"
    raise ConfigError(
        [Problem("output_dir", advice)]  # first, because a long list is cut
        + [Problem(key, f"the run was started with {shown(old)}, now it is {shown(new)}") for key, old, new in changed],
        f"{path.parent} holds a run with other settings",
    )


def _read(path: Path) -> dict[str, Any]:
    values, repeated = read_yaml(str(path))
    if repeated:
        raise ConfigError(repeated, str(path))
    if secrets := sorted(set(secret_keys(values))):
        raise ConfigError([Problem(key, "a secret is saved here; remove this line") for key in secrets], str(path))
    return values


def _completed(values: Any, defaults: Any) -> Any:
    """Settings with the defaults of the keys that they lack. Such keys are newer than the run, which had the defaults.

    So a new key must have the default that changes nothing.
    """
    if not isinstance(values, dict) or not isinstance(defaults, dict):
        return values
    return defaults | {key: _completed(value, defaults.get(key)) for key, value in values.items()}


def differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """`(key, old value, new value)` of the settings that differ and may not change."""
    for name in sorted({*old, *new}):
        key, before, after = f"{prefix}{name}", old.get(name), new.get(name)
        if key in FREE_KEYS:
            continue
        if isinstance(before, dict) and isinstance(after, dict):
            yield from differences(before, after, f"{key}.")
        elif before != after:
            yield key, before, after
