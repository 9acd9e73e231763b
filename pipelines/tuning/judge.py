"""Generates images with given settings, and compares them with one half of the validation images.

Shape letters: N generated images, M real ones, P prompt length, D principal components.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, reduce
from typing import Any

import numpy as np
import torch
from sklearn.decomposition import PCA
from torch import Tensor

from configs import ConfigError, Problem
from configs.names import one_form
from configs.problems import listed
from configs.randomness import draw_seeds
from pipelines.defaults import options_of, resolved
from pipelines.evaluation.classifiers import Classifier, accuracy, new_classifier
from pipelines.evaluation.conditions import load_splits, real_labels
from pipelines.evaluation.metrics import area_features
from pipelines.evaluation.prompts import open_store
from pipelines.evaluation.real_images import RealImages, read_real_images
from pipelines.pipeline_vqgan import VQGANPipeline
from pipelines.tuning.candidates import Settings
from pipelines.tuning.config import TuneConfig
from stage1_vqgan import require_range
from stage1_vqgan.evaluation.frechet import Gaussian, Moments, fitted
from stage2_prior.data import CodeDataset


@dataclass(frozen=True)
class Sample:
    """What is kept of the images of some settings.

    Attributes:
        components: principal components of the features, float32 `(N, D)`.
        right: whether a classifier gives an image the classes that were asked for, bool `(N,)`; empty without classes.
    """

    components: np.ndarray
    right: np.ndarray

    @property
    def accuracy(self) -> float | None:
        """The class accuracy; None without classes."""
        return float(self.right.mean()) if len(self.right) else None

    def rows(self, numbers: np.ndarray) -> "Sample":
        """Some images, which may repeat."""
        return Sample(self.components[numbers], self.right[numbers] if len(self.right) else self.right)


class Judge:
    """Compares generated images with real ones. Image i of all settings has the same prompt and seed.

    Args:
        config: settings of the search.
        pipeline: the pipeline.

    Raises:
        ConfigError: the real images cannot be read, are too few, or have other classes than the prior.
    """

    def __init__(self, config: TuneConfig, pipeline: VQGANPipeline):
        self.config, self.pipeline, self.layout = config, pipeline, pipeline.layout
        require_range(config.data, pipeline.image_processor.values, config.pipeline)
        if config.code_store is not None:
            open_store(config, self.layout)
        sources = load_splits(config.data, pipeline)
        self.train, self.validation = (self._read(source) for source in sources)
        self._num_images = sources[1].num_images
        if self.layout.num_classes and self.train.labels is not None:
            self._require_same_classes(sources[0].class_names or [])
        self._require_enough()
        features = area_features(self.train.pixels(), config.feature_size)
        self._pca = PCA(config.num_components, svd_solver="full").fit(features)
        self.real = [self._components(self.validation.pixels()[half::2]) for half in (0, 1)]

    # ------------------------------------------------------------------ real images

    def _read(self, source: Any) -> RealImages:
        most = self.config.data.max_skipped_fraction
        processor, workers = self.pipeline.image_processor, self.config.dataloader_num_workers
        return read_real_images(source, processor, self.config.max_real_images, most, workers)

    def _require_same_classes(self, names: Sequence[str]) -> None:
        own, found = self.layout.class_names, tuple(map(one_form, names))
        labels = [one.labels for one in (self.train, self.validation) if one.labels is not None]
        last = max(int(one.max()) for one in labels)
        if found and found != own:
            wrong = f"has the classes {listed(found, 8)}, but the prior has {listed(own, 8)}"
        elif last >= len(own):
            wrong = f"has labels up to {last}, but the prior has {len(own)} classes"
        else:
            return
        message = f"received {self.config.data.dataset!r}, which {wrong}"
        advice = "give the data of the training, or data.use_labels false"
        raise ConfigError([Problem("data.dataset", f"{message}; {advice}")])

    def _require_enough(self) -> None:
        count, least = len(self.validation), 2 * (self.config.num_components + 1)
        most = min(len(self.train), self.pipeline.image_processor.num_channels * self.config.feature_size**2)
        if self.config.num_components > most:
            allowed = f"at most {most} with these images and this feature_size"
            raise ConfigError([Problem("num_components", f"received {self.config.num_components}; {allowed}")])
        if count < least:
            needs = f"needs {least} validation images, of which there are {count}; take fewer, or hold out more images"
            raise ConfigError([Problem("num_components", f"received {self.config.num_components}, which {needs}")])

    @cached_property
    def inputs(self) -> str:
        """A hash of the real images, weights and prompts, by which samples of other ones are not taken for theirs."""
        from pipelines.evaluation.report import weights_hash

        digest = hashlib.sha256(weights_hash(self.pipeline).encode())
        digest.update(
            bytes([self.config.data.augmentation.horizontal_flip])
        )  # the classifiers "cnn" and "resnet" mirror too
        for images in (self.train, self.validation):
            digest.update(images.pixels().numpy().tobytes())
            digest.update(b"" if images.labels is None else images.labels.tobytes())
        if self.layout.segments:
            dataset, rows = self._stored
            digest.update(b"".join(dataset.read(half)[2].tobytes() for half in rows))
        return digest.hexdigest()

    @cached_property
    def _classifiers(self) -> dict[str, tuple[Classifier, float]]:
        """For each condition with classes, a classifier of real images and its accuracy on the validation images."""
        found = {}
        real = real_labels(self.config, self.layout, self.train, self.validation)
        for name, (train, validation) in sorted(real.items()):
            if name in self.layout.places and len(np.unique(train)) > 1:
                classifier = new_classifier(self.config, self.pipeline.device)
                classifier.fit(self.train.pixels(), train)
                found[name] = classifier, accuracy(classifier, self.validation.pixels(), validation)
        return found

    @property
    def real_accuracy(self) -> float | None:
        """The share of the validation images whose classes the classifiers recognise; None without classes."""
        values = [value for _, value in self._classifiers.values()]
        return float(np.prod(values)) if values else None

    # ------------------------------------------------------------------ generated images

    @torch.no_grad()
    def sample(self, settings: Settings, half: int, count: int, seed: int) -> Sample:
        """Generates `count` images with the prompts of one half of the validation images.

        Raises:
            ConfigError: the code store is missing or another one.
        """
        prompts, parts, right, start = self._prompts(half, count), [], [], 0
        for pixels in self._images(settings, prompts, seed):
            parts.append(self._components(pixels))
            right.append(self._right(pixels, prompts[start : start + len(pixels)]))
            start += len(pixels)
        return Sample(np.concatenate(parts), np.concatenate(right))

    def _images(self, settings: Settings, prompts: Tensor, seed: int) -> Iterator[Tensor]:
        """Pixels float32 `(n, C, H, W)` in [-1, 1] on the CPU, in batches."""
        values = resolved(settings, {}, [one.name for one in self.layout.conditions])
        options, groups, unmasking = options_of(self.layout, values)
        seeds = seeds_of(seed, len(prompts))
        for codes in self.pipeline._sampled(prompts, seeds, options, None, None, None, groups, unmasking):
            for images in self.pipeline._decoded(codes, "pt"):
                yield images.float().cpu() * 2 - 1

    def _prompts(self, half: int, count: int) -> Tensor:
        """Prompts int64 `(count, P)` of the images of one half, spread evenly; few images occur several times."""
        layout = self.layout
        if layout.segments:
            dataset, rows = self._stored[0], self._stored[1][half]
            return torch.from_numpy(dataset.read(rows[spread(len(rows), count)])[2])
        prompts = layout.null_prompt().repeat(count, 1)
        if layout.num_classes:
            real = self.validation.labels
            labels = np.arange(layout.num_classes) if real is None else real[half::2]
            prompts[:, 0] = layout.class_tokens(torch.from_numpy(labels[spread(len(labels), count)]))
        return prompts

    @cached_property
    def _stored(self) -> tuple[CodeDataset, list[np.ndarray]]:
        """The validation images in the code store, and the rows there of the images of each half, int64.

        Raises:
            ConfigError: the code store is missing, or it is that of other images or of another prior.
        """
        store = open_store(self.config, self.layout)
        summary = store.manifest["splits"]["validation"]
        skipped = np.array(sorted(image["image"] for image in summary["skipped"]), np.int64)
        if self._num_images not in (None, summary["images"]):
            given = f"received {self.config.code_store!r}, made of {summary['images']:,} validation images"
            advice = f"data.dataset has {self._num_images:,}; give the data that the store was made of"
            raise ConfigError([Problem("code_store", f"{given}; {advice}")])
        numbers = [np.setdiff1d(self.validation.numbers[half::2], skipped) for half in (0, 1)]
        dataset = CodeDataset(store.split("validation"), self.layout)
        return dataset, [some - np.searchsorted(skipped, some) for some in numbers]

    def _components(self, pixels: Tensor) -> np.ndarray:
        return self._pca.transform(area_features(pixels, self.config.feature_size)).astype(np.float32)

    def _right(self, pixels: Tensor, prompts: Tensor) -> np.ndarray:
        places, first = self.layout.places, self.layout.first_tokens
        right = [
            classifier.predict(pixels) == (prompts[:, places[name]] - first[name])[:, 0].numpy()
            for name, (classifier, _) in self._classifiers.items()
        ]
        return reduce(np.logical_and, right) if right else np.empty(0, bool)


def gaussian(components: np.ndarray) -> Gaussian:
    """The Gaussian that is fitted to components `(N, D)`."""
    moments = Moments(components.shape[1])
    moments.add(torch.from_numpy(components))
    return fitted(moments.sums)


def spread(length: int, count: int) -> np.ndarray:
    """`count` numbers below `length` in rising order, spread evenly."""
    return np.arange(count) * length // count


def seeds_of(seed: int, count: int) -> Tensor:
    """Seeds of `count` images, int64 `(count,)`; the first ones of more."""
    return draw_seeds(count, torch.Generator().manual_seed(seed))
