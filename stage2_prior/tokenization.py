"""Images → code store; `stage2_prior.tokenize` is the command.

The steps: open the tokenizer and the images, claim the folder, encode the shards, check skipped images and labels,
write the manifest.
"""

import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from tqdm.auto import tqdm

from configs import ConfigError, Problem, check
from configs.folder_lock import locked_folder
from configs.opening import print_facts
from configs.stalls import library_timeout, watched_for_stalls
from stage1_vqgan import (
    LOOKED_AT_FIRST,
    Images,
    ImageStream,
    SkippedImage,
    VQGANConfig,
    VQGANImageProcessor,
    VQGANModel,
    data_facts,
    fingerprint_of_images,
    load_tokenizer,
    look,
    too_many_skipped,
    trained_range,
    warn_of_empty_classes,
)
from stage2_prior.code_store import CodeStore, claim_folder, images_per_shard, shard_path
from stage2_prior.condition_opening import conditions_origin, open_conditions, tell_of_cut_texts, view_dataset
from stage2_prior.condition_sources import Condition, ImageCondition, load_condition_images, load_with_conditions
from stage2_prior.condition_tokenizers import image_tokenizers, save_tokenizers, text_tokenizers
from stage2_prior.conditions import Segment
from stage2_prior.encoding import encode_shard, split_into_shards
from stage2_prior.manifest import MANIFEST_NAME, write_manifest
from stage2_prior.shards import ShardNotes, map_shard, read_notes, write_shard
from stage2_prior.training.config import Stage2Config
from stage2_prior.vocabulary import TokenLayout

# Images of a split that a second call compares with those of the first, to notice that the data have changed.
COMPARED_IMAGES = 100


def tokenize(config: Stage2Config) -> CodeStore:
    """Writes the code store of a configuration, or completes the store of an interrupted run.

    Complete shards are not written again. Process r of R writes the shards s with s mod R = r. A shard depends on the
    data alone, not on the process that writes it. If the source is a stream, every process reads all of it, but decodes
    only the images of its own missing shards.

    Raises:
        ConfigError: the configuration is invalid; the folder is in use or holds codes with other settings; too
            many images cannot be used; or the validation split has labels that the training split lacks.
    """
    config = check(config)
    use_cpu, timeout = parse_flag_from_env("ACCELERATE_USE_CPU"), library_timeout(config.ddp_timeout)
    processes = PartialState(cpu=use_cpu, timeout=timeout)
    lock = locked_folder(config.code_store, "code_store") if processes.is_main_process else nullcontext()
    with watched_for_stalls(config.ddp_timeout), lock:
        return _tokenize(config, processes)


def _tokenize(config: Stage2Config, processes: PartialState) -> CodeStore:
    model = open_tokenizer(config).to(processes.device)
    check_aspect_ratio(config)
    train, validation = load_with_conditions(config)
    folder, images, sources = Path(config.code_store), image_tokenizers(config, model), load_condition_images(config)
    if processes.is_main_process:
        texts = text_tokenizers(config, train)
        origin = _origin(config, model, train, validation) | conditions_origin(config, texts, images, train, validation)
        own = VQGANConfig.from_pretrained(config.tokenizer).image_shape
        unset = {"image_size": list(own), "fingerprint_of_images": origin["fingerprint_of_images"]}
        rows_before = claim_folder(folder, origin, unset)
        if not (folder / MANIFEST_NAME).is_file():
            save_tokenizers(config, texts, images, model)
    processes.wait_for_everyone()
    if (folder / MANIFEST_NAME).is_file():
        processes.print(f"{folder} already holds these codes; nothing to do")
        return CodeStore(folder)

    conditions = open_conditions(config, images, sources, train, validation)
    if processes.is_main_process:
        _tell(config, model, train, validation, [condition.segment for condition in conditions["train"]])
    started = time.perf_counter()
    notes = {}
    for split, source, num_views in (("train", train, config.num_views), ("validation", validation, 1)):
        num_shards = tokenize_split(config, processes, model, split, source, num_views, conditions[split])
        processes.wait_for_everyone()
        notes[split] = [read_notes(shard_path(folder, split, shard)) for shard in range(num_shards)]
        skipped = [image for shard in notes[split] for image in shard.skipped]
        _check_skipped(config, split, skipped, sum(shard.images for shard in notes[split]))
    tell_of_cut_texts(processes, conditions["train"])
    layout = _token_layout(model, _class_names(train, notes), [condition.segment for condition in conditions["train"]])
    layout = replace(layout, class_counts=_class_counts(folder, layout, len(notes["train"]), config.num_views))
    if isinstance(train, ImageStream) and not all(layout.class_counts):  # an indexed source has told it before
        warn_of_empty_classes(layout.class_names, layout.class_counts)

    if processes.is_main_process:
        seconds = time.perf_counter() - started
        write_manifest(folder, layout, notes, origin, seconds)
        total = sum(shard.rows for shards in notes.values() for shard in shards)
        made = total - rows_before
        print(
            f"{total:,} sequences of {layout.length} codes saved in {folder.resolve()} "
            f"({made:,} made now, {made / seconds:,.0f} images/s)"
        )
    processes.wait_for_everyone()
    return CodeStore(folder)


