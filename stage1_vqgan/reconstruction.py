"""How well a tokenizer reconstructs images, and how much of its codebook it uses.

Shape letters: B batch, C channels, H W image size, K codebook size.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol, TypeAlias

import torch
from torch import Tensor

from configs import ConfigError, Problem
from stage1_vqgan.data.dataset import ImageBatch
from stage1_vqgan.evaluation.similarity import (
    mean_absolute_error,
    multiscale_structural_similarity,
    peak_signal_to_noise,
    structural_similarity,
)
from stage1_vqgan.modeling_vqgan import VQGANModel

Reduce: TypeAlias = Callable[[Tensor], Tensor]  # sums a tensor over processes
OfImages: TypeAlias = Callable[[Tensor, Tensor], Tensor]  # reconstruction and images `(B, C, H, W)` → `(B,)`

# The metrics of pixels by name. An image for which one is NaN is too small for it.
OF_PIXELS: dict[str, OfImages] = {
    "reconstruction_l1": mean_absolute_error,
    "psnr": peak_signal_to_noise,
    "ssim": structural_similarity,
    "ms_ssim": multiscale_structural_similarity,
}


class Metric(Protocol):
    """A figure about images and their reconstructions."""

    def add(self, reconstruction: Tensor, images: Tensor) -> None:
        """Adds a batch; both `(B, C, H, W)` in [-1, 1]."""

    def figures(self, reduce: Reduce) -> dict[str, float]:
        """The figures over all images of all processes, by name; none if the metric is not defined for them."""


class ImageMean:
    """The mean over images of a function of an image and its reconstruction.

    Args:
        name: name of the figure.
        of: computes the values of the images of a batch.
        device: where the values are added.
    """

    def __init__(self, name: str, of: OfImages, device: torch.device):
        self.name, self.of = name, of
        self.sums = exact([0, 0], device)  # of the values, and of the images

    def add(self, reconstruction: Tensor, images: Tensor) -> None:
        self.sums[0] += self.of(reconstruction, images).to(self.sums).sum()
        self.sums[1] += len(images)

    def figures(self, reduce: Reduce) -> dict[str, float]:
        total, count = reduce(self.sums).tolist()
        mean = total / count
        return {} if math.isnan(mean) else {self.name: mean}


def exact(values: Sequence[float], device: torch.device) -> Tensor:
    """Numbers as float64, which MPS does not have: there they are on the CPU."""
    return torch.tensor(values, dtype=torch.float64, device="cpu" if device.type == "mps" else device)


@torch.no_grad()
def evaluate_reconstruction(
    model: VQGANModel,
    batches: Iterable[ImageBatch],
    reduce: Reduce = lambda total: total,
    others: Sequence[Metric] = (),
) -> dict[str, float]:
    """Reconstruction error and codebook use over a set of images.

    Args:
        model: the tokenizer. Its mode (training or evaluation) is restored afterwards.
        batches: the images, in the batches of a loader.
        reduce: sums a tensor over processes. Each process may have another number of images, or none.
        others: metrics beside those of pixels and codes.

    Returns:
        Means over the images, with reconstructions clamped to [-1, 1]: `reconstruction_l1` (of pixels in [-1, 1]),
        `psnr` (dB), `ssim` (at most 1, for images of at least 11 pixels) and `ms_ssim` (in [0, 1], for images of at
        least 161 pixels); then the figures of `others`. Over all codes: `codebook_usage` in [0, 1] and
        `codebook_perplexity` in [1, K] (the mean over several codebooks); `bits_per_pixel`, what the codes of an image
        need without a prior. Counts: `images`, and `skipped` if some could not be decoded.

    Raises:
        ConfigError: no image can be decoded.
    """
    was_training, device = model.training, model.device
    model.eval()
    counts = torch.zeros(model.quantize.num_entries, dtype=torch.int64, device=device)
    metrics = [*(ImageMean(name, of, device) for name, of in OF_PIXELS.items()), *others]
    seen = skipped = pixels = 0
    for batch in batches:
        skipped += len(batch.skipped)
        if not len(batch.indices):
            continue
        images = batch.images(device)
        out = model(images)
        reconstruction = out.reconstruction.float().clamp(-1, 1)
        for metric in metrics:
            metric.add(reconstruction, images)
        seen += len(images)
        pixels += len(images) * images.shape[2] * images.shape[3]
        entries = model.quantize.entry_numbers(out.codes, out.latents.shape[2:])
        counts += torch.bincount(entries.flatten(), minlength=len(counts))
    model.train(was_training)
    counts = reduce(counts).view(-1, model.config.num_embeddings)
    seen, skipped, pixels = (round(total) for total in reduce(exact([seen, skipped, pixels], device)).tolist())
    if not seen:
        raise ConfigError([Problem("data.dataset", f"none of the {skipped} images can be decoded")])
    figures: dict[str, float] = {}
    for metric in metrics:
        figures |= metric.figures(reduce)
    figures |= {
        "codebook_usage": codebook_usage(counts).item(),
        "codebook_perplexity": codebook_perplexity(counts).item(),
        "bits_per_pixel": int(counts.sum()) * math.log2(model.config.num_embeddings) / pixels,
        "images": seen,
    }
    return figures | ({"skipped": skipped} if skipped else {})


def codebook_perplexity(counts: Tensor) -> Tensor:
    """exp of the entropy of the codes, a scalar in [1, K]; the mean over several codebooks.

    Args:
        counts: `(K,)` or `(codebooks, K)`, how often each entry was used.
    """
    p = counts.float() / counts.sum(-1, keepdim=True).clamp(min=1)
    return torch.exp(-(p * p.clamp(min=1e-10).log()).sum(-1)).mean()


def codebook_usage(counts: Tensor) -> Tensor:
    """Fraction of the entries of all codebooks that were used at least once, a scalar in [0, 1].

    Args:
        counts: `(K,)` or `(codebooks, K)`, how often each entry was used.
    """
    return (counts > 0).float().mean()
