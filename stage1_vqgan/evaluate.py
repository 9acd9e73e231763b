"""How well a tokenizer reconstructs: run as `python -m stage1_vqgan.evaluate --model DIR --data.dataset NAME`."""

import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm

from configs import ConfigError, Problem, Section, run
from configs.sections import NonNegative, Positive
from stage1_vqgan.data.config import DataConfig
from stage1_vqgan.data.dataset import ImageBatch, ImageDataset
from stage1_vqgan.data.loading import evaluation_loader
from stage1_vqgan.data.skipped import SkippedImages
from stage1_vqgan.data.sources import load_images
from stage1_vqgan.modeling_vqgan import VQGANModel
from stage1_vqgan.pretrained import load_tokenizer
from stage1_vqgan.training.codebook import perplexity, usage


@dataclass(kw_only=True)
class EvaluationConfig(Section):
    """Reconstruction metrics of a tokenizer over every image of a split.

    model: folder or Hub id of a trained tokenizer
    split: "train" or "validation"
    """

    model: str
    data: DataConfig
    split: Literal["train", "validation"] = "validation"
    per_device_eval_batch_size: Positive = 64
    dataloader_num_workers: NonNegative = 0


# Side of the window whose statistics SSIM compares; images that are smaller have none.
SSIM_WINDOW = 11


@torch.no_grad()
def evaluate_reconstruction(
    model: VQGANModel, batches: Iterable[ImageBatch], reduce: Callable[[Tensor], Tensor] = lambda total: total
) -> dict[str, float]:
    """Reconstruction error and codebook use over a set of images.

    Args:
        model: the tokenizer; its mode is restored afterwards.
        batches: of a loader.
        reduce: sums a tensor over processes.

    Returns:
        `reconstruction_l1` (pixels in [-1, 1]), `psnr` (dB) and, of images of 11 pixels and more, `ssim` (at most 1),
        means over images of clamped reconstructions,
        `codebook_usage` in [0, 1], `codebook_perplexity` in [1, K], `images`; `skipped` if some could not be decoded.

    Raises:
        ConfigError: there is no image that can be decoded.
    """
    was_training = model.training
    model.eval()
    counts = torch.zeros(model.config.num_embeddings, dtype=torch.int64, device=model.device)
    precision = torch.float32 if model.device.type == "mps" else torch.float64
    totals = torch.zeros(5, dtype=precision, device=model.device)
    for batch in batches:
        totals[4] += len(batch.skipped)
        if not len(batch.indices):
            continue
        images = batch.images(model.device)
        out = model(images)
        reconstruction = out.reconstruction.float().clamp(-1, 1)
        absolute = F.l1_loss(reconstruction, images, reduction="none").flatten(1).mean(1)
        squared = F.mse_loss(reconstruction, images, reduction="none").flatten(1).mean(1)
        psnr = 10 * torch.log10(4 / squared.clamp(min=1e-10))
        similarity = structural_similarity(reconstruction, images)
        totals[:3] += torch.stack([absolute.sum(), psnr.sum(), similarity.sum()]).to(precision)
        totals[3] += len(images)
        counts += torch.bincount(out.codes.flatten(), minlength=len(counts))
    model.train(was_training)
    counts, totals = reduce(counts), reduce(totals)
    count, skipped = int(totals[3]), int(totals[4])
    if not count:
        raise ConfigError([Problem("data.dataset", f"none of the {skipped} images can be decoded")])
    metrics = {
        "reconstruction_l1": totals[0].item() / count,
        "psnr": totals[1].item() / count,
        "ssim": totals[2].item() / count,
        "codebook_usage": usage(counts).item(),
        "codebook_perplexity": perplexity(counts).item(),
        "images": count,
    }
    if math.isnan(metrics["ssim"]):  # the images are smaller than its window
        del metrics["ssim"]
    return metrics | ({"skipped": skipped} if skipped else {})


def structural_similarity(reconstruction: Tensor, images: Tensor) -> Tensor:
    """SSIM of each image: mean over channels and over all windows that lie inside the image.

    Args:
        reconstruction, images: `(B, C, H, W)` in [-1, 1]; compared in [0, 1], as the measure's constants expect.

    Returns:
        float32 `(B,)`, at most 1; not a number where H or W is below the window's 11.

    Source: Wang et al. 2004, "Image quality assessment: from error visibility to structural similarity", section 3,
    with its window, a Gaussian of 11 × 11 pixels and σ = 1.5.
    """
    if min(images.shape[2:]) < SSIM_WINDOW:
        return images.new_full((len(images),), math.nan)
    x, y = ((pixels.float() + 1) / 2 for pixels in (reconstruction, images))
    weights = torch.exp(-((torch.arange(SSIM_WINDOW, device=x.device) - SSIM_WINDOW // 2) ** 2) / (2 * 1.5**2))
    weights = (weights / weights.sum()).expand(x.shape[1], 1, 1, -1)

    def local_mean(values: Tensor) -> Tensor:
        rows = F.conv2d(values, weights, groups=len(weights))
        return F.conv2d(rows, weights.mT, groups=len(weights))

    mean_x, mean_y = local_mean(x), local_mean(y)
    covariance = local_mean(x * y) - mean_x * mean_y
    variances = local_mean(x * x + y * y) - mean_x**2 - mean_y**2
    luminance = (2 * mean_x * mean_y + 0.01**2) / (mean_x**2 + mean_y**2 + 0.01**2)
    structure = (2 * covariance + 0.03**2) / (variances + 0.03**2)
    return (luminance * structure).flatten(1).mean(1)


def evaluate(config: EvaluationConfig) -> dict[str, float]:
    """Evaluates a tokenizer on a split and prints the figures as JSON."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = load_tokenizer(config.model, "model")
    model.to(device)  # type: ignore[arg-type]
    source = load_images(config.data)[0 if config.split == "train" else 1]
    dataset = ImageDataset(
        source, model.config.image_size, model.config.in_channels, aspect_ratio=config.data.aspect_ratio
    )
    loader = evaluation_loader(dataset, config.per_device_eval_batch_size, config.dataloader_num_workers)
    skipped = SkippedImages(config.data.max_skipped_fraction, {config.split: source.num_images})
    batches = skipped.watch(config.split, tqdm(loader, desc="evaluating", unit="batch"))
    metrics = evaluate_reconstruction(model, batches)
    skipped.exchange()
    print(json.dumps(metrics, indent=2))
    return metrics


if __name__ == "__main__":
    run(EvaluationConfig, evaluate, "python -m stage1_vqgan.evaluate")
