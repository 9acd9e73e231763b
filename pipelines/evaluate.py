"""How good generated images are, by metrics that need no downloaded network:
`python -m pipelines.evaluate CONFIG [--key value ...]`.

Real and generated images take the same path: the image processor's pixels, averaged over areas down to
`feature_size × feature_size` in [-1, 1].
"""

import hashlib
import json
import textwrap
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor
from tqdm.auto import tqdm

from configs import ConfigError, Problem, Section, run
from configs.files import write_json
from configs.sections import NonNegative, NonNegativeFloat, Positive, PositiveFloat
from pipelines.classifiers import Classifier, ClassifierType, ResNetClassifier, SupportVectorClassifier, class_metrics
from pipelines.metrics import area_features, frechet_distances, nearest_distance
from pipelines.pipeline_vqgan import VQGANPipeline
from pipelines.real_images import RealImages, read_real_images
from stage1_vqgan import DataConfig, image_grid, load_images
from stage1_vqgan.reconstruction import evaluate_reconstruction


@dataclass(kw_only=True)
class EvaluationConfig(Section):
    """Evaluates a pipeline against real images.

    pipeline: folder or Hub id
    data: the real images: its training split fits classifier and components, its validation split is compared with
    output_dir: gets metrics.json, samples.png and reconstructions.png
    samples_per_class: images generated of each class (in all, for an unconditional pipeline)
    guidance_scale, seed: of the generation
    feature_size: side of the averaged images that are compared
    num_components: principal components of the Frechet distance
    classifier: "svc", a support vector classifier of the averaged images, or "resnet", which colour photos need
    classifier_gamma, classifier_c: of "svc"
    classifier_epochs: of "resnet"; it sees mirrored images if data.augmentation.horizontal_flip
    max_real_images: at most so many images of each split are used
    grid_columns: samples of a class in samples.png
    dataloader_num_workers: processes that decode the real images; 0 decodes in this one
    tokenizer_run, code_store, prior_run: folders whose recorded durations are put beside the metrics
    """

    pipeline: str
    data: DataConfig
    output_dir: str
    samples_per_class: Positive = 50
    guidance_scale: NonNegativeFloat = 1.5
    seed: NonNegative = 0
    feature_size: Positive = 8
    num_components: Positive = 24
    classifier: ClassifierType = "svc"
    classifier_gamma: PositiveFloat = 0.02
    classifier_c: PositiveFloat = 10.0
    classifier_epochs: Positive = 15
    max_real_images: Positive = 5000
    grid_columns: Positive = 10
    dataloader_num_workers: NonNegative = 0
    tokenizer_run: str | None = None
    code_store: str | None = None
    prior_run: str | None = None


