"""What a search tells: tables, the file tuning.json, the defaults of the pipeline, and its card."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from configs.card import FACTS_FOLDER, write_card
from configs.files import make_folder, write_json
from configs.folder_lock import locked_folder
from configs.uploads import public_dataset
from pipelines import hub
from pipelines.model_card import PLACEHOLDER, TUNING_NAME, model_card
from pipelines.outputs import in_words
from pipelines.tuning.candidates import Settings
from pipelines.tuning.config import TuneConfig
from pipelines.tuning.ranking import Figures, Gain
from pipelines.tuning.search import Round

STANDARD_WORDS = "standard values"


def table(found: Round, present: Settings) -> str:
    """The settings of a round in aligned lines, the best first."""
    lines = [["setting", *named(found.figures[0])]]
    for number, (settings, figures) in enumerate(zip(found.settings, found.figures, strict=True)):
        is_present = settings == present
        change = found.gains[number] if found.gains and not is_present else None
        lines.append([words(settings) + " (present)" * is_present, *cells(figures, change)])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def cells(figures: Figures, change: Gain | None) -> list[str]:
    """The figures of some settings, with their change and its standard error if it is known."""
    texts = [f"{value:.4f}" for value in named(figures).values()]
    if change is not None:
        changes = ((change.distance, change.distance_error), (change.accuracy, change.accuracy_error))
        for column, (value, error) in enumerate(changes[: len(texts)]):
            texts[column] += f" ({value:+.4f} ± {error:.4f})"
    return texts


def words(settings: Settings) -> str:
    """Settings in a line."""
    return in_words(settings) or STANDARD_WORDS


def facts(config: TuneConfig, rounds: list[Round], present: Settings, winner: Settings) -> dict[str, Any]:
    """What tuning.json holds: all that was tried, and what was chosen."""
    return {
        "settings": winner,
        "present": present,
        "seed": config.seed,
        "rounds": [
            {"half": one.half, "num_samples": one.count, "settings": one.settings}
            | {"figures": [asdict(each) for each in one.figures], "gains": [asdict(each) for each in one.gains]}
            for one in rounds
        ],
    }


def save(config: TuneConfig, last: Round, present: Settings, winner: Settings) -> None:
    """Makes the winner the defaults of the pipeline, and shows it in the card.

    If that is interrupted, the next search does what is missing. The card is the last, and is also written if the
    present settings stay. It shows facts only of the defaults that the pipeline has.

    Raises:
        ConfigError: another process writes into the pipeline's folder.
    """
    folder = Path(config.pipeline)
    with locked_folder(folder, "pipeline"):
        if winner != present:
            write_json(make_folder(folder / FACTS_FOLDER) / TUNING_NAME, card_facts(config, last, present, winner))
            hub.save_defaults(folder, winner)
        write_card(folder, lambda license: model_card(folder, PLACEHOLDER, license))


def card_facts(config: TuneConfig, last: Round, present: Settings, winner: Settings) -> dict[str, Any]:
    """What the card shows: the figures before and after, by images that did not choose the settings."""
    shown = {"setting before": present, "setting now": winner}
    table = [{"setting": f"{name[8:]}: {words(one)}"} | named(figures_of(last, one)) for name, one in shown.items()]
    figures = list(named(last.figures[0]))
    return {"settings": winner, "num_samples": last.count, "figures": figures, "rows": table} | public_dataset(
        config.data.dataset
    )


def figures_of(found: Round, settings: Settings) -> Figures:
    """The figures of some settings of a round."""
    return found.figures[found.settings.index(settings)]


def named(figures: Figures) -> dict[str, float]:
    """Figures by the names that an evaluation gives them."""
    values = {"frechet_distance": figures.distance, "class_accuracy": figures.accuracy}
    return {name: value for name, value in values.items() if value is not None}
