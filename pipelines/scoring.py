"""Scores of images: how probable the prior finds their codes, and of which class they are.

Shape letters: N images, H W height and width in pixels, L codes of an image, C classes, P prompt length.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from configs.arguments import described, instance, whole
from pipelines.arguments import int64_codes, listed_labels
from pipelines.heat_maps import overlays, surprise_maps
from stage1_vqgan import VQGANImageProcessor
from stage2_prior import TokenLayout, code_nats, marginal_nats
from stage2_prior.conditions import CLASS

if TYPE_CHECKING:
    from pipelines.sampling import CodeSampler

# Numbers that the nats of all codes given each class may have at once.
LARGEST_TABLE = 2**24

Likelihood = Literal["class", "unconditional", "marginal"]


@dataclass(frozen=True)
class ScoreOutput:
    """Output of [`VQGANPipeline.score`]. `len(out)` is N. All tensors are on the CPU.

    Attributes:
        nats: float64 `(N,)`, -ln p(codes of the image): the training loss times L. Higher is less probable.
        bits_per_pixel: float64 `(N,)`, nats / (ln 2 · H · W).
        code_nats: float64, the nats of each code; its shape is that of `codes`. `heat_maps` makes pictures of them.
        codes: int64 `(N, h, w)`, `(N, h, w, G)` or `(N, L)`.
        likelihood: "class", given the labels; "unconditional", with the null token as the prompt; or "marginal", the
            mean over all classes, if the prior has not learnt the null token.
    """

    nats: Tensor
    bits_per_pixel: Tensor
    code_nats: Tensor
    codes: Tensor
    likelihood: Likelihood

    def __len__(self) -> int:
        return len(self.nats)


class Scoring:
    """The methods of a pipeline that score images."""

    vqgan: Any  # VQGANModel; each tensor of its output may be None
    prior: PreTrainedModel
    image_processor: VQGANImageProcessor
    layout: TokenLayout
    _sampler: "CodeSampler"

    if TYPE_CHECKING:

        def encode(self, images: Any) -> Tensor: ...

    def score(
        self,
        images: Any = None,
        class_labels: int | str | Sequence[int | str] | None = None,
        *,
        codes: Any = None,
        batch_size: int | None = None,
    ) -> ScoreOutput:
        """How probable the prior finds the codes of images: the likelihood by which unusual images are found.

        As in the training loss, the probabilities are those of all tokens. `compress` leaves out the tokens that are no
        codes, so it takes at most as many bits.

        Args:
            images: PIL images, arrays or tensors, one or a list; see [`VQGANImageProcessor`].
            class_labels: id or name of the class of each image, or one for all images. Without labels the score is
                unconditional; or, if the prior has not learnt the null token, the marginal over the classes, each
                equally probable, which takes C forwards. `likelihood` of the output says which.
            codes: in place of images, their codes as `encode` returns them.
            batch_size: sequences in one forward; by default as many as fit in memory.

        Returns:
            [`ScoreOutput`].

        Raises:
            ValueError: an argument is out of range, or the prior is masked, so that it has no likelihood.
            FloatingPointError: logits or latents were NaN or infinite.
        """
        batch_size = None if batch_size is None else whole("batch_size", batch_size)
        self._require_likelihood("score")
        codes = self._codes_of(images, codes)
        labels = None if class_labels is None else self._labels_of(class_labels, len(codes))
        likelihood: Likelihood
        if labels is None and self.layout.num_classes and not self.layout.has_null:
            likelihood, nats = "marginal", self._marginal_nats(codes, batch_size)
        else:
            likelihood = "unconditional" if labels is None else "class"
            prompts = class_prompts(self.layout, labels, len(codes))
            with self._scoring(len(codes)) as bar:
                nats = code_nats(self.prior, prompts, codes.flatten(1), batch_size, bar.update)
        total = nats.sum(1, dtype=torch.float64)
        return ScoreOutput(
            nats=total,
            bits_per_pixel=total / (math.log(2) * self.layout.pixels),
            code_nats=nats.double().view(codes.shape),
            codes=codes,
            likelihood=likelihood,
        )

    def class_posterior(
        self,
        images: Any = None,
        *,
        codes: Any = None,
        class_prior: str | Sequence[float] | Tensor = "uniform",
        batch_size: int | None = None,
    ) -> Tensor:
        """The probability of each class given the image, by Bayes' rule.

        p(class | codes) is proportional to p(class) · p(codes | class). It takes C forwards for each image.

        Args:
            images, codes, batch_size: see `score`.
            class_prior: p(class): "uniform"; "counts", as frequent as in the training data; or C weights from 0 up,
                which are divided by their sum.

        Returns:
            float64 `(N, C)` on the CPU; each row sums to 1.

        Raises:
            ValueError: the prior has no classes or is masked, or an argument is out of range.
            FloatingPointError: logits or latents were NaN or infinite.
        """
        batch_size = None if batch_size is None else whole("batch_size", batch_size)
        self._require_likelihood("class_posterior")
        if not self.layout.num_classes:
            raise ValueError("class_posterior: this prior has no classes; score() gives the likelihood of an image")
        log_prior = log_class_prior(self.layout, class_prior)
        codes = self._codes_of(images, codes)
        with self._scoring(len(codes) * self.layout.num_classes) as bar:
            nats = [given.sum(1, dtype=torch.float64) for given in self._nats_by_class(codes, batch_size, bar)]
        return (log_prior - torch.stack(nats, 1)).softmax(1)

    def heat_maps(self, images: Any, code_nats: Tensor, span: tuple[float, float] | None = None) -> list[Image.Image]:
        """Pictures of where images surprise the prior: each image in gray, under the colours of its bits per pixel.

        A code stands for a patch of pixels, and its nats depend on the codes before it. So a map shows where reading
        became surprising, which may be one patch after the cause.

        Args:
            images: those that were scored.
            code_nats: those of `score(images)`.
            span: bits per pixel of the lowest and of the highest colour. By default the 1st and the 99th percentile of
                these images, so pictures of one call can be compared.

        Returns:
            N RGB images of the size of the decoded images.

        Raises:
            ValueError: the nats are those of other images or of another layout.
        """
        pixels = self.image_processor(images)["pixel_values"]
        instance("code_nats", code_nats, Tensor, "code_nats of score(images)")
        if code_nats.shape != (len(pixels), *self.layout.codes_shape):
            needed = f"must have shape {(len(pixels), *self.layout.codes_shape)}, as that of score(images)"
            raise ValueError(f"code_nats: received {described(code_nats)}; {needed}")
        return overlays(self.image_processor.postprocess(pixels), surprise_maps(code_nats, self.layout), span)

    # ------------------------------------------------------------------ helpers

    def _require_likelihood(self, name: str) -> None:
        """Refuses a masked prior."""
        if self.layout.family != "causal":
            reason = (
                "it predicts hidden codes in any order, so it has no likelihood; use a pipeline with a causal prior"
            )
            raise ValueError(f"{name}: this pipeline has a masked prior: {reason}")

    def _codes_of(self, images: Any, codes: Any) -> Tensor:
        """The codes of either argument, int64 `(N, *codes_shape)` on the CPU."""
        if (images is None) == (codes is None):
            raise ValueError(f"images: received {described(images)}; give either images or codes")
        if codes is None:
            return self.encode(images).cpu()
        codes = int64_codes(codes, 1 + len(self.layout.codes_shape)).cpu()
        if codes.shape[1:] != self.layout.codes_shape:
            needed = f"the prior has learnt images of {self.layout.codes_text} codes"
            raise ValueError(f"codes: received shape {tuple(codes.shape)}; {needed}, {('N', *self.layout.codes_shape)}")
        self.vqgan.check_codes(codes.to(self.vqgan.device), self.layout.grid)
        return codes

    def _labels_of(self, class_labels: Any, count: int) -> Tensor:
        """Class ids int64 `(count,)` of one label for all images, or of a label for each."""
        if not self.layout.num_classes:
            raise ValueError(f"class_labels: received {described(class_labels)}; {self._without_classes}")
        ids = self.layout.class_ids(listed_labels(class_labels))
        if len(ids) not in (1, count):
            raise ValueError(f"class_labels: received {len(ids)} labels for {count} images; give one each, or one")
        return ids.expand(count)

    @property
    def _without_classes(self) -> str:
        """Why labels cannot be given, if the prior has no classes."""
        if self.layout.segments:
            names = ", ".join(segment.name for segment in self.layout.segments)
            return f"scores take the class alone, and this prior has none, only the conditions {names}; leave it out"
        return "this prior has no classes; leave it out"

    def _nats_by_class(self, codes: Tensor, batch_size: int | None, bar: tqdm) -> Iterator[Tensor]:
        """The nats of all codes given each class in turn, float32 `(N, L)`."""
        for number in range(self.layout.num_classes):
            prompts = class_prompts(self.layout, torch.tensor([number]).expand(len(codes)), len(codes))
            yield code_nats(self.prior, prompts, codes.flatten(1), batch_size, bar.update)

    def _marginal_nats(self, codes: Tensor, batch_size: int | None) -> Tensor:
        """float64 `(N, L)`; see `marginal_nats`."""
        log_prior = log_class_prior(self.layout, "uniform")
        at_once = max(1, LARGEST_TABLE // (self.layout.num_classes * self.layout.length))
        with self._scoring(len(codes) * self.layout.num_classes) as bar:
            parts = [
                marginal_nats(torch.stack(list(self._nats_by_class(part, batch_size, bar)), 1), log_prior)
                for part in codes.split(at_once)
            ]
        return torch.cat(parts)

    def _scoring(self, total: int) -> tqdm:
        """A progress bar with the options of the pipeline."""
        return tqdm(total=total, **{"desc": "scoring", "unit": "image", **self._sampler.progress_bar})


def class_prompts(layout: TokenLayout, labels: Tensor | None, count: int) -> Tensor:
    """The prompts of images, int64 `(count, P)`: their classes int64 `(count,)`, or null tokens; no other condition.

    Raises:
        ValueError: the prior has not learnt such prompts.
    """
    prompts = layout.null_prompt().repeat(count, 1)
    if labels is not None:
        prompts[:, layout.places[CLASS]] = layout.class_tokens(labels)[:, None]
        needed = [segment.name for segment in layout.segments if not segment.has_null]
    else:
        needed = [] if layout.has_null else [segment.name for segment in layout.conditions]
    if needed == [CLASS]:
        raise ValueError("class_labels: received None; this prior has not learnt the null token, so it needs the class")
    if needed:
        reason = f"this prior has not learnt to do without {', '.join(needed)}, which cannot be given here"
        raise ValueError(f"class_labels: {reason}")
    return prompts


def log_class_prior(layout: TokenLayout, class_prior: Any) -> Tensor:
    """ln p(class), float64 `(C,)`; see `Scoring.class_posterior`.

    Raises:
        ValueError: it is neither "uniform" nor "counts" nor C weights, or the counts of the classes are unknown.
    """
    allowed = f"must be 'uniform', 'counts' or {layout.num_classes} numbers from 0 up, not all 0"
    if isinstance(class_prior, str):
        if class_prior == "counts" and not layout.class_counts:
            missing = "this pipeline does not record how many images each class had; give 'uniform' or weights"
            raise ValueError(f"class_prior: received 'counts', but {missing}")
        class_prior = {"uniform": [1] * layout.num_classes, "counts": layout.class_counts}.get(class_prior, class_prior)
    instance("class_prior", class_prior, (list, tuple, np.ndarray, Tensor), allowed)
    try:
        weights = np.asarray(class_prior.tolist() if isinstance(class_prior, Tensor) else class_prior)
    except (NotImplementedError, OverflowError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"class_prior: received {described(class_prior)}; {allowed}") from error
    good = weights.shape == (layout.num_classes,) and weights.dtype.kind in "iuf"
    if not good or not np.isfinite(weights).all() or weights.min() < 0 or not weights.max() > 0:
        raise ValueError(f"class_prior: received {described(class_prior)}; {allowed}")
    shares = torch.from_numpy(weights.astype(np.float64) / float(weights.max()))
    return (shares / shares.sum()).log()
