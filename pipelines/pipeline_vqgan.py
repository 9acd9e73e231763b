"""VQGANPipeline: sample codes from the prior, decode them with the tokenizer.

Shape letters: N images, h w code grid, L codes of an image, K codebook size. Codes are `(N, h, w)`, or, if the
tokenizer has several codes at each position or several grids, `(N, h, w, G)` or `(N, L)`.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from configs.arguments import choice, instance, whole
from pipelines import hub
from pipelines.arguments import (
    int64_codes,
    require_device,
    require_dtype,
    require_loading,
    require_move,
    require_upload,
    shard_size,
)
from pipelines.chunks import encode_in_chunks, images_at_once
from pipelines.compression import Compression
from pipelines.conditions import ConditionTokenizer, ImageTokenizer, require_tokenizers
from pipelines.editing import Editing
from pipelines.outputs import OUTPUT_TYPES, VQGANPipelineOutput, pipeline_text
from pipelines.prompts import asked_prompts, given_conditions, guidance_groups, require_learnt
from pipelines.requests import image_seeds, prompt_tokens, require_memory, unmasking_options
from pipelines.sampling import CodeSampler
from pipelines.scoring import Scoring
from pipelines.windows import larger_grid, sample_windows
from stage1_vqgan import VQGANImageProcessor, VQGANModel
from stage2_prior import (
    CLASS,
    GuidanceSchedule,
    SamplingOptions,
    TokenLayout,
    UnmaskingOptions,
    UnmaskingOrder,
    require_callback,
)


class VQGANPipeline(Editing, Scoring, Compression):
    """Generates images: the prior samples codes, the tokenizer decodes them.

    Args:
        vqgan: the tokenizer.
        prior: causal or masked language model over the tokenizer's codes.
        image_processor: converts images into pixel values and back.
        layout: meaning of the prior's tokens.
        conditions: tokenizers of the texts and of the condition images that the prior takes, by the names of its
            conditions. Condition images with the codes of `vqgan` need none.

    Raises:
        ValueError: the prior was trained on the codes of another tokenizer, or the layout does not fit the tokenizer or
            the prior's vocabulary or family, or a tokenizer of the conditions is missing or another one than in the
            training.
    """

    def __init__(
        self,
        vqgan: VQGANModel,
        prior: PreTrainedModel,
        image_processor: VQGANImageProcessor,
        layout: TokenLayout,
        conditions: Mapping[str, ConditionTokenizer] | None = None,
    ):
        layout.require_tokenizer(vqgan)
        if prior.config.vocab_size != layout.vocab_size:
            raise ValueError(
                f"prior: received a vocabulary of {prior.config.vocab_size} tokens; the layout has {layout.vocab_size}"
            )
        if prior.can_generate() != (layout.family == "causal"):
            raise ValueError(f"prior: received {type(prior).__name__}; the layout is that of a {layout.family} prior")
        self.vqgan, self.prior = vqgan.eval(), prior.eval()
        self.image_processor, self.layout = image_processor, layout
        self.conditions = dict(conditions or {})
        self._tokenizers = require_tokenizers(layout, self.conditions, ImageTokenizer(vqgan, image_processor))
        self._sampler = CodeSampler(layout)
        self._origin: Path | None = None  # the folder that it was loaded from

    # ------------------------------------------------------------------ components and devices

    @property
    def components(self) -> dict[str, Any]:
        """The models, image processor, layout and conditions, by the names of the constructor's arguments."""
        return {
            "vqgan": self.vqgan,
            "prior": self.prior,
            "image_processor": self.image_processor,
            "layout": self.layout,
            "conditions": self.conditions,
        }

    @property
    def device(self) -> torch.device:
        """The device of all models."""
        return self.prior.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights."""
        return self.prior.dtype

    def __repr__(self) -> str:
        return pipeline_text(self.vqgan, self.prior, self.layout)

    @property
    def class_names(self) -> list[str]:
        """Names of the classes, in the order of their ids; empty for an unconditional pipeline."""
        return list(self.layout.class_names)

    def to(self, *args: Any, **kwargs: Any) -> "VQGANPipeline":
        """Moves or casts all models. The arguments are those of `torch.nn.Module.to`.

        Raises:
            ValueError: there is no such device, or the dtype cannot hold weights.
        """
        require_move("device or dtype", *args, **kwargs)
        others = [one.vqgan for one in self.conditions.values() if isinstance(one, ImageTokenizer)]
        for model in (self.vqgan, self.prior, *others):
            model.to(*args, **kwargs)
        return self

    def set_progress_bar_config(self, **kwargs: Any) -> None:
        """Sets options of tqdm for the progress bar; `disable=True` hides it."""
        self._sampler.progress_bar = kwargs

    def compile(self) -> None:
        """Compiles the forward of a causal prior and the tokenizer's decoder with torch.compile.

        The first batch then takes some minutes longer. Later batches of the same size are faster.
        """
        self._sampler.decoders.compiled = True
        self.vqgan.decoder.compile(dynamic=False)

    # ------------------------------------------------------------------ images

    @torch.no_grad()
    def generate(
        self,
        class_labels: int | str | Sequence[int | str] | Mapping[str, Any] | None = None,
        num_images: int | None = None,
        num_images_per_label: int = 1,
        guidance_scale: float | Mapping[str, float] = 1.0,
        guidance_schedule: GuidanceSchedule = "constant",
        guidance_power: float = 1.0,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        num_steps: int | None = None,
        order: UnmaskingOrder | None = None,
        order_temperature: float | None = None,
        seed: int | list[int] | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "pil",
        batch_size: int | None = None,
        callback_on_step_end: Callable[[int, Tensor], None] | None = None,
        image_size: int | tuple[int, int] | None = None,
        *,
        text: str | Sequence[str] | Mapping[str, Any] | None = None,
        condition_images: Any = None,
    ) -> VQGANPipelineOutput:
        """Generates images.

        A prior may have several conditions, `pipe.layout.conditions`. Each is given alone, or in a dictionary by its
        name, `{name: value}`. A value without a list serves all images; lists have one length. A condition that is
        left out is a null token, if the prior has learnt to do without it.

        Args:
            class_labels: ids or names of classes. Without labels, the images are unconditional.
            num_images: number of images if class_labels and lists are not given (default 1).
            num_images_per_label: number of images for each class label, or for each prompt of several conditions;
                images of one label are adjacent in the output.
            guidance_scale: strength of the classifier-free guidance; 1.0 is no guidance, 1.5 to 3 is usual. A number
                guides by all conditions together, `{name: number}` by each named one with a scale of its own, and the
                name "a+b" by a and b together. Each scale takes one more prediction for each code.
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
            num_steps: of a masked prior, the number of its predictions for an image, 12 by default and at most one for
                each code. A causal prior has none, and refuses this and the next two.
            order: of a masked prior: "confidence" first chooses the codes of which the prior is surest (default),
                "halton" chooses codes far from each other, in the same order for all images.
            order_temperature: of the order "confidence", weight of its random part, 4.5 by default. More makes images
                more varied and less typical.
            seed: the seed of the first image; the next images have seed + 1, seed + 2, …. Or a list with the seed of
                each image. In float32, an image depends only on its seed, its label and the options, not on the other
                images. From 0 to 2**63 - 1.
            generator: in place of seed: one generator, which draws a seed for each image, or a list with one generator
                for each image. So seed=0 and a generator with manual_seed(0) make different images. Without seed and
                generator, torch's global generator draws the seeds.
            output_type: "pil", "np" (N, H, W, C), "pt" (N, C, H, W), both in [0, 1], or "codes" (not decoded).
            batch_size: images sampled at once; by default as many as fit in memory, at most 64 on a CPU, 256 on CUDA.
            callback_on_step_end: called after each step with the position and the codes `(n,)` sampled there; for a
                masked prior, with the step and all codes `(n, L)`, -1 where one is not chosen yet.
            image_size: height and width of larger images than those of the training, in pixels, or the side of a
                square; multiples of the downsampling factor. Windows of the trained size slide over the larger grid of
                codes, see `pipelines/windows.py`. The steps of callback_on_step_end are then those of each window.
            text: texts. A text of more tokens than the prior takes loses its end, as in the training.
            condition_images: PIL images, arrays or tensors, see [`VQGANImageProcessor`]: the condition itself, such as
                the gray image, or the image that "gray", "mask" or "downscale" make it from; for "edges", a drawing.
                They are resized to the size of the condition.

        Returns:
            [`VQGANPipelineOutput`].

        Raises:
            ValueError: an argument is out of range. The message names it, the value received and what is allowed.
        """
        choice("output_type", output_type, OUTPUT_TYPES)
        if batch_size is not None:
            batch_size = whole("batch_size", batch_size)
        require_callback("callback_on_step_end", callback_on_step_end)
        scales, groups = guidance_groups(self.layout, guidance_scale)
        options = SamplingOptions(
            guidance_scale=scales,
            guidance_schedule=guidance_schedule,
            guidance_power=guidance_power,
            guidance_interval=guidance_interval,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
        )
        unmasking = unmasking_options(self.layout, num_steps, order, order_temperature)
        given = given_conditions(self.layout, class_labels, text, condition_images)
        names = [one.segment.name for one in given]
        require_learnt(self.layout, names, options, groups)
        prompts = prompt_tokens(
            given, num_images, num_images_per_label, self.vqgan, self.layout, output_type, self._tokenizers
        )
        seeds = image_seeds(len(prompts), seed, generator)

        def sample(seeds: Tensor, known: Tensor | None = None) -> Iterator[Tensor]:
            return self._sampled(
                prompts, seeds, options, batch_size, callback_on_step_end, known, groups, unmasking=unmasking
            )

        batches: Iterable[Tensor] = sample(seeds)
        if image_size is not None:
            grid = larger_grid(self.layout, image_size)
            pixels = grid[0] * grid[1] * self.layout.downsampling_factor**2
            require_memory("image_size", image_size, len(prompts), pixels, self.vqgan, self.layout, output_type)
            known = torch.full((len(prompts), *grid, *self.layout.codes_shape[2:]), -1, device=self.device)
            batches = [sample_windows(sample, seeds, known, self.layout.grid)]
        out = self._output(batches, output_type, self.layout.names_of(prompts[:, 0]) if CLASS in names else None, seeds)
        out.prompts = asked_prompts(given, len(prompts)) if self.layout.segments else None
        return out

    __call__ = generate

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
        codes = int64_codes(codes, 1 + len(self.layout.codes_shape)).to(self.device)
        require_memory("codes", codes, len(codes), self._pixels(codes), self.vqgan, self.layout, output_type)
        self.vqgan.check_codes(codes, self.layout.grid)
        return _join(self._decoded(codes, output_type), output_type)

    def reconstruct(self, images: Any, output_type: str = "pil") -> Any:
        """Encodes and decodes images. No prior can generate images of higher fidelity than these reconstructions."""
        choice("output_type", output_type, OUTPUT_TYPES[:3])
        return self.decode(self.encode(images), output_type)

    # ------------------------------------------------------------------ saving and loading

    def save_pretrained(
        self,
        save_directory: str | Path,
        push_to_hub: bool = False,
        repo_id: str | None = None,
        max_shard_size: int | str | None = None,
        janus: bool = False,
    ) -> None:
        """Saves the pipeline as a folder that `from_pretrained` loads and that the Hub accepts unchanged.

        What you have written in its README.md stays.

        Args:
            save_directory: created if it does not exist. Adapters of the prior are merged into the saved copy.
            push_to_hub: upload the pipeline too.
            repo_id: repository of the upload; by default the name of the folder.
            max_shard_size: largest size of a file of weights, in bytes or as "5GB"; by default that of transformers.
            janus: also save the tokenizer as a `JanusVQVAE` of transformers, in the subfolder "janus".

        Raises:
            ValueError: the prior has adapters that cannot be merged, an argument has another type, the folder holds
                something else than a pipeline, or a `JanusVQVAE` cannot hold the tokenizer.
        """
        instance("save_directory", save_directory, (str, Path), "a path")
        instance("push_to_hub", push_to_hub, bool, "True or False")
        instance("janus", janus, bool, "True or False")
        repo_id = Path(save_directory).name if repo_id is None else repo_id
        if push_to_hub:
            require_upload(repo_id, None, "-", {})
        save: dict[str, Any] = {"janus": janus, "origin": self._origin, **shard_size(max_shard_size)}
        hub.save(save_directory, **self.components, **save)
        if push_to_hub:
            self.push_to_hub(repo_id, janus=janus)

    def push_to_hub(
        self,
        repo_id: str,
        private: bool | None = None,
        commit_message: str = "Upload pipeline",
        janus: bool = False,
        **kwargs: Any,
    ) -> str:
        """Uploads the pipeline's folder, with its model card, to the Hugging Face Hub.

        Args:
            repo_id: "user/name"; the repository is created if it does not exist.
            private: whether to create the repository as private.
            commit_message: message of the upload's commit.
            janus: also upload the tokenizer as a `JanusVQVAE`; see `save_pretrained`.
            **kwargs: `token`, `revision` and other options of `huggingface_hub.HfApi.create_commit`. `license` is an
                identifier of the Hub, such as "apache-2.0", for the model card.

        Returns:
            URL of the commit.

        Raises:
            TypeError: an option is unknown.
            ValueError: an argument has another type, or the repository's name is not valid.
            ValueError: a file to upload holds a secret or the path of your home folder.
        """
        require_upload(repo_id, private, commit_message, kwargs)
        instance("janus", janus, bool, "True or False")
        options = {"commit_message": commit_message, **kwargs}
        return hub.push(repo_id, self.components, private, janus, self._origin, **options)

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
        download = {"revision": revision, "token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}
        require_loading(
            pretrained_model_name_or_path=pretrained_model_name_or_path,
            subfolder=subfolder,
            attn_implementation=attn_implementation,
            trust_remote_code=trust_remote_code,
            **download,
        )
        require_dtype(dtype)
        where = require_device(device, device_map)
        folder = hub.find(pretrained_model_name_or_path, subfolder, **download)
        pipeline = cls(**hub.load(folder, dtype, attn_implementation, trust_remote_code))
        pipeline._origin = folder
        return pipeline if where is None else pipeline.to(where)

    # ------------------------------------------------------------------ helpers

    def _sampled(
        self,
        prompts: Tensor,
        seeds: Tensor,
        options: SamplingOptions,
        batch_size: int | None,
        callback_on_step_end: Callable[[int, Tensor], None] | None,
        known: Tensor | None = None,
        groups: Sequence[Sequence[str] | None] = (None,),
        unmasking: UnmaskingOptions | None = None,
    ) -> Iterator[Tensor]:
        """Samples codes `(n, *codes_shape)` batch by batch; see `CodeSampler.batches` for the arguments."""
        prompts, seeds = prompts.to(self.device), seeds.to(self.device)
        known = None if known is None else known.to(self.device)
        return self._sampler.batches(
            self.prior, prompts, seeds, options, batch_size, callback_on_step_end, known, groups, unmasking
        )

    def _output(
        self, batches: Iterable[Tensor], output_type: str, labels: list[str] | None, seeds: Tensor
    ) -> VQGANPipelineOutput:
        """Collects sampled codes, and decodes each batch when it is sampled."""
        codes, images = [], []
        for batch in batches:
            codes.append(batch)
            if output_type != "codes":
                images += self._decoded(batch, output_type)
        return VQGANPipelineOutput(_join(images, output_type), torch.cat(codes), labels, seeds.tolist())

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


def _join(batches: list[Any], output_type: str) -> Any:
    """Joins the images of all batches."""
    if output_type == "codes":
        return None
    if output_type == "pil":
        return [image for batch in batches for image in batch]
    return torch.cat(batches) if output_type == "pt" else np.concatenate(batches)
