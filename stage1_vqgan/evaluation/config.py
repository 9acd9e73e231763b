"""Settings of an evaluation: the metrics, and the images on which they are measured."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

from configs import Section
from configs.sections import BatchSize, NonNegative, Positive, worker_problems
from stage1_vqgan.data.config import DataConfig
from stage1_vqgan.networks.names import name_problems

INCEPTION = "inception"
PerceptualNetwork = Literal["lpips/vgg", "lpips/alex", "lpips/squeeze", "stlpips/vgg", "stlpips/alex"]


@dataclass(kw_only=True)
class MetricsConfig(Section):
    """Metrics that need a network, beside those of pixels and codes. Each figure carries the name of its network.

    perceptual_networks: networks of the perceptual distance of an image and its reconstruction: "lpips/vgg",
        "lpips/alex", "lpips/squeeze"; shift-tolerant LPIPS, which needs no download: "stlpips/vgg", "stlpips/alex"
    feature_networks: networks of the Frechet distance of all images and all reconstructions: "inception" (rFID),
        "efficientnet-lite0" (needs no download), "torchvision/NAME", "timm/NAME", "transformers/FOLDER_OR_HUB_ID", such
        as a folder of stage1_vqgan.train_features
    """

    perceptual_networks: list[PerceptualNetwork] = field(default_factory=lambda: ["stlpips/alex"])
    feature_networks: list[str] = field(default_factory=lambda: ["efficientnet-lite0"])

    def problems(self) -> Iterable[tuple[str, Any, str]]:
        for name in self.feature_networks:
            for key, value, allowed in name_problems("feature_networks", name) if name != INCEPTION else ():
                yield key, value, f"{allowed}; or {INCEPTION}, for rFID"


@dataclass(kw_only=True)
class TrainingMetricsConfig(MetricsConfig):
    """Measured on the validation images at every evaluation, beside the run's perceptual loss. By default none."""

    perceptual_networks: list[PerceptualNetwork] = field(default_factory=list)
    feature_networks: list[str] = field(default_factory=list)


@dataclass(kw_only=True)
class ReconstructionConfig(Section):
    """Measures how well a tokenizer reconstructs the images of a split.

    model: folder or Hub id of a trained tokenizer
    split: "train" or "validation"
    image_size: measure at another size than that of the tokenizer, in pixels: a number, or [height, width]
    metrics: see below
    output_dir: folder for metrics.json and reconstructions.png; null prints the metrics only
    num_sample_images: images in reconstructions.png
    per_device_eval_batch_size: images on one device in one forward pass
    dataloader_num_workers: processes that decode images; 0 decodes in the main process
    """

    positional = "model"

    model: str
    data: DataConfig
    split: Literal["train", "validation"] = "validation"
    image_size: Positive | list[Positive] | None = None
    metrics: MetricsConfig = field(default_factory=MetricsConfig)
    output_dir: str | None = None
    num_sample_images: Positive = 16
    per_device_eval_batch_size: BatchSize = 64
    dataloader_num_workers: NonNegative = 0

    def problems(self) -> Iterable[tuple[str, Any, str]]:
        yield from worker_problems(self)
