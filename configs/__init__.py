"""YAML presets and the typed loader that turns them into the dataclasses of each stage."""

from configs.command_line import parse_arguments, run
from configs.loader import check, load_config, save_config, to_dict
from configs.problems import ConfigError, Problem, unknown_key
from configs.sections import Section, TrainingConfig

__all__ = [
    "ConfigError",
    "Problem",
    "Section",
    "TrainingConfig",
    "check",
    "load_config",
    "parse_arguments",
    "run",
    "save_config",
    "to_dict",
    "unknown_key",
]
