"""The search: many settings with few images, the best of them with more, and the best few once more for certain.

Source: successive halving, Jamieson and Talwalkar 2016, "Non-stochastic best arm identification".
"""

import hashlib
import json
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from tqdm.auto import tqdm

from configs.files import make_folder, replacing
from pipelines.evaluation.config import ComparisonConfig
from pipelines.tuning.candidates import Settings
from pipelines.tuning.config import TuneConfig
from pipelines.tuning.judge import Judge, Sample, gaussian
from pipelines.tuning.ranking import Figures, Gain, gain, is_better, noise_of, ranked

KEPT = 4  # a quarter of the settings reaches the second round, which makes four times as many images of each
FINALISTS = 3


@dataclass(frozen=True)
class Round:
    """What a round has found, the best settings first.

    Attributes:
        half: the half of the validation images, 0 or 1.
        count: images of each setting.
        settings, figures: of all settings.
        gains: of the last round, what each changes compared with the present settings.
    """

    half: int
    count: int
    settings: list[Settings]
    figures: list[Figures]
    gains: list[Gain]


class Search:
    """Tries settings and keeps their samples in files, so that no settings are tried twice.

    Several processes share the settings of a round, and read the samples of each other.

    Args:
        config: settings of the search.
        judge: generates and compares images.
    """

    def __init__(self, config: TuneConfig, judge: Judge):
        self.config, self.judge, self.state = config, judge, PartialState()
        self.folder = make_folder(Path(config.folder) / "tried")

    def run(self, candidates: Sequence[Settings]) -> list[Round]:
        """The three rounds. The first of the candidates are the present settings, which every round tries again."""
        present, count = candidates[0], self.config.num_samples
        first = self.round(candidates, 0, max(2, count // KEPT), "1 of 3")
        chosen = [one for one in first.settings if one != present][: max(FINALISTS, len(candidates) // KEPT)]
        second = self.round([present, *chosen], 0, count, "2 of 3")
        chosen = [one for one in second.settings if one != present][:FINALISTS]
        return [first, second, self.round([present, *chosen], 1, count, "3 of 3")]

    def round(self, settings: Sequence[Settings], half: int, count: int, name: str) -> Round:
        """Tries settings, the present ones first. The other half of the validation images comes with new seeds."""
        samples = self.samples(settings, half, count, name)
        real = self.judge.real[half]
        figures = [Figures.of(sample, gaussian(real)) for sample in samples]
        noise = noise_of(samples[0], gaussian(real))
        order = ranked(figures, noise, count, self.judge.real_accuracy)
        order = broadcast_object_list([order])[0]  # no two GPUs train the same classifier
        gains = [Gain(0, 0, 0, 0), *(gain(sample, samples[0], real) for sample in samples[1:])] if half else []
        return Round(
            *(half, count, [settings[number] for number in order], [figures[number] for number in order]),
            [gains[number] for number in order] if half else [],
        )

    def samples(self, settings: Sequence[Settings], half: int, count: int, name: str) -> list[Sample]:
        """The samples of some settings, from files or new.

        Raises:
            FileNotFoundError: the file of another process is missing.
        """
        seed = self.config.seed + half
        paths = [self.path(one, half, count, seed) for one in settings]
        own = range(self.state.process_index, len(settings), self.state.num_processes)
        bar = tqdm(
            own, desc=f"round {name}: {count:,} images each", unit="setting", disable=not self.state.is_main_process
        )
        for number in bar:
            if read_sample(paths[number]) is None:
                write_sample(paths[number], self.judge.sample(settings[number], half, count, seed))
        self.state.wait_for_everyone()
        return [sample_of_any_process(path) for path in paths]

    def path(self, settings: Settings, half: int, count: int, seed: int) -> Path:
        """The file of the sample of some settings."""
        measure = {key.name: getattr(self.config, key.name) for key in fields(ComparisonConfig) if key.name != "data"}
        text = json.dumps([self.judge.inputs, measure, settings, half, count, seed], sort_keys=True, default=repr)
        return self.folder / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.npz"

    def winner(self, last: Round, present: Settings) -> Settings:
        """The best settings of the last round that are better than the present ones; else the present ones."""
        now = last.figures[last.settings.index(present)]
        for settings, change in zip(last.settings, last.gains, strict=True):
            if is_better(change, now, self.judge.real_accuracy):
                return settings
        return present


def write_sample(path: Path, sample: Sample) -> None:
    """Writes a sample atomically."""
    with replacing(path) as file:
        np.savez(file, components=sample.components, right=sample.right)


def sample_of_any_process(path: Path) -> Sample:
    """The sample of a file that this or another process has written.

    Raises:
        FileNotFoundError: it is missing.
    """
    found = read_sample(path)
    if found is None:
        reason = "another process wrote no sample that can be read here; output_dir must be on a disk that all share"
        raise FileNotFoundError(f"{path}: {reason}")
    return found


def read_sample(path: Path) -> Sample | None:
    """A sample of a file; None if it is missing or damaged."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return Sample(arrays["components"], arrays["right"])
    except (FileNotFoundError, KeyError, ValueError, EOFError, zipfile.BadZipFile):
        return None
