"""What the card of a model says about a training run: facts, settings and a picture of the losses."""

import contextlib
import shutil
from pathlib import Path
from typing import Any

import yaml

from configs.card import FACTS_FOLDER, FACTS_NAME, read_facts
from configs.files import make_folder, read_json, write_json, write_png, write_text
from configs.loss_curves import Panel, draw_curves
from configs.run_folder import CONFIG_NAME, LOG_NAME, RESULTS_NAME
from configs.uploads import public_dataset, without_paths

# Entries of train_results.json that are not results.
NOT_RESULTS = {"global_step", "train_runtime", "hardware", "model_step", "images", "early_stopping_patience"}


def collect_run(run: Path, folder: Path, name: str, panels: list[Panel], pictures: dict[str, str]) -> None:
    """Adds the facts of a run to those of a card. What the run has not recorded is left out.

    Args:
        run: folder of the run.
        folder: folder of the card; its folder `card` gets NAME.yaml, NAME_losses.png, pictures and facts.json.
        name: "tokenizer" or "prior".
        panels: what the picture of the losses shows.
        pictures: the newest file in a folder of the run becomes this picture, as `{folder: file}`.
    """
    target = make_folder(folder / FACTS_FOLDER)
    settings = _settings(run)
    if settings:
        public = {key: value for key, value in without_paths(settings).items() if not key.startswith("hub_")}
        write_text(target / f"{name}.yaml", yaml.safe_dump(public, sort_keys=False))
    facts = read_facts(folder)
    facts.setdefault("runs", {})[name] = _facts(run, settings)
    write_json(target / FACTS_NAME, facts)
    with contextlib.suppress(FileNotFoundError):
        image = draw_curves(run / LOG_NAME, panels)
        if image is not None:
            write_png(target / f"{name}_losses.png", image)
    for source, file in pictures.items():
        if found := sorted((run / source).glob("step_*.png")):
            shutil.copyfile(found[-1], target / file)


def dataset_ids(folder: Path) -> list[str]:
    """Ids on the Hub of the data sets of a card's runs."""
    runs = read_facts(folder).get("runs", {}).values()
    return sorted({run["data"] for run in runs if run.get("on_hub") and run.get("data")})


def run_license(run: Path) -> str | None:
    """The license that the settings of a run name."""
    return _settings(run).get("license")


def _settings(run: Path) -> dict[str, Any]:
    path = run / CONFIG_NAME
    values = yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return values if isinstance(values, dict) else {}


def _results(run: Path) -> dict[str, Any]:
    path = run / RESULTS_NAME
    return read_json(path) if path.is_file() else {}


def _facts(run: Path, settings: dict[str, Any]) -> dict[str, Any]:
    results = _results(run)
    data = settings.get("data") or {}
    batch = settings.get("global_batch_size")
    return {
        **public_dataset(str(data.get("dataset") or "")),
        "steps": results.get("global_step"),
        "batch": batch or settings.get("per_device_train_batch_size"),
        "seconds": results.get("train_runtime"),
        "hardware": results.get("hardware"),
        "results": {key: value for key, value in results.items() if _is_result(key, value)},
    }


def _is_result(key: str, value: Any) -> bool:
    return key not in NOT_RESULTS and isinstance(value, int | float) and not isinstance(value, bool)
