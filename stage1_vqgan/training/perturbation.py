"""Wrong codes for the decoder in training.

Shape letters: B batch, D code width, h w code grid, K codebook size, N = h·w codes of an image, M codes to replace.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from configs.randomness import uniform
from stage1_vqgan.data.transfer import to_device
from stage1_vqgan.quantizer_base import CPU_SCORES, DEVICE_SCORES, Quantizer, QuantizerOutput
from stage1_vqgan.training.config import PerturbationConfig

IMAGE, CODE, NEIGHBOUR = (torch.tensor(number) for number in range(3))  # what a random number decides


class LatentPerturbation:
    """Replaces codes of some images by codes with near entries, in what the quantizer hands to the decoder.

    It is a forward hook of the quantizer. The codes and the loss that the quantizer returns stay as they are, and the
    gradient of the wrong entries is passed on in place of that of the right ones.

    Args:
        settings: how many codes are replaced, and by which.

    Source: Qiu et al. 2025, "Image tokenizer needs post-training" (RobusTok), section 3.2: β is `image_share`, α is
    `code_share`, δ is `neighbours`. Its code perturbs the first images of each batch; here each image has a random
    number of its own.
    """

    def __init__(self, settings: PerturbationConfig):
        self.settings = settings
        self._seeds: Sequence[int] = ()

    def prepare(self, image_seeds: Sequence[int]) -> None:
        """Takes a seed for each image of the next forward. A forward without seeds is not changed."""
        self._seeds = image_seeds

    def __call__(self, quantizer: Quantizer, inputs: tuple[Tensor, ...], out: QuantizerOutput) -> QuantizerOutput:
        """The output of the quantizer, which gives each position one code, with other entries in `quantized`."""
        seeds, self._seeds = self._seeds, ()
        if not seeds:
            return out
        count = min(self.settings.neighbours, quantizer.num_embeddings)
        replaced, ranks = self._draw(seeds, out.codes[0].numel(), count)
        device, codes = out.codes.device, out.codes.flatten()
        places = to_device(replaced.flatten().nonzero()[:, 0], device)  # counted on the CPU: no wait for the device
        with torch.no_grad():
            near = near_codes(quantizer, codes[places], to_device(ranks[replaced], device), count)
            wrong = quantizer.lookup(codes.index_put((places,), near).view_as(out.codes))
        mask = to_device(replaced, device).view(len(replaced), 1, *out.codes.shape[1:])
        quantized = out.quantized + (wrong - out.quantized).detach()
        return QuantizerOutput(torch.where(mask, quantized, out.quantized), out.codes, out.loss)

    def _draw(self, seeds: Sequence[int], num_positions: int, count: int) -> tuple[Tensor, Tensor]:
        """Which codes to replace, bool `(B, N)`, and their ranks among the nearest, int64 in [0, count), on the CPU."""
        images, positions = torch.tensor(seeds)[:, None], torch.arange(num_positions)
        chosen = uniform(images, IMAGE) < self.settings.image_share
        replaced = chosen & (uniform(images, CODE, positions) < self.settings.code_share)
        return replaced, (uniform(images, NEIGHBOUR, positions) * count).long()


def near_codes(quantizer: Quantizer, codes: Tensor, ranks: Tensor, count: int) -> Tensor:
    """For each code, the one whose entry is its nearest, second nearest, …, in squared distance.

    Args:
        quantizer: a quantizer with one code for each position.
        codes, ranks: int64 `(M,)`; rank 0 is the code itself, unless entries are equal.
        count: bound of the ranks, at most K.
    """
    entries = quantizer.entries(torch.arange(quantizer.num_embeddings, device=codes.device)).float()
    half_norms = 0.5 * entries.square().sum(1)
    num_scores = CPU_SCORES if codes.device.type == "cpu" else DEVICE_SCORES
    found = [
        (entries[chunk] @ entries.T - half_norms).topk(count).indices
        for chunk in codes.split(max(1, num_scores // len(entries)))
    ]
    return torch.cat(found).gather(1, ranks[:, None])[:, 0]
