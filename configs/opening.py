"""The first lines of a run: what it trains on, with what, for how long, and where its pictures and logs lie."""

from collections.abc import Mapping
from typing import Any

from configs.run_folder import LOG_NAME


def print_facts(facts: Mapping[str, str]) -> None:
    """Prints facts by name, each in a line."""
    width = max(map(len, facts), default=0)
    for name, text in facts.items():
        first, *others = text.splitlines() or [""]
        print(f"  {name:<{width}}  {first}", *(f"{' ' * (width + 6)}{line}" for line in others), sep="\n", flush=True)


def run_facts(
    config: Any, device: Any, num_processes: int, models: Mapping[str, Any], num_images: int | None, pictures: str
) -> dict[str, str]:
    """Facts about a training run.

    Args:
        config: its `TrainingConfig`.
        device: the device of this process.
        num_processes: number of processes.
        models: the models that are trained, by name; None for one that the run does not have.
        num_images: number of training images or sequences; None if it is unknown.
        pictures: name of the folder of grids; empty if the run draws none.
    """
    batch = config.device_batch_size(num_processes) * config.gradient_accumulation_steps * num_processes
    length = f"{config.max_steps:,} steps of {batch:,}"
    if num_images:
        length += f", {config.max_steps * batch / num_images:.3g} epochs"
    facts = {
        "device": f"{num_processes} × {device}" if num_processes > 1 else str(device),
        "parameters": ", ".join(
            f"{name} {num_trained(model):,}" for name, model in models.items() if model is not None
        ),
        "length": length,
        "pictures": f"{config.output_dir}/{pictures}, every {config.eval_steps:,} steps" if pictures else "none",
        "logs": f"{config.output_dir}/{LOG_NAME}",
    }
    if "tensorboard" in config.report_to:
        facts["logs"] += f", or: tensorboard --logdir {config.output_dir}"
    return facts


def num_trained(model: Any) -> int:
    """Number of parameters that training changes."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
