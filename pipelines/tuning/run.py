"""Chooses the sampling settings of a pipeline: load, search, report, save."""

from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import parse_flag_from_env

from configs import ConfigError, Problem
from configs.files import write_json
from configs.folder_lock import locked_folder
from pipelines import hub
from pipelines.commands import load_pipeline
from pipelines.evaluation.run import LONGEST
from pipelines.model_card import TUNING_NAME
from pipelines.tuning import report
from pipelines.tuning.candidates import Settings, candidates, plain
from pipelines.tuning.config import TuneConfig
from pipelines.tuning.judge import Judge
from pipelines.tuning.search import FINALISTS, KEPT, Round, Search


def tune(config: TuneConfig) -> dict[str, Any]:
    """Searches the best sampling settings, prints what it has tried, and saves the best as defaults of the pipeline.

    Returns:
        What `tuning.json` holds, see `pipelines.tuning.report.facts`.

    Raises:
        ConfigError: the pipeline or the images cannot be read, do not fit each other, or the pipeline is no folder.
    """
    if not config.report_only and not Path(config.pipeline).is_dir():
        advice = "there is no such folder to save the settings in; give a folder, or add --report_only"
        raise ConfigError([Problem("pipeline", f"received {config.pipeline!r}; {advice}")])
    state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"), timeout=LONGEST)
    weights = hub.weights_of(Path(config.pipeline))
    pipeline = load_pipeline(config.pipeline, str(state.device))
    pipeline.set_progress_bar_config(disable=True)
    present = plain(pipeline.sampling_defaults, pipeline.layout)
    tried = candidates(config, pipeline.layout, present)
    with locked_folder(config.folder, "output_dir") if state.is_main_process else nullcontext():
        with state.local_main_process_first():
            judge = Judge(config, pipeline)
        if state.is_main_process:
            print(plan(tried, config.num_samples))
        search = Search(config, judge)
        rounds = search.run(tried)
        winner = search.winner(rounds[-1], present)
        found = report.facts(config, rounds, present, winner)
        if state.is_main_process:
            write_json(Path(config.folder) / TUNING_NAME, found)
            tell(rounds, present, judge.real_accuracy)
            conclude(config, rounds[-1], present, winner, weights)
    return found


def plan(tried: list[Settings], num_samples: int) -> str:
    """What the search will do, in a line."""
    second = 1 + max(FINALISTS, len(tried) // KEPT)
    images = len(tried) * (num_samples // KEPT) + (second + 1 + FINALISTS) * num_samples
    return f"{len(tried)} settings, at most {images:,} images"


def tell(rounds: list[Round], present: Settings, real_accuracy: float | None) -> None:
    """Prints the table of each round."""
    titles = ("first half of the validation images", "first half", "second half, new seeds; change ± standard error")
    for number, (found, title) in enumerate(zip(rounds, titles, strict=True), 1):
        print(f"\nround {number}: {found.count:,} images each, {title}\n{report.table(found, present)}")
    if real_accuracy is not None:
        print(f"class accuracy of real images: {real_accuracy:.4f}")


def conclude(config: TuneConfig, last: Round, present: Settings, winner: Settings, weights: Mapping[str, str]) -> None:
    """Prints the choice, and saves it unless `report_only`.

    Raises:
        ConfigError: the folder holds other weights than those that were searched with.
    """
    stays = winner == present
    if stays:
        print(f"\nno setting is better than the present one beyond the noise; it stays: {report.words(present)}")
    else:
        print(f"\nbest: {report.words(winner)}")
    if config.report_only:
        return
    if hub.weights_of(Path(config.pipeline)) != weights:
        message = f"received {config.pipeline!r}, whose weights were replaced during the search; search again"
        raise ConfigError([Problem("pipeline", message)])
    report.save(config, last, present, winner)
    if not stays:
        print(f"these are now the defaults of {config.pipeline}")
