"""VQGANPipeline: sample codes from the prior, decode them with the tokenizer.

Shape letters: N images, h w code grid, L codes of an image, K codebook size. Codes are `(N, h, w)`, or, if the
tokenizer has several codes at each position or several grids, `(N, h, w, G)` or `(N, L)`.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from configs.arguments import instance
from pipelines import hub
from pipelines.arguments import (
    require_device,
    require_dtype,
    require_loading,
    require_move,
    require_upload,
    shard_size,
)
from pipelines.best_of import BestOf, ImageScore, require_best_of
from pipelines.coding import Coding, joined_images
from pipelines.compression import Compression
from pipelines.conditions import ConditionTokenizer, ImageTokenizer, require_tokenizers
from pipelines.defaults import checked_defaults
from pipelines.editing import Editing
from pipelines.outputs import VQGANPipelineOutput, pipeline_text
from pipelines.requests import Request, prompt_tokens, require_memory
from pipelines.sampling import CodeSampler
from pipelines.scoring import Scoring
from pipelines.windows import larger_grid
from stage1_vqgan import VQGANImageProcessor, VQGANModel
from stage2_prior import GuidanceSchedule, SamplingOptions, TokenLayout, UnmaskingOptions, UnmaskingOrder


class VQGANPipeline(Coding, Editing, BestOf, Scoring, Compression):
    """Generates images: the prior samples codes, the tokenizer decodes them.

    Args:
        vqgan: the tokenizer.
        prior: causal or masked language model over the tokenizer's codes.
        image_processor: converts images into pixel values and back.
        layout: meaning of the prior's tokens.
        conditions: tokenizers of the texts and of the condition images that the prior takes, by the names of its
            conditions. Condition images with the codes of `vqgan` need none.
        sampling_defaults: see the property of this name.

    Raises:
        ValueError: the prior was trained on the codes of another tokenizer, or the layout does not fit the tokenizer or
            the prior's vocabulary or family, or a tokenizer of the conditions is missing or another one than in the
            training, or a sampling default is unknown or out of range.
    """

    def __init__(
        self,
        vqgan: VQGANModel,
        prior: PreTrainedModel,
        image_processor: VQGANImageProcessor,
        layout: TokenLayout,
        conditions: Mapping[str, ConditionTokenizer] | None = None,
        sampling_defaults: Mapping[str, Any] | None = None,
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
        self._sampling_defaults = checked_defaults(layout, {} if sampling_defaults is None else sampling_defaults)
        self._sampler = CodeSampler(layout)
        self._origin: Path | None = None  # the folder that it was loaded from

    # ------------------------------------------------------------------ components and devices

    @property
    def components(self) -> dict[str, Any]:
        """The models, image processor, layout, conditions and defaults, by the names of the constructor's arguments."""
        return {
            "vqgan": self.vqgan,
            "prior": self.prior,
            "image_processor": self.image_processor,
            "layout": self.layout,
            "conditions": self.conditions,
            "sampling_defaults": dict(self.sampling_defaults),
        }

    @property
    def sampling_defaults(self) -> Mapping[str, Any]:
        """What `generate` and the edits use for sampling arguments that are left out, by their names; read-only.

        An argument that is not in it has the standard value that `generate` states. The defaults are saved with the
        pipeline. `tessella tune` chooses them; `pipe.sampling_defaults = {"guidance_scale": 1.5}` sets others, and {}
        removes them. The guidance scale of a condition has no effect on a request without it. A setting raises a
        ValueError if a name is unknown or a value out of range.
        """
        return MappingProxyType(self._sampling_defaults)

    @sampling_defaults.setter
    def sampling_defaults(self, values: Mapping[str, Any]) -> None:
        self._sampling_defaults = checked_defaults(self.layout, values)

    @property
    def device(self) -> torch.device:
        """The device of all models."""
        return self.prior.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights."""
        return self.prior.dtype

    def __repr__(self) -> str:
        return pipeline_text(self.vqgan, self.prior, self.layout, self.sampling_defaults)

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
        guidance_scale: float | Sequence[float] | Mapping[str, float | Sequence[float]] | None = None,
        guidance_schedule: GuidanceSchedule | None = None,
        guidance_power: float | None = None,
        guidance_interval: tuple[float, float] | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
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
        best_of: int = 1,
        best_by: str | ImageScore | None = None,
    ) -> VQGANPipelineOutput:
        """Generates images.

        A prior may have several conditions, `pipe.layout.conditions`. Each is given alone, or in a dictionary by its
        name, `{name: value}`. A value without a list serves all images; lists have one length. A condition that is
        left out is a null token, if the prior has learnt to do without it.

        The arguments from guidance_scale to order_temperature that are left out or None are those of
        `pipe.sampling_defaults`, which are saved with the pipeline. What is not in there has the standard value that is
        stated below. An argument that is given always wins. A default guidance scale acts on the conditions that are
        given; that of a condition that is left out has no effect. As an argument, such a scale is refused.

        Args:
            class_labels: ids or names of classes. Without labels, the images are unconditional.
            num_images: number of images if class_labels and lists are not given (default 1).
            num_images_per_label: number of images for each class label, or for each prompt of several conditions;
                images of one label are adjacent in the output.
            guidance_scale: strength of the classifier-free guidance; 1.0 is no guidance (standard), 1.5 to 3 is usual.
                A number guides by all conditions together, `{name: number}` by each named one with a scale of its own,
                and the name "a+b" by a and b together. Each scale takes one more prediction for each code. In place of
                a number, a list has one for each prompt, or for each of `num_images`: element n of all lists makes
                prompt n. An image is the same as alone with its scale.
            guidance_schedule: "constant" (standard); "linear" and "cosine" raise the guidance from 1.0 at the first
                code towards guidance_scale at the last code, so that images vary more.
            guidance_power: exponent of "linear" and "cosine", 1.0 as standard; above 1, guidance starts later.
            guidance_interval: fractions of an image's codes between which guidance acts; (0.0, 1.0) guides all codes
                (standard). A code without guidance takes half the computation.
            temperature: 1.0 as standard; below, images are more typical, above more varied; 0.0 always takes the most
                likely code.
            top_k: sample from the k most likely codes; 0 samples from all (standard).
            top_p: sample from the most likely codes whose probabilities add up to top_p; 1.0 is all (standard).
            min_p: exclude codes less than min_p times as likely as the most likely one; 0.0 excludes none (standard).
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
            best_of: sample so many candidates of each image, up to 1,000, and keep the best one. The first candidate
                has the seed of the image, the others have hashes of it. `out.seeds` are those of the chosen ones, and
                make them again without best_of; `out.scores` are their scores.
            best_by: what is best: "likelihood", the highest ln p(codes | prompt); "class", the highest
                ln p(class | codes) of the class asked for, by Bayes' rule with equally probable classes, which takes a
                forward for each class; or the highest value of a function of `(images, labels)`: PIL images and their
                classes as in `out.labels`, or None. It returns one number for each. A masked prior has no likelihood,
                and takes functions only. Of several conditions with classes, the name of one stands in place of
                "class".

        Returns:
            [`VQGANPipelineOutput`].

        Raises:
            ValueError: an argument is out of range. The message names it, the value received and what is allowed.
        """
        request = self._request(
            lambda given: prompt_tokens(
                *(given, num_images, num_images_per_label, self.vqgan, self.layout, output_type, self._tokenizers),
                guidance_scale,
            ),
            *(class_labels, seed, generator, output_type, batch_size, callback_on_step_end),
            *(text, condition_images, guidance_scale),
            num_steps=num_steps,
            order=order,
            order_temperature=order_temperature,
            guidance_schedule=guidance_schedule,
            guidance_power=guidance_power,
            guidance_interval=guidance_interval,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
        )
        is_larger = image_size is not None and larger_grid(self.layout, image_size) != self.layout.grid
        count = require_best_of(self.layout, best_of, best_by, request.given, is_larger)
        sample = partial(self._codes, image_size=image_size)
        batches: Iterable[Tensor] = sample(request)
        scores = None
        if best_by is not None:
            request, best = self._best_of(request, count, best_by, sample)
            batches, scores = [best.codes], best.scores.tolist()
        out = self._output(batches, output_type, request.labels, request.seeds)
        out.prompts, out.scores = request.asked, scores
        return out

    __call__ = generate

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

    def _codes(self, request: Request, image_size: int | tuple[int, int] | None) -> Iterator[Tensor]:
        """Samples the codes of a request, batch by batch."""
        if image_size is None:
            yield from self._sampled_for(request, request.seeds)
            return
        grid, count = larger_grid(self.layout, image_size), len(request.prompts)
        pixels = grid[0] * grid[1] * self.layout.downsampling_factor**2
        require_memory("image_size", image_size, count, pixels, self.vqgan, self.layout, request.output_type)
        known = torch.full((count, *grid, *self.layout.codes_shape[2:]), -1, device=self.device)
        yield self._sample(request, known)

    def _output(
        self, batches: Iterable[Tensor], output_type: str, labels: list[str] | None, seeds: Tensor
    ) -> VQGANPipelineOutput:
        """Collects sampled codes, and decodes each batch when it is sampled."""
        codes, images = [], []
        for batch in batches:
            codes.append(batch)
            if output_type != "codes":
                images += self._decoded(batch, output_type)
        return VQGANPipelineOutput(joined_images(images, output_type), torch.cat(codes), labels, seeds.tolist())
