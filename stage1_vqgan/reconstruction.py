"""How well a tokenizer reconstructs images, and how much of its codebook it uses.

Shape letters: B batch, C channels, H W image size, K codebook size.
"""

import math
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from configs import ConfigError, Problem
from stage1_vqgan.data.dataset import ImageBatch
from stage1_vqgan.modeling_vqgan import VQGANModel

# Side, in pixels, of the windows whose statistics SSIM compares. SSIM is not defined for smaller images.
SSIM_WINDOW = 11


@torch.no_grad()
def evaluate_reconstruction(
    model: VQGANModel, batches: Iterable[ImageBatch], reduce: Callable[[Tensor], Tensor] = lambda total: total
) -> dict[str, float]:
    """Reconstruction error and codebook use over a set of images.

    Args:
        model: the tokenizer. Its mode (training or evaluation) is restored afterwards.
        batches: the images, in the batches of a loader.
        reduce: sums a tensor over processes.

    Returns:
        Means over the images, with reconstructions clamped to [-1, 1]: `reconstruction_l1` (of pixels in [-1, 1]),
        `psnr` (dB) and, for images of at least 11 pixels, `ssim` (at most 1). Over all codes: `codebook_usage` in
        [0, 1] and `codebook_perplexity` in [1, K] (the mean over several codebooks). Counts: `images`, and `skipped` if
        some could not be decoded.

    Raises:
        ConfigError: no image can be decoded.
    """
    was_training = model.training
    model.eval()
    counts = torch.zeros(model.quantize.num_entries, dtype=torch.int64, device=model.device)
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
        ratio = peak_signal_to_noise(reconstruction, images)
        similarity = structural_similarity(reconstruction, images)
        totals[:3] += torch.stack([absolute.sum(), ratio.sum(), similarity.sum()]).to(precision)
        totals[3] += len(images)
        entries = model.quantize.entry_numbers(out.codes, out.latents.shape[2:])
        counts += torch.bincount(entries.flatten(), minlength=len(counts))
    model.train(was_training)
    counts, totals = reduce(counts).view(-1, model.config.num_embeddings), reduce(totals)
    count, skipped = int(totals[3]), int(totals[4])
    if not count:
        raise ConfigError([Problem("data.dataset", f"none of the {skipped} images can be decoded")])
    metrics = {
        "reconstruction_l1": totals[0].item() / count,
        "psnr": totals[1].item() / count,
        "ssim": totals[2].item() / count,
        "codebook_usage": codebook_usage(counts).item(),
        "codebook_perplexity": codebook_perplexity(counts).item(),
        "images": count,
    }
    if math.isnan(metrics["ssim"]):  # the images are smaller than SSIM's window
        del metrics["ssim"]
    return metrics | ({"skipped": skipped} if skipped else {})


def peak_signal_to_noise(reconstruction: Tensor, images: Tensor) -> Tensor:
    """PSNR of each image in dB, float32 `(B,)`, at most 106 (equal images).

    Args:
        reconstruction, images: `(B, C, H, W)` in [-1, 1].
    """
    squared = F.mse_loss(reconstruction, images, reduction="none").flatten(1).mean(1)
    return 10 * torch.log10(4 / squared.clamp(min=1e-10))


def structural_similarity(reconstruction: Tensor, images: Tensor) -> Tensor:
    """SSIM of each image: the mean over channels and over all windows inside the image.

    Args:
        reconstruction, images: `(B, C, H, W)` in [-1, 1]. They are compared in [0, 1], the range that SSIM's constants
            expect.

    Returns:
        float32 `(B,)`, at most 1; NaN if H or W is below 11, the side of the window.

    Source: Wang et al. 2004, "Image quality assessment: from error visibility to structural similarity", section 3,
    with the paper's window, a Gaussian of 11 × 11 pixels and σ = 1.5.
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
