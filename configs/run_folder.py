"""A run's folder: the resolved configuration it was started with, and the results that mark it as finished."""

import json
from pathlib import Path
from typing import Any

import yaml

from configs.loader import ConfigError, Problem, save_config, to_dict

CONFIG_NAME = "config.yaml"
RESULTS_NAME = "train_results.json"

# What may change when a run goes on: none of it has an influence on the result.
FREE_KEYS = {
    "output_dir",
    "logging_steps",
    "save_steps",
    "save_total_limit",
    "resume_from_checkpoint",
    "dataloader_num_workers",
    "report_to",
    "push_to_hub",
    "hub_model_id",
    "hub_private_repo",
}


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Writes a file beside and renames it: a file of this name is complete."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(values, indent=2) + "\n")
    partial.replace(path)


def holds_work(folder: str | Path) -> bool:
    """Whether a run's folder holds something to go on from: checkpoints or results."""
    return (Path(folder) / RESULTS_NAME).is_file() or any(Path(folder).glob("checkpoint-*"))


def open_run(config: Any, is_main_process: bool = True) -> dict[str, Any] | None:
    """Opens `config.output_dir` for a run, new or going on.

    A folder with neither checkpoints nor results holds nothing that settings could disagree with: it starts anew.

    Returns:
        The results of the run if it has finished already, else None.

    Raises:
        ConfigError: the folder holds a run that was started with other settings.
    """
    folder = Path(config.output_dir)
    if holds_work(folder) and (folder / CONFIG_NAME).is_file():
        started_with = yaml.safe_load((folder / CONFIG_NAME).read_text())
        differences = list(_differences(started_with, to_dict(config)))
        if differences:
            advice = f"choose another output_dir, or remove {folder} to start over"
            raise ConfigError(
                [Problem(key, f"the run was started with {old!r}, now it is {new!r}") for key, old, new in differences]
                + [Problem("output_dir", advice)],
                f"{folder} holds a run with other settings",
            )
    elif is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        save_config(config, folder / CONFIG_NAME)
    results = folder / RESULTS_NAME
    return json.loads(results.read_text()) if results.is_file() else None


def finish_run(config: Any, results: dict[str, Any]) -> None:
    """Writes the results, which marks the run as finished."""
    write_json(Path(config.output_dir) / RESULTS_NAME, results)


def push_run(config: Any) -> str:
    """Uploads the files of a finished run (the model, its settings and results; no checkpoints or logs) to the Hub.

    Returns:
        Address of the commit.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    repo_id = api.create_repo(config.hub_model_id, private=config.hub_private_repo, exist_ok=True).repo_id
    return str(
        api.upload_folder(repo_id=repo_id, folder_path=config.output_dir, ignore_patterns=["*/*", "*.jsonl", "*.bin"])
    )


def _differences(old: Any, new: Any, prefix: str = "") -> Any:
    for key in sorted({*old, *new}):
        if not prefix and key in FREE_KEYS:
            continue
        before, after = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            yield from _differences(before, after, f"{prefix}{key}.")
        elif before != after:
            yield f"{prefix}{key}", before, after
