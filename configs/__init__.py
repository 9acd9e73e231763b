"""Code that both stages share: presets, the typed loader of configurations, and the tools of a run.

- settings: YAML presets, the loader that turns them into dataclasses, the command line
- runs: the folder of a run, complete checkpoints, one job at a time in a folder, stopping on a signal
- randomness: random numbers from counters, the order of training images
- the Hugging Face Hub: names of repositories, uploads

This package imports no other package of the project.
"""

import configs.ctrl_c  # noqa: F401  # first, so that Ctrl-C while the others are imported is handled
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
