"""Grids of sampled images. Every evaluation uses the same labels and seeds, so that the grids show the progress."""

from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import TrainerCallback

from configs import ConfigError, Problem
from configs.run_folder import RunFolder
from stage1_vqgan import VQGANImageProcessor, VQGANModel, labelled_grid, load_tokenizer
from stage2_prior.code_store import CodeStore
from stage2_prior.sampling.loop import sample_codes
from stage2_prior.sampling.options import SamplingOptions
from stage2_prior.training.grid_prompts import grid_rows
from stage2_prior.training.trackers import track_image
from stage2_prior.vocabulary import TokenLayout

GUIDANCE_SCALE = 1.5  # as in the model card's example

# Number of images decoded at once: the activations of a decoder are larger than those of a prior.
DECODE_BATCH_SIZE = 8


class SampleGrids(TrainerCallback):
    """Samples from the evaluated weights, and saves the images in the folder of the run and in the trackers.

    A row shows one class, out of up to ten that are spread evenly over all classes; with further conditions, the prompt
    of one validation image. Samples are guided if the prior learns the null token. All processes sample the same
    images, because a forward needs the shards of all processes. The main process decodes the images.

    Args:
        trainer: the prior's Trainer; its TensorBoard, Weights & Biases and trackio callbacks log the images.
        run: the run, whose folder gets `samples/step_00001000.png`.
        store: the code store.
        layout: the token layout.
        tokenizer: folder or Hub id.
        num_images: images in a grid.
        seed: `pipe.generate(labels, seed=seed, guidance_scale=1.5)` gives the same images.

    Raises:
        ConfigError: the tokenizer is missing, or the codes are of another tokenizer.
    """

    def __init__(
        self,
        trainer: Any,
        run: RunFolder,
        store: CodeStore,
        layout: TokenLayout,
        tokenizer: str,
        num_images: int,
        seed: int,
    ):
        self.trainer, self.run, self.layout = trainer, run, layout
        self.tokenizer, self.processor = load_decoder(tokenizer, layout)
        self.columns, self.prompts, self.names = grid_rows(store, layout, num_images)
        self.seeds = seed + torch.arange(num_images)
        guided = layout.has_null and (layout.num_classes > 0 or len(layout.segments) > 0)
        self.options = SamplingOptions(guidance_scale=GUIDANCE_SCALE if guided else 1.0)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        layout = self.layout
        prompts, seeds = self.prompts.to(args.device), self.seeds.to(args.device)
        nulls = layout.null_prompt().to(args.device).expand_as(prompts).contiguous()
        codes = sample_codes(self.trainer.model, prompts, nulls, seeds, layout.length, layout.num_codes, self.options)
        if state.is_world_process_zero:
            image = self.draw(codes)
            self.run.save_image("samples", image, state.global_step)
            track_image(self.trainer.callback_handler.callbacks, "samples", image, state.global_step)

    @torch.no_grad()
    def draw(self, codes: Tensor) -> Image.Image:
        """Decodes int64 codes `(N, L)` into a grid of images."""
        tokenizer: Any = self.tokenizer
        tokenizer.to(codes.device)
        batches = codes.unflatten(1, self.layout.codes_shape).split(DECODE_BATCH_SIZE)
        images = [
            image
            for batch in batches
            for image in self.processor.postprocess(tokenizer.decode_codes(batch, self.layout.grid))
        ]
        tokenizer.to("cpu")
        rows = [(name, images[n * self.columns : (n + 1) * self.columns]) for n, name in enumerate(self.names)]
        return labelled_grid(rows, self.columns, min_tile=48)


def load_decoder(name: str, layout: TokenLayout) -> tuple[VQGANModel, VQGANImageProcessor]:
    """Loads the tokenizer of the codes that a prior learns, and its image processor.

    Raises:
        ConfigError: the tokenizer is missing, or the codes are of another tokenizer.
    """
    advice = "sample grids need it: give its folder or Hub id, or set num_sample_images 0"
    try:
        tokenizer, processor = load_tokenizer(name), VQGANImageProcessor.from_pretrained(name)
    except ConfigError as error:
        raise ConfigError(
            [Problem(problem.key, f"{problem.message}; {advice}") for problem in error.problems]
        ) from error
    except (OSError, ValueError) as error:
        message = f"received {name!r}; its preprocessor_config.json is missing or cannot be read; {advice}"
        raise ConfigError([Problem("tokenizer", message)]) from error
    try:
        layout.require_fingerprint(tokenizer.config.fingerprint, advice=advice)
        layout.set_image_size(tokenizer, processor)
        layout.require_tokenizer(tokenizer, advice)
    except ValueError as error:
        raise ConfigError([Problem.of_error(error)]) from error
    return tokenizer, processor
