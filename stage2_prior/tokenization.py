"""Images → code store, over all processes of a job."""

import json
import time
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from einops import rearrange
from torch import Tensor
from tqdm.auto import tqdm

from configs import ConfigError, Problem, check
from configs.files import write_json
from configs.folder_lock import locked_folder
from stage1_vqgan import (
    EncodedImage,
    ImageDataset,
    ImageKey,
    Images,
    ImageSource,
    SkippedImage,
    VQGANImageProcessor,
    VQGANModel,
    keyed_loader,
    load_images,
    load_tokenizer,
    too_many_skipped,
)
from stage2_prior.code_store import (
    MANIFEST_NAME,
    CodeStore,
    ShardNotes,
    code_dtype,
    images_per_shard,
    read_notes,
    shard_path,
    write_shard,
)
from stage2_prior.training.config import Stage2Config
from stage2_prior.vocabulary import TokenLayout


def tokenize(config: Stage2Config) -> CodeStore:
    """Makes the code store of a configuration, or finishes one that was interrupted; shards that are there are kept.

    Every process makes the shards whose number modulo the processes is its own. A shard is a function of the data
    alone, whichever process makes it and when. Of a stream every process reads all images, and decodes those of its
    own shards that are not there yet.

    Raises:
        ConfigError: the configuration cannot work, the folder holds codes that were made with other settings, too many
            images cannot be used, or the validation split has labels beyond those of the training split.
    """
    config = check(config)
    AcceleratorState._reset_state()  # a session may have trained before
    accelerator = Accelerator(mixed_precision="no")
    with locked_folder(config.code_store, "code_store") if accelerator.is_main_process else nullcontext():
        return _tokenize(config, accelerator)


def _tokenize(config: Stage2Config, accelerator: Accelerator) -> CodeStore:
    model = load_tokenizer(config.tokenizer).to(accelerator.device)
    check_aspect_ratio(config)
    folder = Path(config.code_store)
    train, validation = load_images(config.data)
    origin = {
        "tokenizer_fingerprint": model.config.fingerprint,
        "data": config.data.identity(),
        "num_views": config.num_views,
        "seed": config.seed,
        "images": [source.num_images for source in (train, validation)],
        "class_names": train.class_names,
    }
    if accelerator.is_main_process:
        _claim(folder, origin)
        rows_before = sum(read_notes(path).rows for path in folder.glob("*.arrow"))
    accelerator.wait_for_everyone()
    if (folder / MANIFEST_NAME).is_file():
        accelerator.print(f"{folder} holds these codes already; nothing to do")
        return CodeStore(folder)

    started = time.perf_counter()
    splits = {"train": (train, config.num_views), "validation": (validation, 1)}
    notes = {}
    for name, (source, num_views) in splits.items():
        num_shards = _tokenize_split(config, accelerator, model, name, source, num_views)
        accelerator.wait_for_everyone()
        notes[name] = [read_notes(shard_path(folder, name, shard)) for shard in range(num_shards)]
        skipped = [image for shard in notes[name] for image in shard.skipped]
        _check_skipped(config, name, skipped, sum(shard.images for shard in notes[name]))
    class_names = _class_names(train, notes)

    if accelerator.is_main_process:
        seconds = time.perf_counter() - started
        layout = TokenLayout(
            num_codes=model.config.num_embeddings,
            class_names=tuple(class_names),
            grid=(model.config.grid_size, model.config.grid_size),
            downsampling_factor=model.config.downsampling_factor,
            tokenizer_fingerprint=str(model.config.fingerprint),
        )
        manifest = {
            "token_layout": layout.to_dict(),
            "splits": {name: _summary(shards) for name, shards in notes.items()},
            "origin": origin,
            "seconds": round(seconds, 1),
        }
        write_json(folder / MANIFEST_NAME, manifest)
        total = sum(shard.rows for shards in notes.values() for shard in shards)
        made = total - rows_before
        print(
            f"{total:,} sequences of {layout.length} codes saved in {folder.resolve()} "
            f"({made:,} made now, {made / seconds:,.0f} images/s)"
        )
    accelerator.wait_for_everyone()
    return CodeStore(folder)


def check_aspect_ratio(config: Stage2Config) -> None:
    """Refuses to show a tokenizer images in another way than it was trained on."""
    try:
        trained_on = VQGANImageProcessor.from_pretrained(config.tokenizer).aspect_ratio
    except OSError:  # a tokenizer that was saved without an image processor does not say
        return
    if trained_on != config.data.aspect_ratio:
        message = f"received {config.data.aspect_ratio!r}, but {config.tokenizer} was trained with {trained_on!r}"
        raise ConfigError([Problem("data.aspect_ratio", f"{message}; set it to that")])


