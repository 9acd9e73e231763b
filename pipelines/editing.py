"""Edits of images: the prior samples some codes of an image anew, and the others stay.

Shape letters: N images, C channels, H W image size, h w code grid, f downsampling factor, L codes of an image.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from configs.arguments import described, number, whole
from configs.randomness import uniform
from pipelines.chunks import encode_in_chunks
from pipelines.conditions import ConditionTokenizer
from pipelines.masks import MaskedImages, hidden_around, joined, kept_box, known_codes, masked_images
from pipelines.outputs import VQGANPipelineOutput
from pipelines.prompts import Given
from pipelines.requests import Request, Requests, prompts_of, require_memory
from pipelines.windows import require_one_grid, sample_windows
from stage1_vqgan import VQGANImageProcessor

LARGEST_SEAM, LARGEST_SIDE = 2**10, 2**16  # pixels
# Arguments of `generate` without a meaning for edits, which make one image of each image.
NOT_OF_EDITS = ("num_images", "num_images_per_label", "image_size", "best_of", "best_by")


class Editing(Requests):
    """The methods of `VQGANPipeline` that edit images.

    All of them work at the size of the pipeline's images: the image processor resizes and crops images of another size
    first, and the edited images have that size.

    All take `class_labels`: ids or names, one for all images or one for each; without labels, the new codes are those
    of no given class. `**sampling` are the other arguments of `VQGANPipeline.generate`: `text`, `condition_images`,
    `seed`, `generator`, `guidance_scale` and the other options of sampling, `output_type`, `batch_size` and
    `callback_on_step_end`. A list of guidance scales has one for each image. An edit makes one image of each image, so
    it has no `num_images`, `num_images_per_label`, `image_size`, `best_of` and `best_by`.
    The result has the codes of the whole images, known ones and new ones.

    In float32, an edited image depends only on its own visible pixels, mask, label and seed, and on the options.
    """

    vqgan: Any  # VQGANModel
    image_processor: VQGANImageProcessor
    _tokenizers: dict[str, ConditionTokenizer]
    _decoded_parts: Callable[[Tensor], Iterator[Tensor]]

    @torch.no_grad()
    def inpaint(
        self, images: Any, masks: Any, class_labels: Any = None, *, seam: int | None = None, **sampling: Any
    ) -> VQGANPipelineOutput:
        """Repaints the masked parts of images. All other pixels stay exactly as they are.

        What is hidden has no influence: before the image is encoded, hidden pixels take the colour of the nearest
        visible pixel. A code is known if no pixel of its f × f patch is hidden. The prior samples the other codes. A
        causal prior samples them in raster order, and sees only the codes before: it cannot see what is below, or on
        the right in the same row, so a repainted part may not fit what is below it. A masked prior sees all known
        codes.

        At the border: a mask may cut through the patch of a code. This whole code is sampled anew, but its visible
        pixels are taken from the original image, which the prior has not seen there. The same holds for the codes
        beside: their reconstruction differs a little from the original. The difference is therefore spread over the
        hidden side, see `seam`. Masks whose edges are multiples of f cut no patch.

        Args:
            images: PIL images, arrays or tensors, one or a list; see [`VQGANImageProcessor`].
            masks: one for all images or one for each, of the size of the image: a PIL image, of which white parts
                (from level 128 up) are repainted, or booleans `(H, W)`, an array or tensor, true where a pixel is
                repainted. In an image that is resized, the pixels count as masked that resizing could mix with a
                masked one: two more on each side.
            class_labels, **sampling: see [`Editing`].
            seam: width of the transition in pixels. At the edge of the mask, a new pixel is shifted by what the new
                image differs there from the original; the shift decreases linearly to 0 over `seam` pixels, on the
                masked side only. 0 is a hard edge; by default f.

        Returns:
            [`VQGANPipelineOutput`].

        Raises:
            ValueError: an argument is out of range, a mask does not fit its image, or the tokenizer has several grids,
                in which no code belongs to one part of the image.
        """
        return self._repainted(masked_images(self.image_processor, images, masks), class_labels, seam, sampling)

    @torch.no_grad()
    def complete(
        self,
        images: Any,
        rows: int | None = None,
        box: tuple[int, int, int, int] | None = None,
        class_labels: Any = None,
        *,
        seam: int | None = None,
        **sampling: Any,
    ) -> VQGANPipelineOutput:
        """Keeps a part of images, and repaints the rest; see `inpaint`.

        Causal priors are best at `rows`: all that is kept lies before all that is new.

        Args:
            images: see `inpaint`.
            rows: number of rows of pixels at the top that are kept, from 1 to H - 1.
            box: in place of rows, the rectangle that is kept: left, top, right and bottom in pixels, as in Pillow. Rows
                and boxes count pixels of the pipeline's size, also for images of another size.
            class_labels, seam, **sampling: see `inpaint`.

        Raises:
            ValueError: see `inpaint`; or `rows` and `box` are both given, or neither.
        """
        hidden = hidden_around(kept_box(rows, box, self.layout.image_shape), self.layout.image_shape)
        pixel_values = self.image_processor(images)["pixel_values"]
        given = MaskedImages.of(pixel_values, hidden.expand(len(pixel_values), -1, -1, -1))
        return self._repainted(given, class_labels, seam, sampling)

    @torch.no_grad()
    def outpaint(
        self,
        images: Any,
        left: int = 0,
        top: int = 0,
        right: int = 0,
        bottom: int = 0,
        class_labels: Any = None,
        *,
        seam: int | None = None,
        **sampling: Any,
    ) -> VQGANPipelineOutput:
        """Adds new pixels around images, which become larger than those of the training.

        All pixels of the images stay, and all their codes are known. The prior samples the codes around them in
        windows of the trained size, see `pipelines/windows.py`. Causal priors see only what is above, or on the left in
        the same row: they continue an image to the right and to the bottom, but what they add at the top or on the left
        may not fit the image.

        Args:
            images: see `inpaint`.
            left, top, right, bottom: pixels to add on each side, multiples of f.
            class_labels, seam, **sampling: see `inpaint`. The positions that `callback_on_step_end` gets are those in a
                window.

        Returns:
            [`VQGANPipelineOutput`] with images of H + top + bottom rows and W + left + right columns.

        Raises:
            ValueError: see `inpaint`; or no side is given, or one is no multiple of f.
        """
        f, (height, width) = self.layout.downsampling_factor, self.layout.image_shape
        sides = require_sides({"left": left, "right": right, "top": top, "bottom": bottom}, f)
        require_one_grid(self.layout, "images")
        seam = self._seam(seam)
        pixel_values = self.image_processor(images)["pixel_values"]
        pixels = (width + sides[0] + sides[1]) * (height + sides[2] + sides[3])
        request = self._request_of(len(pixel_values), pixels, class_labels, **sampling)
        codes, places = encode_in_chunks(self.vqgan, pixel_values), tuple(side // f for side in sides)
        known = F.pad(codes, places if codes.ndim == 3 else (0, 0, *places), value=-1)
        hidden = F.pad(torch.zeros_like(pixel_values[:, :1], dtype=torch.bool), sides, value=True)
        given = MaskedImages.of(F.pad(pixel_values, sides), hidden)
        return self._finished(request, self._sample(request, known), given, seam)

    @torch.no_grad()
    def vary(
        self, images: Any, strength: float = 0.5, class_labels: Any = None, **sampling: Any
    ) -> VQGANPipelineOutput:
        """Makes variants of images: the prior samples a share of their codes anew.

        A causal prior samples the last codes anew, so strength 0.5 keeps the upper half of an image; of several grids,
        it keeps the coarse ones, and changes detail. A masked prior samples a random share anew, which depends on the
        seed. The images are decoded from codes as a whole: also the parts that stay are reconstructions.

        Args:
            images: see `inpaint`.
            strength: the share of the codes that are sampled anew, above 0 and up to 1, rounded to at least one code.
                At 1, nothing of the image stays, and the result is that of `generate`.
            class_labels, **sampling: see [`Editing`].

        Raises:
            ValueError: an argument is out of range.
        """
        strength = number("strength", strength, lambda value: 0 < value <= 1, "a number above 0, up to 1")
        pixel_values = self.image_processor(images)["pixel_values"]
        request = self._request_of(len(pixel_values), self.layout.pixels, class_labels, **sampling)
        known = encode_in_chunks(self.vqgan, pixel_values).flatten(1)
        count = max(1, round(strength * self.layout.length))
        known[self._changed(request.seeds.to(known.device), count)] = -1
        return self._finished(request, self._sample(request, known))

    # ------------------------------------------------------------------ helpers

    def _repainted(
        self, given: MaskedImages, class_labels: Any, seam: int | None, sampling: dict[str, Any]
    ) -> VQGANPipelineOutput:
        require_one_grid(self.layout, "images")
        seam = self._seam(seam)
        request = self._request_of(len(given.hidden), self.layout.pixels, class_labels, **sampling)
        known = known_codes(encode_in_chunks(self.vqgan, given.pixel_values), given.hidden.to(self.vqgan.device))
        return self._finished(request, self._sample(request, known), given, seam)

    def _request_of(self, count: int, pixels: int, class_labels: Any, **sampling: Any) -> Request:
        """Checks the arguments of an edit of `count` images, which then have `pixels` pixels each."""
        for name in NOT_OF_EDITS:
            if name in sampling:
                advice = "an edit makes one image of each image; leave it out, it belongs to generate"
                raise ValueError(f"{name}: received {described(sampling[name])}; {advice}")
        scale, kind = sampling.get("guidance_scale", 1.0), sampling.get("output_type", "pil")

        def make(given: Sequence[Given]) -> Tensor:
            require_memory("images", count, count, pixels, self.vqgan, self.layout, kind)
            return prompts_of(count, given, self.vqgan, self.layout, kind, self._tokenizers, scale)

        return self._request(make, class_labels, **sampling)

    def _sample(self, request: Request, known: Tensor) -> Tensor:
        """Codes of the shape of `known`, which is that of images of any size; -1 where a code is sampled."""
        sample = partial(self._sampled_for, request)
        if known.ndim == 2:
            return torch.cat([*sample(request.seeds, known)])
        return sample_windows(sample, request.seeds, known, self.layout.grid)

    def _finished(
        self, request: Request, codes: Tensor, given: MaskedImages | None = None, seam: int = 0
    ) -> VQGANPipelineOutput:
        images = None
        if request.output_type != "codes":
            pixels = torch.cat([part.float() for part in self._decoded_parts(codes)])
            if given is not None:
                pixels = joined(pixels, given, seam)
            images = self.image_processor.postprocess(pixels, request.output_type)
        return VQGANPipelineOutput(images, codes, request.labels, request.seeds.tolist(), request.asked)

    def _changed(self, seeds: Tensor, count: int) -> Tensor:
        """The `count` codes of each image that `vary` samples anew, bool `(N, L)`."""
        places = torch.arange(self.layout.length, device=seeds.device)
        if self.layout.family == "causal":
            return (places >= self.layout.length - count).expand(len(seeds), -1)
        ranks = uniform(seeds[:, None], places).argsort(1).argsort(1)
        return ranks < count

    def _seam(self, seam: int | None) -> int:
        return self.layout.downsampling_factor if seam is None else whole("seam", seam, least=0, most=LARGEST_SEAM)


def require_sides(sides: dict[str, Any], factor: int) -> tuple[int, ...]:
    """What `outpaint` adds on each side, in pixels.

    Raises:
        ValueError: a side is no multiple of the downsampling factor, or all are 0.
    """
    pixels = tuple(whole(name, side, least=0, most=LARGEST_SIDE) for name, side in sides.items())
    for name, side in zip(sides, pixels, strict=True):
        if side % factor:
            raise ValueError(f"{name}: received {side}; must be a multiple of {factor}, the pixels of a code")
    if not any(pixels):
        raise ValueError(f"left: received 0, as for all sides; give the pixels to add, multiples of {factor}")
    return pixels
