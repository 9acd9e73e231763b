"""Values that a run decides from its device: `auto` in a configuration."""

import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from configs.run_folder import CONFIG_NAME, holds_work
from configs.sections import LAUNCHED_WITH, SWITCHED_ON, TrainingConfig
from configs.yaml_files import read_yaml

if TYPE_CHECKING:
    import torch

T = TypeVar("T", bound=TrainingConfig)

# Instructions of a CPU that compute in bfloat16, by their names in `torch.cpu.get_capabilities`.
CPU_BFLOAT16 = ("amx_bf16", "avx512_bf16")


def decided(config: T) -> T:
    """The configuration of a run without `auto`.

    A run that is resumed keeps the values that were decided when it started, also on another machine. The others are
    decided from the device. What was decided is printed; config.yaml holds it as a plain value.
    """
    if config.bf16 != "auto":
        return config
    started = _values_of_the_run(Path(config.output_dir))
    if isinstance(started.get("bf16"), bool):
        value, reason = started["bf16"], "as the run was started"
    else:
        device = run_device()
        value, reason = has_bfloat16(device), f"decided from the device, {device_name(device)}"
    if os.environ.get("RANK", "0") == "0":
        print(f"bf16: {str(value).lower()} ({reason})")
    return replace(config, bf16=value)


def run_device() -> "torch.device":
    """The kind of device on which accelerate and Trainer train."""
    import torch

    on_cpu = (os.environ.get("ACCELERATE_USE_CPU") or "").lower() in SWITCHED_ON
    found = None if on_cpu else torch.accelerator.current_accelerator(check_available=True)
    return found or torch.device("cpu")


def has_bfloat16(device: "torch.device") -> bool:
    """Whether bfloat16 makes training faster here: a device that computes in it, or a launch that asks for it."""
    import torch

    if LAUNCHED_WITH["MIXED_PRECISION"] == "bf16":
        return True
    if device.type == "cpu":
        abilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}  # of newer PyTorch
        return any(abilities.get(name, False) for name in CPU_BFLOAT16)
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def device_name(device: "torch.device") -> str:
    """The name of a device, for a message."""
    import torch

    return torch.cuda.get_device_name() if device.type == "cuda" else device.type


def _values_of_the_run(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG_NAME
    return read_yaml(str(path))[0] if holds_work(folder) and path.is_file() else {}