def _tokenize_split(
    config: Stage2Config, accelerator: Accelerator, model: VQGANModel, name: str, source: Images, num_views: int
) -> int:
    """Writes this process's shards of a split; returns the number of shards of all processes."""
    dataset = ImageDataset(
        source,
        model.config.image_size,
        model.config.in_channels,
        config.data.augmentation if num_views > 1 else None,
        config.seed,
        first_view_plain=True,
        aspect_ratio=config.data.aspect_ratio,
    )
    length = source.num_images
    skipped: list[SkippedImage] = []
    num_shards = 0
    total = None if length is None else length * num_views
    with tqdm(total=total, desc=f"tokenizing {name}", unit="image", disable=not accelerator.is_main_process) as bar:
        for shard, images in _shards(source, images_per_shard(num_views)):
            num_shards += 1
            path = shard_path(config.code_store, name, shard)
            if shard % accelerator.num_processes != accelerator.process_index or path.is_file():
                continue
            made = _encode_shard(config, accelerator, model, dataset, images, num_views, bar)
            skipped += made.skipped
            if length is not None and accelerator.num_processes == 1:  # several must agree: they check at the end
                _check_skipped(config, name, skipped, length)
            write_shard(path, made.codes, made.labels if source.has_labels else None, made.images, made.skipped)
    return num_shards


class _Shard(NamedTuple):
    """Rows of a shard, see `code_store`, and what they were made from."""

    codes: np.ndarray
    labels: np.ndarray
    images: int
    skipped: list[SkippedImage]


@torch.inference_mode()
def _encode_shard(
    config: Stage2Config,
    accelerator: Accelerator,
    model: VQGANModel,
    dataset: ImageDataset,
    images: Iterable["_Image"],
    num_views: int,
    bar: tqdm,
) -> _Shard:
    labels: dict[int, int] = {}

    def keys() -> Iterator[ImageKey]:
        for number, encoded, label in images:  # all views of an image follow each other: it is decoded once
            labels[number] = label
            yield from (ImageKey(0, number, view, encoded) for view in range(num_views))

    pin_memory = accelerator.device.type == "cuda"
    loader = keyed_loader(dataset, keys(), config.tokenize_batch_size, config.dataloader_num_workers, pin_memory)
    codes = [torch.empty(0, model.config.grid_size**2, dtype=torch.int64, device=accelerator.device)]
    owners, skipped = [], dict[int, SkippedImage]()
    for batch in loader:
        owners.append(batch.indices)
        skipped |= {image.image: image for image in batch.skipped}
        if len(batch.indices):
            out = model.encode(batch.images(accelerator.device))
            codes.append(cast(Tensor, out.codes).flatten(1))
        bar.update(len(batch.indices))
    rows = torch.cat(codes).cpu().numpy().astype(code_dtype(model.config.num_embeddings))
    rows = rows[~np.isin(torch.cat(owners).numpy(), list(skipped))]  # all views of an image or none
    rows = rearrange(rows, "(image view) code -> (view image) code", view=num_views)
    kept = np.array([label for number, label in labels.items() if number not in skipped], dtype=np.int64)
    return _Shard(rows, np.tile(kept, num_views), len(labels), list(skipped.values()))


class _Image(NamedTuple):
    """An image of a split: its number, its content unless the source has it by number, its label (-1: none)."""

    number: int
    encoded: EncodedImage | None
    label: int


def _shards(source: Images, size: int) -> Iterator[tuple[int, Iterable[_Image]]]:
    """Every shard's number and images; images that are not taken are passed over."""
    if isinstance(source, ImageSource):
        labels = source.labels if source.labels is not None else np.full(len(source), -1)
        images = (_Image(number, None, int(label)) for number, label in enumerate(labels))
    else:
        items = enumerate(source.read())
        images = (_Image(number, encoded, -1 if label is None else label) for number, (encoded, label) in items)
    return groupby(images, key=lambda image: image.number // size)


def _class_names(train: Images, notes: dict[str, list[ShardNotes]]) -> list[str]:
    """Those of the training split; of a stream of plain numbers, known only now, the numbers."""
    counts = {name: max((shard.num_classes for shard in shards), default=0) for name, shards in notes.items()}
    if counts["validation"] > len(train.class_names or range(counts["train"])):
        message = f"the validation split has class {counts['validation'] - 1}, the training split only"
        raise ConfigError([Problem("data.label_column", f"{message} 0 to {counts['train'] - 1}")])
    return train.class_names or [str(number) for number in range(counts["train"])]


def _check_skipped(config: Stage2Config, split: str, skipped: list[SkippedImage], images: int) -> None:
    advice = "repair or remove them and choose a new code_store, or allow more"
    problem = too_many_skipped(skipped, images, config.data.max_skipped_fraction, f"{split} images", advice)
    if problem is not None:
        raise ConfigError([problem], "image data")


def _summary(shards: list[ShardNotes]) -> dict[str, Any]:
    """A split as the manifest has it."""
    return {
        "images": sum(shard.images for shard in shards),
        "rows": sum(shard.rows for shard in shards),
        "shard_rows": [shard.rows for shard in shards],
        "skipped": [image._asdict() for shard in shards for image in shard.skipped],
    }


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
