"""How good generated images are, by metrics that need no downloaded network:
`python -m pipelines.evaluate CONFIG [--key value ...]`.

Real and generated images take the same path: the image processor's pixels, averaged over areas down to
`feature_size × feature_size` in [-1, 1].
"""

import hashlib
import json
import textwrap
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor
from tqdm.auto import tqdm

from configs import ConfigError, Problem, Section, run
from configs.files import write_json
from configs.sections import NonNegative, NonNegativeFloat, Positive, PositiveFloat
from pipelines.pipeline_vqgan import VQGANPipeline
from stage1_vqgan import (
    DataConfig,
    EncodedImage,
    Images,
    ImageStream,
    SkippedImage,
    UndecodableImage,
    decode,
    image_grid,
    load_images,
    too_many_skipped,
)


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
    classifier_gamma, classifier_c: of the support vector classifier
    max_real_images: at most so many images of each split are used
    grid_columns: samples of a class in samples.png
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
    classifier_gamma: PositiveFloat = 0.02
    classifier_c: PositiveFloat = 10.0
    max_real_images: Positive = 5000
    grid_columns: Positive = 10
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
    share = config.data.max_skipped_fraction
    train, validation = (
        real_images(pipeline, source, config.max_real_images, share) for source in load_images(config.data)
    )
    real_train, real_validation = (area_features(images.pixels, config.feature_size) for images in (train, validation))
    if config.num_components > min(real_train.shape):
        allowed = f"at most {min(real_train.shape)} with these images and this feature_size"
        raise ConfigError([Problem("num_components", f"received {config.num_components}; {allowed}")])
    samples, labels = generate_samples(pipeline, config)
    generated = area_features(samples, config.feature_size)

    metrics = dict[str, Any]()
    if labels is not None and train.labels is not None and validation.labels is not None:
        metrics["class_accuracy"] = class_accuracy(real_train, train.labels, generated, labels, config)
        metrics["class_accuracy_real"] = class_accuracy(
            real_train, train.labels, real_validation, validation.labels, config
        )
    distances = frechet_distances(real_train, real_validation, [generated, real_train], config.num_components)
    metrics["frechet_distance"], metrics["frechet_distance_real"] = distances
    metrics["nearest_neighbour_ratio"] = nearest_distance(generated, real_train) / nearest_distance(
        real_validation, real_train
    )
    metrics |= reconstruction_metrics(pipeline, train.pixels, validation.pixels)
    metrics["num_samples"] = len(samples)
    if train.skipped + validation.skipped:
        metrics["skipped"] = train.skipped + validation.skipped
    metrics["seconds"] = {**seconds, "evaluate": round(time.perf_counter() - started, 1)}
    metrics["inputs"] = inputs

    save_pictures(pipeline, config, samples, validation.pixels)
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


class RealImages(NamedTuple):
    """Real images of a split.

    Attributes:
        pixels: float32 `(N, C, H, W)` in [-1, 1].
        labels: int64 `(N,)`, or None.
        skipped: how many more could not be decoded.
    """

    pixels: Tensor
    labels: np.ndarray | None
    skipped: int


def real_images(pipeline: VQGANPipeline, source: Images, count: int, max_skipped_fraction: float) -> RealImages:
    """At most `count` images of a split: evenly spread over it, of a stream the first ones.

    Raises:
        ConfigError: too many of them cannot be decoded, or all.
    """
    pixels, labels, skipped = [], [], list[SkippedImage]()
    for number, (encoded, label) in enumerate(some_of(source, count)):
        try:
            pixels.append(pipeline.image_processor(decode(encoded))["pixel_values"])
            labels.append(label)
        except UndecodableImage as error:
            skipped.append(SkippedImage(number, encoded.name, str(error)))
    problem = too_many_skipped(skipped, len(pixels) + len(skipped), max_skipped_fraction, "images")
    if problem is not None:
        raise ConfigError([problem], "image data")
    if not pixels:
        raise ConfigError([Problem("data.dataset", f"none of the {len(skipped)} images can be decoded")])
    images = torch.cat(pixels)
    return RealImages(images, np.array(labels, dtype=np.int64) if source.has_labels else None, len(skipped))


def some_of(source: Images, count: int) -> Iterator[tuple[EncodedImage, int | None]]:
    """At most `count` images with their labels."""
    if isinstance(source, ImageStream):
        yield from islice(source.read(), count)
        return
    for number in np.linspace(0, len(source) - 1, min(count, len(source))).astype(int).tolist():
        yield source.encoded([number])[0], None if source.labels is None else int(source.labels[number])


def area_features(pixels: Tensor, size: int) -> np.ndarray:
    """float64 `(N, C · size · size)`: images averaged over areas."""
    return F.interpolate(pixels, size=(size, size), mode="area").flatten(1).double().numpy()


def class_accuracy(
    real: np.ndarray, real_labels: np.ndarray, features: np.ndarray, labels: np.ndarray, config: EvaluationConfig
) -> float:
    """Share of images that a classifier trained on real ones assigns to the class asked for."""
    from sklearn.svm import SVC

    classifier = SVC(gamma=config.classifier_gamma, C=config.classifier_c).fit(real, real_labels)
    return float((classifier.predict(features) == labels).mean())


def frechet_distances(
    fitted_on: np.ndarray, reference: np.ndarray, candidates: Sequence[np.ndarray], num_components: int
) -> list[float]:
    """Frechet distance of Gaussians fitted to principal components: ‖μ₁ - μ₂‖² + tr(Σ₁ + Σ₂ - 2 (Σ₁Σ₂)^½)."""
    from sklearn.decomposition import PCA

    pca = PCA(num_components, svd_solver="full").fit(fitted_on)

    def moments(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        components = pca.transform(features)
        return components.mean(0), np.atleast_2d(np.cov(components, rowvar=False))

    mean, covariance = moments(reference)
    distances = []
    for candidate in candidates:
        other_mean, other_covariance = moments(candidate)
        # the trace of the root is the sum of the roots of the eigenvalues, which are real and not negative
        roots = np.sqrt(np.clip(np.linalg.eigvals(covariance @ other_covariance).real, 0, None))
        trace = np.trace(covariance) + np.trace(other_covariance) - 2 * roots.sum()
        distances.append(float(((mean - other_mean) ** 2).sum() + trace))
    return distances


def nearest_distance(features: np.ndarray, reference: np.ndarray) -> float:
    """Mean Euclidean distance to the nearest row of the reference; near 0 means copies."""
    return float(torch.cdist(torch.from_numpy(features), torch.from_numpy(reference)).amin(1).mean())


@torch.no_grad()
def reconstruction_metrics(pipeline: VQGANPipeline, train: Tensor, validation: Tensor) -> dict[str, float]:
    """Share of the codebook the training images use, and mean absolute error on the validation images."""
    used = torch.zeros(pipeline.layout.num_codes, dtype=torch.bool)
    for batch in tqdm(train.split(256), desc="encoding", unit="batch"):
        used[pipeline.vqgan.encode(batch.to(pipeline.device)).codes.flatten().cpu()] = True
    errors = [
        (pipeline.vqgan(batch.to(pipeline.device)).reconstruction.clamp(-1, 1).cpu() - batch).abs().flatten(1).mean(1)
        for batch in validation.split(256)
    ]
    return {"codebook_usage": used.float().mean().item(), "reconstruction_l1": torch.cat(errors).mean().item()}


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
