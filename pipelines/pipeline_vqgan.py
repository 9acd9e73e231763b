"""VQGANPipeline: sample codes from the prior, decode them with the tokenizer.

Shape letters: N images, h w code grid, L = h·w codes of an image, K codebook size.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from configs.randomness import draw_seeds
from pipelines import hub
from pipelines.chunks import images_at_once
from stage1_vqgan import VQGANImageProcessor, VQGANModel
from stage2_prior import DecoderPool, GuidanceSchedule, SamplingOptions, TokenLayout, batch_size_that_fits, sample

OUTPUT_TYPES = ("pil", "np", "pt", "codes")


@dataclass
class VQGANPipelineOutput(ModelOutput):
    """Output of [`VQGANPipeline.generate`].

    Attributes:
        images: list of N PIL images; or float32 array `(N, H, W, C)` or tensor `(N, C, H, W)` in [0, 1]; or None.
        codes: int64 `(N, h, w)`.
    """

    images: Any = None
    codes: Tensor | None = None


class VQGANPipeline:
    """Generates images: the prior samples codes, the tokenizer decodes them.

    Args:
        vqgan: the tokenizer.
        prior: causal language model over the tokenizer's codes.
        image_processor: converts images into pixel values and back.
        layout: meaning of the prior's tokens.

    Raises:
        ValueError: the prior was trained on the codes of another tokenizer, or the layout does not fit the tokenizer or
            the prior's vocabulary.
    """

    def __init__(
        self, vqgan: VQGANModel, prior: PreTrainedModel, image_processor: VQGANImageProcessor, layout: TokenLayout
    ):
        layout.require_tokenizer(vqgan)
        if prior.config.vocab_size != layout.vocab_size:
            raise ValueError(
                f"prior: received a vocabulary of {prior.config.vocab_size} tokens; the layout has {layout.vocab_size}"
            )
        self.vqgan, self.prior = vqgan.eval(), prior.eval()
        self.image_processor, self.layout = image_processor, layout
        self._progress_bar: dict[str, Any] = {}
        self._decoders = DecoderPool(layout.length, layout.num_codes)

    # ------------------------------------------------------------------ components and devices

    @property
    def components(self) -> dict[str, Any]:
        """The models, image processor and layout, by the names of the constructor's arguments."""
        return {
            "vqgan": self.vqgan,
            "prior": self.prior,
            "image_processor": self.image_processor,
            "layout": self.layout,
        }

    @property
    def device(self) -> torch.device:
        """The device of both models."""
        return self.prior.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights."""
        return self.prior.dtype

    @property
    def class_names(self) -> list[str]:
        """Names of the classes, in the order of their ids; empty for an unconditional pipeline."""
        return list(self.layout.class_names)

    def to(self, *args: Any, **kwargs: Any) -> "VQGANPipeline":
        """Moves or casts both models. The arguments are those of `torch.nn.Module.to`."""
        self.vqgan.to(*args, **kwargs)
        self.prior.to(*args, **kwargs)
        return self

    def set_progress_bar_config(self, **kwargs: Any) -> None:
        """Sets options of tqdm for the progress bar; `disable=True` hides it."""
        self._progress_bar = kwargs

    def compile(self) -> None:
        """Compiles the forward of the prior and the tokenizer's decoder with torch.compile.

        The first batch then takes some minutes longer. Later batches of the same size are faster.
        """
        self._decoders.compiled = True
        self.vqgan.decoder.compile(dynamic=False)

    # ------------------------------------------------------------------ images

    @torch.no_grad()
    def generate(
        self,
        class_labels: int | str | Sequence[int | str] | None = None,
        num_images: int | None = None,
        num_images_per_label: int = 1,
        guidance_scale: float = 1.0,
        guidance_schedule: GuidanceSchedule = "constant",
        guidance_power: float = 1.0,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "pil",
        batch_size: int | None = None,
        callback_on_step_end: Callable[[int, Tensor], None] | None = None,
    ) -> VQGANPipelineOutput:
        """Generates images.

        Args:
            class_labels: ids or names of classes. Without labels, the images are unconditional.
            num_images: number of images if class_labels is not given (default 1).
            num_images_per_label: number of images for each class label; images of one label are adjacent in the output.
            guidance_scale: strength of the classifier-free guidance; 1.0 is no guidance, 1.5 to 3 is usual.
            guidance_schedule: "constant"; "linear" and "cosine" raise the guidance from 1.0 at the first code towards
                guidance_scale at the last code, so that images vary more.
            guidance_power: exponent of "linear" and "cosine"; above 1, guidance starts later.
            guidance_interval: fractions of an image's codes between which guidance acts; (0.0, 1.0) guides all codes.
                A code without guidance takes half the computation.
            temperature: below 1.0 gives more typical images, above 1.0 more varied ones; 0.0 always takes the most
                likely code.
            top_k: sample from the k most likely codes; 0 samples from all.
            top_p: sample from the most likely codes whose probabilities add up to top_p.
            min_p: exclude codes less than min_p times as likely as the most likely one.
            generator: one generator, which draws a seed for each image, or a list with one generator for each image.
                In float32, an image depends only on its seed, its label and the options, not on the other images.
            output_type: "pil", "np" (N, H, W, C), "pt" (N, C, H, W), both in [0, 1], or "codes" (not decoded).
            batch_size: images sampled at once; by default as many as fit in memory, at most 64 on a CPU, 256 on CUDA.
            callback_on_step_end: called after each step with the position and the codes `(n,)` sampled there.

        Returns:
            [`VQGANPipelineOutput`].

        Raises:
            ValueError: an argument is out of range. The message names it, the value received and what is allowed.
        """
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"output_type: received {output_type!r}; allowed are {', '.join(map(repr, OUTPUT_TYPES))}")
        if batch_size is not None:
            _check_count("batch_size", batch_size)
        options = SamplingOptions(
            guidance_scale=guidance_scale,
            guidance_schedule=guidance_schedule,
            guidance_power=guidance_power,
            guidance_interval=guidance_interval,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
        )
        self._check_conditions(options, has_labels=class_labels is not None)
        prompts = self._prompts(class_labels, num_images, num_images_per_label)
        seeds = draw_seeds(len(prompts), generator).to(self.device)
        codes, images = [], []
        for batch in self._sample(prompts, seeds, options, batch_size, callback_on_step_end):
            codes.append(batch)
            if output_type != "codes":
                for part in batch.split(images_at_once(self.vqgan, self.layout.pixels)):
                    # not decode_codes: its check of the codes would wait for the GPU
                    decoded = self.vqgan.decode(self.vqgan.quantize.lookup(part))
                    images.append(self.image_processor.postprocess(decoded, output_type))
        return VQGANPipelineOutput(images=_join(images, output_type), codes=torch.cat(codes))

    __call__ = generate

    @torch.no_grad()
    def encode(self, images: Any) -> Tensor:
        """Encodes images into codes int64 `(N, h, w)`. Images are PIL images, arrays or tensors, one or a list."""
        pixel_values = self.image_processor(images)["pixel_values"]
        parts = pixel_values.split(images_at_once(self.vqgan, self.layout.pixels))
        return torch.cat([self.vqgan.encode(part.to(self.device, self.vqgan.dtype)).codes for part in parts])

    @torch.no_grad()
    def decode(self, codes: Tensor, output_type: str = "pil") -> Any:
        """Decodes int64 codes `(N, h, w)` into images. `output_type` is "pil", "np" or "pt"; see `generate`."""
        codes = torch.as_tensor(codes).to(self.device, torch.int64)
        parts = codes.split(images_at_once(self.vqgan, self.layout.pixels))
        images = [self.image_processor.postprocess(self.vqgan.decode_codes(part), output_type) for part in parts]
        return _join(images, output_type)

    def reconstruct(self, images: Any, output_type: str = "pil") -> Any:
        """Encodes and decodes images. No prior can generate images of higher fidelity than these reconstructions."""
        return self.decode(self.encode(images), output_type)

    # ------------------------------------------------------------------ saving and loading

    def save_pretrained(
        self, save_directory: str | Path, push_to_hub: bool = False, repo_id: str | None = None, **kwargs: Any
    ) -> None:
        """Saves the pipeline as a folder that `from_pretrained` loads and that the Hub accepts unchanged.

        Args:
            save_directory: created if it does not exist. Adapters of the prior are merged into the saved copy.
            push_to_hub: upload the pipeline too.
            repo_id: repository of the upload; by default the name of the folder.
            **kwargs: passed to the models' `save_pretrained`, for instance `max_shard_size`.

        Raises:
            ValueError: the prior has adapters that cannot be merged.
        """
        hub.save(save_directory, **self.components, **kwargs)
        if push_to_hub:
            self.push_to_hub(repo_id or Path(save_directory).name)

    def push_to_hub(
        self, repo_id: str, private: bool | None = None, commit_message: str = "Upload pipeline", **kwargs: Any
    ) -> str:
        """Uploads the pipeline's folder, with its model card, to the Hugging Face Hub.

        Args:
            repo_id: "user/name"; the repository is created if it does not exist.
            private: whether to create the repository as private.
            commit_message: message of the upload's commit.
            **kwargs: `token`, `revision` and other options of `huggingface_hub.HfApi.upload_folder`.

        Returns:
            URL of the commit.

        Raises:
            ValueError: a file to upload holds a secret or the path of your home folder.
        """
        return hub.push(repo_id, self.components, private, commit_message, **kwargs)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        dtype: torch.dtype | str | None = None,
        device: torch.device | str | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        *,
        device_map: str | int | torch.device | dict[str, Any] | None = None,
        attn_implementation: str | None = None,
        local_files_only: bool = False,
        subfolder: str = "",
        trust_remote_code: bool = False,
    ) -> "VQGANPipeline":
        """Loads a pipeline. It reads safetensors only, and nothing outside the folder.

        Args:
            pretrained_model_name_or_path: folder, or repository on the Hugging Face Hub.
            dtype: dtype of the weights, for instance `torch.bfloat16`; by default float32.
            device: device of both models; by default the CPU.
            revision, token, cache_dir, local_files_only: options of the download, as in `huggingface_hub`.
            device_map: another name of `device`, as in transformers: "auto", a device, or `{"": device}`.
            attn_implementation: attention of the prior, as in transformers; by default transformers chooses.
            subfolder: path of the pipeline inside the folder or repository.
            trust_remote_code: run the Python files that the prior's config.json names. Inspect them first.

        Raises:
            FileNotFoundError: the folder holds no pipeline.
            OSError: a file is missing or damaged.
            ValueError: the files do not fit one another, or refer to code or files outside the folder.
        """
        where = hub.one_device(device, device_map)
        download = {"revision": revision, "token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}
        folder = hub.find(pretrained_model_name_or_path, subfolder, **download)
        pipeline = cls(**hub.load(folder, dtype, attn_implementation, trust_remote_code))
        return pipeline if where is None else pipeline.to(where)

    # ------------------------------------------------------------------ helpers

    def _sample(
        self,
        prompts: Tensor,
        seeds: Tensor,
        options: SamplingOptions,
        batch_size: int | None,
        callback_on_step_end: Callable[[int, Tensor], None] | None,
    ) -> Iterator[Tensor]:
        """Yields codes int64 `(n, h, w)`, batch by batch. One progress bar covers all batches."""
        length = self.layout.length
        if batch_size is None:
            batch_size = batch_size_that_fits(self.prior, length, options.guided)
        batches = -(-len(prompts) // batch_size)
        batch_size = -(-len(prompts) // batches)  # spread the images evenly over the batches
        with (
            self._decoders.borrow(self.prior, batch_size * (2 if options.guided else 1)) as decoder,
            tqdm(total=batches * length, **{"desc": "sampling", "unit": "code", **self._progress_bar}) as bar,
        ):
            for labels, some_seeds in zip(prompts.split(batch_size), seeds.split(batch_size), strict=True):
                count = len(labels)
                # fill up the last batch: with one batch size, one recorded step serves all batches
                fill = torch.arange(batch_size, device=labels.device).clamp(max=count - 1)

                def on_step(position: int, chosen: Tensor, count: int = count) -> None:
                    bar.update()
                    if callback_on_step_end is not None:
                        callback_on_step_end(position, chosen[:count].clone())

                null = torch.full_like(labels, self.layout.null_token)
                codes = sample(
                    decoder,
                    labels[fill],
                    null[fill],
                    some_seeds[fill],
                    length,
                    self.layout.num_codes,
                    options,
                    on_step,
                )
                yield codes[:count].view(-1, *self.layout.grid)

    def _check_conditions(self, options: SamplingOptions, has_labels: bool) -> None:
        """Checks that the prior has the null token if guidance or unconditional images need it."""
        if not self.layout.has_null and (options.guided or not has_labels):
            what = "guidance_scale" if has_labels else "class_labels"
            raise ValueError(
                f"{what}: this prior was trained without condition dropout, so it has not learnt the null token; "
                "it needs class_labels and guidance_scale 1.0"
            )
        if options.guided and not has_labels:
            raise ValueError(
                f"guidance_scale: received {options.guidance_scale}; guidance needs class_labels (or use 1.0)"
            )

    def _prompts(self, class_labels: Any, num_images: int | None, num_images_per_label: int) -> Tensor:
        """The condition tokens of the images, int64 `(N, 1)`."""
        if class_labels is None:
            if num_images_per_label != 1:
                raise ValueError(
                    f"num_images_per_label: received {num_images_per_label}; needs class_labels (use num_images for "
                    "unconditional images)"
                )
            count = 1 if num_images is None else num_images
            _check_count("num_images", count)
            return torch.full((count, 1), self.layout.null_token, device=self.device)
        if num_images is not None:
            raise ValueError(
                f"num_images: received {num_images}; cannot be given with class_labels (use num_images_per_label)"
            )
        if isinstance(class_labels, Tensor | np.ndarray):
            class_labels = class_labels.flatten().tolist()
        one = isinstance(class_labels, str) or not isinstance(class_labels, Iterable)
        labels = [class_labels] if one else list(class_labels)
        if not labels:
            raise ValueError("class_labels: received an empty list; needs at least one label")
        _check_count("num_images_per_label", num_images_per_label)
        ids = self.layout.class_ids(labels).repeat_interleave(num_images_per_label)
        return self.layout.class_tokens(ids)[:, None].to(self.device)


def _check_count(name: str, count: Any) -> None:
    if not isinstance(count, Integral) or count < 1:
        raise ValueError(f"{name}: received {count!r}; must be a whole number from 1 up")


def _join(batches: list[Any], output_type: str) -> Any:
    """Joins the images of all batches."""
    if output_type == "codes":
        return None
    if output_type == "pil":
        return [image for batch in batches for image in batch]
    return torch.cat(batches) if output_type == "pt" else np.concatenate(batches)
