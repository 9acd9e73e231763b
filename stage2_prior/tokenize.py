"""Images → code store: `accelerate launch -m stage2_prior.tokenize CONFIG [--key value ...]`."""

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm.auto import tqdm

from configs import ConfigError, Problem, run
from configs.run_folder import write_json
from stage1_vqgan import (
    ImageDataset,
    ImageKey,
    ImageSource,
    VQGANModel,
    keyed_loader,
    load_images,
    load_tokenizer,
    normalize,
)
from stage2_prior.code_store import MANIFEST_NAME, SHARD_ROWS, CodeStore, code_dtype, shard_path, write_shard
from stage2_prior.training_config import Stage2Config
from stage2_prior.vocabulary import TokenLayout


def tokenize(config: Stage2Config) -> CodeStore:
    """Makes the code store of a configuration, or finishes one that was interrupted; shards that are there are kept.

    Raises:
        ConfigError: the folder holds codes that were made with other settings.
    """
    accelerator = Accelerator()
    model = load_tokenizer(config.tokenizer).to(accelerator.device)
    folder = Path(config.code_store)
    origin = {
        "tokenizer_fingerprint": model.config.fingerprint,
        "data": asdict(config.data),
        "num_views": config.num_views,
        "seed": config.seed,
    }
    train, validation = load_images(config.data)
    origin |= {"images": [len(train), len(validation)], "class_names": train.class_names}
    if accelerator.is_main_process:
        _claim(folder, origin)
    accelerator.wait_for_everyone()
    if (folder / MANIFEST_NAME).is_file():
        accelerator.print(f"{folder} holds these codes already; nothing to do")
        return CodeStore(folder)

    started = time.perf_counter()
    splits = {"train": (train, config.num_views), "validation": (validation, 1)}
    for name, (source, num_views) in splits.items():
        _tokenize_split(config, accelerator, model, name, source, num_views)
    accelerator.wait_for_everyone()

    if accelerator.is_main_process:
        seconds = time.perf_counter() - started
        layout = TokenLayout(
            num_codes=model.config.num_embeddings,
            class_names=tuple(train.class_names or ()),
            grid=(model.config.grid_size, model.config.grid_size),
            downsampling_factor=model.config.downsampling_factor,
            tokenizer_fingerprint=str(model.config.fingerprint),
        )
        rows = {name: {"images": len(source), "rows": len(source) * views} for name, (source, views) in splits.items()}
        manifest = {"token_layout": layout.to_dict(), "splits": rows, "origin": origin, "seconds": round(seconds, 1)}
        write_json(folder / MANIFEST_NAME, manifest)
        total = sum(split["rows"] for split in rows.values())
        print(
            f"{total:,} sequences of {layout.length} codes saved in {folder.resolve()} "
            f"({total / seconds:,.0f} images/s)"
        )
    accelerator.wait_for_everyone()
    return CodeStore(folder)


@torch.inference_mode()
def _tokenize_split(
    config: Stage2Config, accelerator: Accelerator, model: VQGANModel, name: str, source: ImageSource, num_views: int
) -> None:
    """Writes this process's shards of a split: shard number modulo processes."""
    size, channels = model.config.image_size, model.config.in_channels
    dataset = ImageDataset(source, size, channels, config.data.augmentation, config.seed, first_view_plain=True)
    rows = len(source) * num_views
    shards = range(accelerator.process_index, -(-rows // SHARD_ROWS), accelerator.num_processes)
    shards_to_do = [shard for shard in shards if not shard_path(config.code_store, name, shard).is_file()]
    total = sum(min(SHARD_ROWS, rows - shard * SHARD_ROWS) for shard in shards_to_do)
    bar = tqdm(total=total, desc=f"tokenizing {name}", unit="image", disable=not accelerator.is_main_process)
    for shard in shards_to_do:
        numbers = np.arange(shard * SHARD_ROWS, min(rows, (shard + 1) * SHARD_ROWS))
        views, images = np.divmod(numbers, len(source))
        keys = [ImageKey(0, int(image), int(view)) for image, view in zip(images, views, strict=True)]
        pin_memory = accelerator.device.type == "cuda"
        loader = keyed_loader(dataset, keys, config.tokenize_batch_size, config.dataloader_num_workers, pin_memory)
        codes = []
        for batch in loader:
            out = model.encode(normalize(batch.pixels.to(accelerator.device, non_blocking=True)))
            codes.append(cast(Tensor, out.codes).flatten(1))
            bar.update(len(batch.pixels))
        array = torch.cat(codes).cpu().numpy().astype(code_dtype(model.config.num_embeddings))
        labels = source.labels[images] if source.labels is not None else None
        write_shard(shard_path(config.code_store, name, shard), array, labels)
    bar.close()


def _claim(folder: Path, origin: dict[str, Any]) -> None:
    """Notes in the folder how its codes are made, and refuses one that holds codes made otherwise."""
    path = folder / "origin.json"
    holds_codes = (folder / MANIFEST_NAME).is_file() or any(folder.glob("*.arrow"))
    if holds_codes and not path.is_file():
        raise ConfigError([Problem("code_store", f"{folder} holds codes of unknown origin; choose another folder")])
    if holds_codes:
        before = json.loads(path.read_text())
        now = json.loads(json.dumps(origin))
        problems = [
            Problem("code_store", f"{folder} holds codes made with {key} {before.get(key)!r}, now it is {now[key]!r}")
            for key in now
            if before.get(key) != now[key]
        ]
        if problems:
            problems.append(Problem("code_store", "choose another folder, or remove this one to make its codes anew"))
            raise ConfigError(problems, "code store")
        return
    folder.mkdir(parents=True, exist_ok=True)
    write_json(path, origin)


if __name__ == "__main__":
    run(Stage2Config, tokenize, "accelerate launch -m stage2_prior.tokenize")