def evaluate(config: EvaluationConfig) -> dict[str, Any]:
    """Evaluates a pipeline, writes metrics and pictures, and prints the metrics.

    The same pipeline with the same settings is not evaluated twice: the metrics that are there are printed again.
    """
    folder = Path(config.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        pipeline = VQGANPipeline.from_pretrained(config.pipeline, device=device)
    except (OSError, ValueError, SafetensorError) as error:
        reason = textwrap.shorten(str(error).strip().partition("\n")[0], 180, placeholder=" …")
        raise ConfigError([Problem("pipeline", f"received {config.pipeline!r}; {reason}")]) from error
    seconds = recorded_seconds(config)
    inputs = {"weights": weights_hash(pipeline), **asdict(config)}
    path = folder / "metrics.json"
    if all((folder / name).is_file() for name in ("metrics.json", "samples.png", "reconstructions.png")):
        metrics = json.loads(path.read_text())
        if metrics["inputs"] == inputs:
            return show(metrics)

    started = time.perf_counter()
    train, validation = (
        read_real_images(
            source,
            pipeline.image_processor,
            config.max_real_images,
            config.data.max_skipped_fraction,
            config.dataloader_num_workers,
        )
        for source in load_images(config.data)
    )
    train_pixels, validation_pixels = train.pixels(), validation.pixels()
    real_train, real_validation = (
        area_features(pixels, config.feature_size) for pixels in (train_pixels, validation_pixels)
    )
    if config.num_components > min(real_train.shape):
        allowed = f"at most {min(real_train.shape)} with these images and this feature_size"
        raise ConfigError([Problem("num_components", f"received {config.num_components}; {allowed}")])
    samples, labels = generate_samples(pipeline, config)
    generated = area_features(samples, config.feature_size)

    metrics = dict[str, Any]()
    if labels is not None and train.labels is not None and validation.labels is not None:
        metrics |= class_metrics(
            lambda: new_classifier(config, pipeline.device),
            (train_pixels, train.labels),
            (validation_pixels, validation.labels),
            (samples, labels),
        )
    distances = frechet_distances(real_train, real_validation, [generated, real_train], config.num_components)
    metrics["frechet_distance"], metrics["frechet_distance_real"] = distances
    metrics["nearest_neighbour_ratio"] = nearest_distance(generated, real_train) / nearest_distance(
        real_validation, real_train
    )
    metrics |= reconstruction_metrics(pipeline, train, validation)
    metrics["num_samples"] = len(samples)
    if train.skipped + validation.skipped:
        metrics["skipped"] = train.skipped + validation.skipped
    metrics["seconds"] = {**seconds, "evaluate": round(time.perf_counter() - started, 1)}
    metrics["inputs"] = inputs

    save_pictures(pipeline, config, samples, validation_pixels)
    write_json(path, metrics)
    return show(metrics)


def show(metrics: dict[str, Any]) -> dict[str, Any]:
    """Prints the metrics, without what they were made from, and returns them."""
    print(json.dumps({name: value for name, value in metrics.items() if name != "inputs"}, indent=2))
    return metrics


def generate_samples(pipeline: VQGANPipeline, config: EvaluationConfig) -> tuple[Tensor, np.ndarray | None]:
    """Pixels float32 `(N, C, H, W)` in [-1, 1], and the classes asked for `(N,)` (None if unconditional)."""
    generator = torch.Generator().manual_seed(config.seed)
    classes = range(len(pipeline.class_names))
    if not classes:
        out = pipeline.generate(num_images=config.samples_per_class, generator=generator, output_type="pt")
        return out.images.cpu() * 2 - 1, None
    out = pipeline.generate(
        class_labels=list(classes),
        num_images_per_label=config.samples_per_class,
        guidance_scale=config.guidance_scale,
        generator=generator,
        output_type="pt",
    )
    return out.images.cpu() * 2 - 1, np.repeat(classes, config.samples_per_class)


def new_classifier(config: EvaluationConfig, device: torch.device) -> Classifier:
    """The classifier of the configuration, untrained."""
    if config.classifier == "svc":
        return SupportVectorClassifier(config.feature_size, config.classifier_gamma, config.classifier_c)
    flips = config.data.augmentation.horizontal_flip
    return ResNetClassifier(config.classifier_epochs, flips, config.seed, device)


@torch.no_grad()
def reconstruction_metrics(pipeline: VQGANPipeline, train: RealImages, validation: RealImages) -> dict[str, float]:
    """Share of the codebook the training images use, and how near the validation images come back."""
    used = torch.zeros(pipeline.layout.num_codes, dtype=torch.bool)
    for batch in tqdm(train.batches, desc="encoding", unit="batch"):
        used[pipeline.vqgan.encode(batch.images(pipeline.device)).codes.flatten().cpu()] = True
    errors = evaluate_reconstruction(pipeline.vqgan, validation.batches)
    return {
        "codebook_usage": used.float().mean().item(),
        **{name: errors[name] for name in ("reconstruction_l1", "psnr", "ssim") if name in errors},
    }


def save_pictures(pipeline: VQGANPipeline, config: EvaluationConfig, samples: Tensor, validation: Tensor) -> None:
    """samples.png: a row for each class; reconstructions.png: originals above their reconstructions."""
    folder = Path(config.output_dir)
    columns = min(config.grid_columns, config.samples_per_class)
    rows = samples.view(-1, config.samples_per_class, *samples.shape[1:])[:20, :columns].flatten(0, 1)
    image_grid(pipeline.image_processor.postprocess(rows), columns, min_tile=48).save(folder / "samples.png")
    shown = validation[:: max(1, len(validation) // 16)][:16]
    with torch.no_grad():
        pair = torch.cat([shown, pipeline.vqgan(shown.to(pipeline.device)).reconstruction.cpu()])
    grid = image_grid(pipeline.image_processor.postprocess(pair), len(shown), min_tile=48)
    grid.save(folder / "reconstructions.png")


def weights_hash(pipeline: VQGANPipeline) -> str:
    """Identifies the weights of both models."""
    digest = hashlib.sha256()
    for model in (pipeline.vqgan, pipeline.prior):
        for name, tensor in sorted(model.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def recorded_seconds(config: EvaluationConfig) -> dict[str, float]:
    """Durations the steps have written down themselves."""
    places = {
        "stage1": (config.tokenizer_run, "train_results.json", "train_runtime"),
        "tokenize": (config.code_store, "manifest.json", "seconds"),
        "stage2": (config.prior_run, "train_results.json", "train_runtime"),
    }
    named = {step: (Path(folder) / file, key) for step, (folder, file, key) in places.items() if folder is not None}
    missing = [
        Problem("", f"{path} is not there: that step has not finished")
        for path, _ in named.values()
        if not path.is_file()
    ]
    if missing:
        raise ConfigError(missing, "recorded durations")
    return {step: json.loads(path.read_text())[key] for step, (path, key) in named.items()}


if __name__ == "__main__":
    run(EvaluationConfig, evaluate, "python -m pipelines.evaluate")
