"""Causal and masked priors of the same classes compared: `python -m benchmarks.families EVALUATION PIPELINE...`.

EVALUATION is a YAML file or preset of `pipelines.evaluate`; it names the images, the classifier and the number of
samples. Each pipeline is measured as that command does, the masked ones with each of `--steps` and `--orders`. Each row
also has the images per second of one request of 64 images, decoding included: the best of three.
"""

import argparse
import time
from dataclasses import replace
from typing import Any

import numpy as np
from torch import Tensor

from benchmarks.machine import environment
from benchmarks.report import table, write
from configs import load_config
from pipelines import VQGANPipeline
from pipelines.commands import load_pipeline
from pipelines.evaluation.classifiers import accuracy, new_classifier
from pipelines.evaluation.config import EvaluationConfig
from pipelines.evaluation.generated import generate_samples
from pipelines.evaluation.metrics import area_features, frechet_distances
from pipelines.evaluation.run import read_splits
from stage2_prior import CLASS


class Real:
    """What the generated images of all rows are compared with."""

    def __init__(self, config: EvaluationConfig, pipe: VQGANPipeline) -> None:
        self.config, self.device = config, pipe.device
        self.kind = (pipe.class_names, pipe.layout.image_shape)
        self.train, self.validation = read_splits(config, pipe)
        self.features = [area_features(split.pixels(), config.feature_size) for split in (self.train, self.validation)]
        if self.train.labels is None or self.validation.labels is None:
            raise SystemExit(f"{config.data.dataset}: these images have no classes")
        self.labels = self.validation.labels
        self.judge = new_classifier(config, pipe.device).fit(self.train.pixels(), self.train.labels)

    def require(self, folder: str, pipe: VQGANPipeline) -> None:
        """Refuses a pipeline without classes, or of other classes or another size than the first one."""
        if not pipe.class_names:
            raise SystemExit(f"{folder}: this pipeline has no classes")
        if (pipe.class_names, pipe.layout.image_shape) != self.kind:
            raise SystemExit(f"{folder}: has other classes, or images of another size, than the first pipeline")

    def metrics(self, samples: Tensor, labels: np.ndarray) -> dict[str, float]:
        """Class accuracy, classification accuracy score and Frechet distance of generated images."""
        train, validation = self.features
        generated = area_features(samples, self.config.feature_size)
        taught = new_classifier(self.config, self.device).fit(samples, labels)
        return {
            "accuracy": accuracy(self.judge, samples, labels),
            "accuracy score": accuracy(taught, self.validation.pixels(), self.labels),
            "distance": frechet_distances(train, validation, [generated], self.config.num_components)[0],
        }


def images_per_second(pipe: VQGANPipeline, config: EvaluationConfig) -> float:
    """Of a request of 64 images with guidance."""
    labels = [pipe.class_names[n % len(pipe.class_names)] for n in range(64)]
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        pipe.generate({CLASS: labels}, guidance_scale=config.guidance_scale, seed=0, **config.unmasking)
        seconds.append(time.perf_counter() - start)
    return 64 / min(seconds)


def variants(pipe: VQGANPipeline, config: EvaluationConfig, args: argparse.Namespace) -> list[EvaluationConfig]:
    """The settings to measure a pipeline with."""
    if pipe.layout.family == "causal":
        return [replace(config, num_steps=None, order=None, order_temperature=None)]
    return [
        replace(config, num_steps=steps, order=order, order_temperature=noise if order == "confidence" else None)
        for steps in args.steps
        for order in args.orders
        for noise in (args.order_temperatures if order == "confidence" else [None])
    ]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.families", description=__doc__)
    parser.add_argument("evaluation", help="YAML file or preset of pipelines.evaluate")
    parser.add_argument("pipelines", nargs="+", help="folders of pipelines")
    parser.add_argument("--guidance_scales", type=float, nargs="+", default=[1.5])
    parser.add_argument("--steps", type=int, nargs="+", default=[4, 8, 16, 32, 64])
    parser.add_argument("--orders", nargs="+", choices=["confidence", "halton"], default=["confidence", "halton"])
    parser.add_argument("--order_temperatures", type=float, nargs="+", default=[4.5])
    parser.add_argument("--output", default="runs/benchmarks/families.json")
    args = parser.parse_args()
    base = load_config(EvaluationConfig, args.evaluation)
    rows: list[dict[str, Any]] = []
    real: Real | None = None
    for folder in args.pipelines:
        pipe = load_pipeline(folder)
        pipe.set_progress_bar_config(disable=True)
        real = Real(base, pipe) if real is None else real
        real.require(folder, pipe)
        for scale in args.guidance_scales:
            for config in variants(pipe, replace(base, pipeline=folder, guidance_scale=scale), args):
                samples, labels = generate_samples(config, pipe)
                found = real.metrics(samples, labels[CLASS])
                row: dict[str, Any] = {"prior": folder, "guidance": scale}
                row |= {"steps": config.num_steps or pipe.layout.length, "order": config.order or "raster"}
                row |= {"noise": config.order_temperature if config.order == "confidence" else "-"}
                row |= {name: round(value, 4) for name, value in found.items()}
                rows.append(row | {"images/s": round(images_per_second(pipe, config), 2)})
                print(rows[-1], flush=True)
    print(table(rows))
    write(args.output, {"environment": environment(), "settings": str(vars(args)), "rows": rows})


if __name__ == "__main__":
    main()