def _tell(
    config: Stage2Config, model: VQGANModel, train: Images, validation: Images, segments: Sequence[Segment]
) -> None:
    """Prints the first lines: what the data hold, and what becomes of them."""
    tokenizer, limit = model.config, config.data.max_skipped_fraction
    looked = look(train, LOOKED_AT_FIRST, tokenizer.in_channels, trained_range(config.data, config.tokenizer))
    facts = data_facts(train, validation, looked, tokenizer.image_shape, limit)
    codes = f"{tokenizer.num_codes_per_image:,} of each image, out of {tokenizer.num_embeddings:,}"
    facts["codes"] = f"{codes}; views of an image: {config.num_views}"
    if segments:
        facts["conditions"] = "; ".join(segment.summary for segment in segments)
        if not train.has_labels:
            del facts["classes"]  # it says that the prior will be unconditional
    facts["device"] = str(model.device)
    print_facts(facts | {"tokenizer": config.tokenizer, "code store": config.code_store})


def open_tokenizer(config: Stage2Config) -> VQGANModel:
    """Loads the tokenizer for images of `image_size`.

    Raises:
        ConfigError: it cannot be loaded, or not for this size.
    """
    changes: dict[str, Any] = {} if config.image_size is None else {"image_size": config.image_size}
    try:
        return load_tokenizer(config.tokenizer, **changes)
    except ConfigError as error:
        problems = [Problem(problem.key.removeprefix("model."), problem.message) for problem in error.problems]
        raise ConfigError(problems) from error


def check_aspect_ratio(config: Stage2Config) -> None:
    """Checks that the images become square in the same way as in the training of the tokenizer.

    The check needs the tokenizer's image processor. It passes if the tokenizer was saved without one.

    Raises:
        ConfigError: `data.aspect_ratio` differs from that of the tokenizer's image processor.
    """
    try:
        trained_with = VQGANImageProcessor.from_pretrained(config.tokenizer).aspect_ratio
    except OSError:
        return
    if trained_with != config.data.aspect_ratio:
        message = f"received {config.data.aspect_ratio!r}, but {config.tokenizer} was trained with {trained_with!r}"
        raise ConfigError([Problem("data.aspect_ratio", f"{message}; set it to {trained_with!r}")])


def _origin(config: Stage2Config, model: VQGANModel, train: Images, validation: Images) -> dict[str, Any]:
    """The settings and data that determine the codes of a store.

    Raises:
        ConfigError: `data.value_range` is not the range with which the tokenizer was trained.
    """
    found = trained_range(config.data, config.tokenizer)
    return {
        "tokenizer_fingerprint": model.config.fingerprint,
        "data": config.data.identity(),
        "num_views": config.num_views,
        "seed": config.seed,
        "images": [source.num_images for source in (train, validation)],
        "fingerprint_of_images": [fingerprint_of_images(source, COMPARED_IMAGES) for source in (train, validation)],
        "class_names": train.class_names,
        **({} if found is None else {"value_range": list(found)}),
        "image_size": list(model.config.image_shape),
    }


