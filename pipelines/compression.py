"""Compression: the codes of images, written by a range coder with the probabilities of the prior."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from configs.arguments import choice, whole
from configs.memory import shortage
from pipelines import compressed_file
from pipelines.chunks import bytes_of_image
from pipelines.outputs import OUTPUT_TYPES
from pipelines.prompts import Given, given_conditions
from stage2_prior import (
    Segment,
    SymbolReader,
    SymbolWriter,
    TokenLayout,
    batch_size_that_fits,
    read_codes,
    write_codes,
)
from stage2_prior.sampling.memory import bytes_per_token

if TYPE_CHECKING:
    from pipelines.sampling import CodeSampler

OTHER_MACHINE = (
    "this machine computes other probabilities than the one that compressed them. The bits can be read with the same "
    "processor or GPU, versions of torch and transformers, and attention implementation"
)


class Compression:
    """The methods of a pipeline that compress images."""

    vqgan: Any  # VQGANModel; each tensor of its output may be None
    prior: PreTrainedModel
    layout: TokenLayout
    _sampler: "CodeSampler"

    if TYPE_CHECKING:

        def decode(self, codes: Any, output_type: str = "pil") -> Any: ...
        def _require_likelihood(self, name: str) -> None: ...
        def _codes_of(self, images: Any, codes: Any) -> Tensor: ...
        def _prompts(self, count: int, given: Sequence[Given]) -> Tensor: ...

    @torch.no_grad()
    def compress(
        self,
        images: Any = None,
        class_labels: int | str | Sequence[int | str] | Mapping[str, Any] | None = None,
        *,
        text: str | Sequence[str] | Mapping[str, Any] | None = None,
        condition_images: Any = None,
        codes: Any = None,
        batch_size: int | None = None,
    ) -> bytes:
        """Compresses images into one block of bytes, which `decompress` of the same pipeline turns into images.

        The images become codes, as in `encode`; this loses what `reconstruct` loses. The codes are then kept exactly,
        in about as many bits as `score` says. One header, of 47 bytes with its checksums, serves all images. To read
        images one by one, compress them one by one.

        The bits can be read on the machine that wrote them. Elsewhere the last digits of the probabilities may differ:
        with another processor or GPU, version of torch or transformers, or attention implementation. `decompress`
        notices wrong codes by their checksum, and refuses them. The header records the number of threads.

        Args:
            images: PIL images, arrays or tensors, one or a list; see [`VQGANImageProcessor`].
            class_labels, text, condition_images: as in `score`. The bytes hold the prompt of each image, and
                `decompress` needs nothing else. A class takes log2 C bits, and saves bits if the images of classes
                differ. Each token of a text, unused places included, and each code of a condition image take log2 of
                the number of such tokens, which is often more than they save.
            codes: in place of images, their codes as `encode` returns them.
            batch_size: images in one forward, which the header records; by default as many as fit in memory.

        Raises:
            ImportError: constriction is not installed (pip install 'tessella[compression]').
            ValueError: an argument is out of range; or the prior is masked, or needs a condition that is not given.
            FloatingPointError: logits or latents were NaN or infinite.
        """
        if batch_size is not None:
            batch_size = whole("batch_size", batch_size, most=compressed_file.LARGEST)
        self._require_likelihood("compress")
        writer = SymbolWriter()
        codes = self._codes_of(images, codes)
        given = given_conditions(self.layout, class_labels, text, condition_images)
        flat, prompts = codes.flatten(1), self._prompts(len(codes), given)
        header = compressed_file.header_of(self.layout, self.prior, flat, [one.segment.name for one in given])
        if batch_size is None:
            batch_size = batch_size_that_fits(self.prior, prompts.shape[1] + self.layout.length, 1)
        batch_size = -(-len(codes) // -(-len(codes) // batch_size))  # spread the images evenly over the batches
        for segment in compressed_file.given_segments(header, self.layout):
            ids = prompts[:, self.layout.places[segment.name]] - self.layout.first_tokens[segment.name]
            writer.write_uniform(ids.flatten().numpy(), number_of_ids(segment))
        with self._steps(len(codes), batch_size, "compressing") as bar:
            write_codes(writer, self.prior, prompts, flat, self.layout.num_codes, batch_size, bar.update)
        return compressed_file.pack(replace(header, batch_size=batch_size), writer.content())

    def decompress(self, data: bytes, output_type: str = "pil") -> Any:
        """The images that `compress` of the same pipeline has compressed.

        Args:
            data: what `compress` returned.
            output_type: "pil", "np" or "pt", see `generate`; or "codes", the codes as `encode` returns them.

        Raises:
            ImportError: constriction is not installed (pip install 'tessella[compression]').
            ValueError: the data are damaged or cut, or no compressed images; another pipeline compressed them; this
                machine cannot read them; or their images do not fit in memory.
        """
        choice("output_type", output_type, OUTPUT_TYPES)
        self._require_likelihood("decompress")
        header, content = compressed_file.unpack(data)
        compressed_file.require_same(header, self.layout, self.prior)
        self._require_room(header, output_type)
        reader = SymbolReader(content)
        try:
            length, num_codes = self.layout.length, self.layout.num_codes
            prompts = self.layout.null_prompt().repeat(header.images, 1)
            for segment in compressed_file.given_segments(header, self.layout):
                ids = reader.read_uniform(header.images * segment.length, number_of_ids(segment))
                tokens = torch.from_numpy(ids).view(header.images, -1) + self.layout.first_tokens[segment.name]
                prompts[:, self.layout.places[segment.name]] = tokens
            with num_threads(header.threads), self._steps(header.images, header.batch_size, "decompressing") as bar:
                flat = read_codes(reader, self.prior, prompts, length, num_codes, header.batch_size, bar.update)
        except ValueError as error:
            raise ValueError(f"data: {OTHER_MACHINE} ({error})") from error
        if compressed_file.checksum_of_codes(flat) != header.codes:
            raise ValueError(f"data: {OTHER_MACHINE} (the checksum of the codes is wrong)")
        codes = flat.view(-1, *self.layout.codes_shape).to(self.vqgan.device)
        return codes if output_type == "codes" else self.decode(codes, output_type)

    # ------------------------------------------------------------------ helpers

    def _require_room(self, header: compressed_file.Header, output_type: str) -> None:
        """Refuses what memory cannot hold together: the images, and the keys and values of those of one forward."""
        prompt_bytes = 8 * self.layout.prompt_length
        images = header.images * (
            bytes_of_image(self.vqgan, self.layout, self.layout.pixels, output_type) + prompt_bytes
        )
        if lack := shortage(images, torch.device("cpu")):
            raise ValueError(f"data: received {header.images:,} compressed images; decompressing them {lack}")
        forward = header.batch_size * self.layout.sequence_length * bytes_per_token(self.prior)
        if lack := shortage(forward, self.prior.device):
            raise ValueError(
                f"data: they were compressed {header.batch_size:,} images at once; decompressing them {lack}"
            )

    def _steps(self, count: int, batch_size: int, doing: str) -> tqdm:
        """A progress bar over the forwards, with the options of the pipeline."""
        total = -(-count // batch_size) * self.layout.length
        return tqdm(total=total, **{"desc": doing, "unit": "code", **self._sampler.progress_bar})


def number_of_ids(segment: Segment) -> int:
    """How many different ids a place of a condition may have: its tokens, and in a text the null token that pads it."""
    return segment.num_tokens + (segment.kind == "text")


@contextmanager
def num_threads(count: int) -> Iterator[None]:
    """Inside this context, torch computes with this number of CPU threads. It affects how sums are rounded."""
    before = torch.get_num_threads()
    torch.set_num_threads(max(1, count))
    try:
        yield
    finally:
        torch.set_num_threads(before)
