"""Command that measures how well a tokenizer reconstructs the images of a data set.

Usage: `python -m stage1_vqgan.evaluate --model DIR --data.dataset NAME`.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from configs import Section, run
from configs.sections import BatchSize, NonNegative, worker_problems
from stage1_vqgan.data.config import DataConfig


@dataclass(kw_only=True)
class ReconstructionConfig(Section):
    """Measures how well a tokenizer reconstructs the images of a split.

    model: folder or Hub id of a trained tokenizer
    split: "train" or "validation"
    per_device_eval_batch_size: images in one forward pass
    dataloader_num_workers: processes that decode images; 0 decodes in the main process
    """

    model: str
    data: DataConfig
    split: Literal["train", "validation"] = "validation"
    per_device_eval_batch_size: BatchSize = 64
    dataloader_num_workers: NonNegative = 0

    def problems(self) -> Iterable[tuple[str, Any, str]]:
        yield from worker_problems(self)


def evaluate(config: ReconstructionConfig) -> dict[str, float]:
    """Measures a tokenizer on every image of a split, and prints the metrics as JSON."""
    # These imports are slow, so they come after the check of the arguments.
    import torch
    from tqdm.auto import tqdm

    from stage1_vqgan.data.dataset import ImageDataset
    from stage1_vqgan.data.loading import evaluation_loader
    from stage1_vqgan.data.skipped import SkippedImages
    from stage1_vqgan.data.sources import load_images
    from stage1_vqgan.pretrained import load_tokenizer, trained_range
    from stage1_vqgan.reconstruction import evaluate_reconstruction

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = load_tokenizer(config.model, "model")
    model.to(device)  # type: ignore[arg-type]
    source = load_images(config.data)[0 if config.split == "train" else 1]
    dataset = ImageDataset(
        source,
        model.config.image_shape,
        model.config.in_channels,
        aspect_ratio=config.data.aspect_ratio,
        value_range=trained_range(config.data, config.model),
    )
    loader = evaluation_loader(dataset, config.per_device_eval_batch_size, config.dataloader_num_workers)
    skipped = SkippedImages(config.data.max_skipped_fraction, {config.split: source.num_images})
    batches = skipped.watch(config.split, tqdm(loader, desc="evaluating", unit="batch"))
    metrics = evaluate_reconstruction(model, batches)
    skipped.exchange()
    print(json.dumps(metrics, indent=2))
    return metrics


if __name__ == "__main__":
    run(ReconstructionConfig, evaluate, "python -m stage1_vqgan.evaluate")
