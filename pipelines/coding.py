"""Images to codes and back, with the tokenizer.

Shape letters: N images, n of a part, H W image size, C channels, h w code grid, L codes of an image, K codebook size.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from configs.arguments import choice
from pipelines.arguments import int64_codes
from pipelines.chunks import encode_in_chunks, images_at_once
from pipelines.outputs import OUTPUT_TYPES
from pipelines.requests import require_memory
from stage1_vqgan import VQGANImageProcessor
from stage2_prior import TokenLayout


class Coding:
    """The methods of `VQGANPipeline` that encode and decode images."""

    vqgan: Any  # VQGANModel
    image_processor: VQGANImageProcessor
    layout: TokenLayout

    @torch.no_grad()
    def encode(self, images: Any) -> Tensor:
        """Encodes images into codes int64 `(N, h, w)`, `(N, h, w, G)` or `(N, L)`.

        Args:
            images: PIL images, arrays or tensors, one or a list; see [`VQGANImageProcessor`].

        Raises:
            ValueError: an image has another type, shape, dtype or range.
            FloatingPointError: latents were NaN or infinite.
        """
        return encode_in_chunks(self.vqgan, self.image_processor(images)["pixel_values"])

    @torch.no_grad()
    def decode(self, codes: Any, output_type: str = "pil") -> Any:
        """Decodes codes into images.

        Args:
            codes: whole numbers `(N, h, w)` in `[0, K)`, or of the other shapes: a tensor, an array or nested lists.
                Floats are refused.
            output_type: "pil", "np" or "pt"; see `generate`.

        Raises:
            ValueError: the codes are not such numbers, their images do not fit in memory, or pixels are not finite.
        """
        choice("output_type", output_type, OUTPUT_TYPES[:3])
        codes = int64_codes(codes, 1 + len(self.layout.codes_shape)).to(self.vqgan.device)
        require_memory("codes", codes, len(codes), self._pixels(codes), self.vqgan, self.layout, output_type)
        self.vqgan.check_codes(codes, self.layout.grid)
        return joined_images(self._decoded(codes, output_type), output_type)

    def reconstruct(self, images: Any, output_type: str = "pil") -> Any:
        """Encodes and decodes images. No prior can generate images of higher fidelity than these reconstructions."""
        choice("output_type", output_type, OUTPUT_TYPES[:3])
        return self.decode(self.encode(images), output_type)

    # ------------------------------------------------------------------ helpers

    def _decoded(self, codes: Tensor, output_type: str) -> list[Any]:
        """Images of codes in `[0, K)`, in parts that fit in memory. Refuses NaN or infinite pixels."""
        return [self.image_processor.postprocess(part, output_type) for part in self._decoded_parts(codes)]

    def _decoded_parts(self, codes: Tensor) -> Iterator[Tensor]:
        """The decoder's output for codes in `[0, K)`, `(n, C, H, W)`, in parts that fit in memory."""
        # not decode_codes: its check of the codes would wait for the GPU
        for part in codes.split(images_at_once(self.vqgan, self._pixels(codes))):
            yield self.vqgan.decode(self.vqgan.lookup(part, self.layout.grid))

    def _pixels(self, codes: Tensor) -> int:
        """Number of pixels of the image of each row of codes, H·W."""
        height, width = self.vqgan.grid_of(codes, self.layout.grid)
        return height * width * self.layout.downsampling_factor**2


def joined_images(batches: list[Any], output_type: str) -> Any:
    """Joins the images of all batches."""
    if output_type == "codes":
        return None
    if output_type == "pil":
        return [image for batch in batches for image in batch]
    return torch.cat(batches) if output_type == "pt" else np.concatenate(batches)