def tokenize_split(
    config: Stage2Config,
    processes: PartialState,
    model: VQGANModel,
    split: str,
    source: Images,
    num_views: int,
    conditions: Sequence[Condition] = (),
) -> int:
    """Writes the missing shards of a split that belong to this process; returns the number of all shards."""
    values = trained_range(config.data, config.tokenizer)
    dataset = view_dataset(config, source, model, num_views, values)
    others = [c.dataset.source for c in conditions if isinstance(c, ImageCondition) and c.dataset is not None]
    num_images, num_shards = source.num_images, 0
    skipped: list[SkippedImage] = []
    total = None if num_images is None else num_images * num_views
    with tqdm(total=total, desc=f"tokenizing {split}", unit="image", disable=not processes.is_main_process) as progress:
        size = images_per_shard(num_views)
        shards = zip(*(split_into_shards(each, size) for each in (source, *others)), strict=True)
        for (shard, images), *condition_images in shards:
            num_shards += 1
            path = shard_path(config.code_store, split, shard)
            if shard % processes.num_processes != processes.process_index or path.is_file():
                continue
            batch_size, num_workers = config.tokenize_batch_size, config.dataloader_num_workers
            encoded = encode_shard(
                model,
                dataset,
                images,
                num_views,
                batch_size,
                num_workers,
                progress,
                conditions,
                [others for _, others in condition_images],
                config.data.columns,
            )
            skipped += encoded.skipped
            # one process can stop early; several must raise together, so they check after the split
            if num_images is not None and processes.num_processes == 1:
                _check_skipped(config, split, skipped, num_images)
            labels = encoded.labels if source.has_labels else None
            write_shard(
                path, encoded.codes, labels, encoded.images, encoded.skipped, encoded.columns, encoded.conditions
            )
    return num_shards


def _class_names(train: Images, notes: dict[str, list[ShardNotes]]) -> list[str]:
    """Class names of the training split, or its class numbers if the labels of a stream have no names.

    Raises:
        ConfigError: the validation split has a label that exceeds the labels of the training split.
    """
    counts = {split: max((shard.num_classes for shard in shards), default=0) for split, shards in notes.items()}
    if counts["validation"] > len(train.class_names or range(counts["train"])):
        message = f"the validation split has class {counts['validation'] - 1}, the training split only"
        raise ConfigError([Problem("data.label_column", f"{message} 0 to {counts['train'] - 1}")])
    return train.class_names or [str(number) for number in range(counts["train"])]


def _class_counts(folder: Path, layout: TokenLayout, num_shards: int, num_views: int) -> tuple[int, ...]:
    """Number of training images of each class."""
    counts = np.zeros(layout.num_classes, dtype=np.int64)
    for shard in range(num_shards):
        labels = map_shard(shard_path(folder, "train", shard))[0].labels
        if labels is not None:
            counts += np.bincount(labels, minlength=layout.num_classes)
    return tuple((counts // num_views).tolist())


def _check_skipped(config: Stage2Config, split: str, skipped: list[SkippedImage], num_images: int) -> None:
    advice = "repair or remove them and choose a new code_store, or allow more"
    problem = too_many_skipped(skipped, num_images, config.data.max_skipped_fraction, f"{split} images", advice)
    if problem is not None:
        raise ConfigError([problem], "image data")


def _token_layout(model: VQGANModel, class_names: list[str], segments: Sequence[Segment]) -> TokenLayout:
    return TokenLayout(
        num_codes=model.config.num_embeddings,
        class_names=tuple(class_names),
        grid=model.config.grid,
        downsampling_factor=model.config.downsampling_factor,
        tokenizer_fingerprint=str(model.config.fingerprint),
        grids=model.config.grids,
        segments=tuple(segments),
    )
