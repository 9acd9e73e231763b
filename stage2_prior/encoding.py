"""Images of a split → the rows of a code store's shards."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import torch
from einops import rearrange
from torch import Tensor
from tqdm.auto import tqdm

from stage1_vqgan import (
    EncodedImage,
    ImageDataset,
    ImageKey,
    Images,
    ImageSource,
    SkippedImage,
    VQGANModel,
    keyed_loader,
)
from stage2_prior.condition_images import apply_transform, encode_images
from stage2_prior.condition_sources import Columns, Condition, ImageCondition
from stage2_prior.shards import code_dtype


class LabeledImage(NamedTuple):
    """One image of a split.

    Attributes:
        number: its number in the split.
        encoded: the encoded image of a stream; None for an indexed source, which reads it by number.
        label: its class, -1 without labels.
    """

    number: int
    encoded: EncodedImage | None
    label: int


class EncodedShard(NamedTuple):
    """The rows of one shard, in the order `code_store` describes.

    Attributes:
        codes: uint16 or uint32 `(rows, L)`.
        labels: int64 `(rows,)`, -1 without labels.
        columns: the columns that `data.columns` keeps, `rows` long; None if it keeps none.
        images: number of images in the shard's range of the split.
        skipped: the images in this range that could not be decoded.
        conditions: uint32 `(rows, P')`, see `Shard`; None without further conditions.
    """

    codes: np.ndarray
    labels: np.ndarray
    columns: pa.Table | None
    images: int
    skipped: list[SkippedImage]
    conditions: np.ndarray | None = None


class EncodedViews(NamedTuple):
    """Codes of views of images.

    Attributes:
        codes: int64 `(n, L)` of each encoder.
        numbers: int64 `(n,)`, the number of the image of each view in its split.
        skipped: the images that could not be decoded, by number; some of their views may be in `codes`.
    """

    codes: list[np.ndarray]
    numbers: np.ndarray
    skipped: dict[int, SkippedImage]


class Encoder(NamedTuple):
    """A tokenizer, and the transform of the images that it encodes; "" for none."""

    tokenizer: VQGANModel
    transform: str = ""

    def __call__(self, pixels: Tensor) -> Tensor:
        """int64 codes `(B, L)` of images `(B, C, H, W)`."""
        pixels = apply_transform(self.transform, pixels) if self.transform else pixels
        return encode_images(self.tokenizer, pixels)


def split_into_shards(source: Images, size: int) -> Iterator[tuple[int, Iterable[LabeledImage]]]:
    """Yields number and images of every shard of `size` images. The caller may skip the images of a shard."""
    if isinstance(source, ImageSource):
        labels = source.labels if source.labels is not None else np.full(len(source), -1)
        images = (LabeledImage(number, None, int(label)) for number, label in enumerate(labels))
    else:
        items = enumerate(source.read())
        images = (LabeledImage(number, encoded, -1 if label is None else label) for number, (encoded, label) in items)
    return groupby(images, key=lambda image: image.number // size)


def encode_shard(
    model: VQGANModel,
    dataset: ImageDataset,
    images: Iterable[LabeledImage],
    num_views: int,
    batch_size: int,
    num_workers: int,
    progress: tqdm,
    conditions: Sequence[Condition] = (),
    condition_images: Sequence[Iterable[LabeledImage]] = (),
    columns: Sequence[str] = (),
) -> EncodedShard:
    """Encodes all views of the images of one shard on the model's device.

    Args:
        model: the tokenizer, in evaluation mode.
        dataset: decodes and augments the images.
        images: images of the shard.
        num_views: views of each image.
        batch_size: number of views in one forward pass.
        num_workers: processes that decode images.
        progress: advanced by one for every encoded view.
        conditions: the further conditions, in the order of their segments.
        condition_images: images of the shard of each condition with a data set of its own.
        columns: names of the columns to keep.
    """
    labels: dict[int, int] = {}
    rows: dict[int, Columns] = {}

    def told() -> Iterator[LabeledImage]:
        for image in images:
            labels[image.number], rows[image.number] = image.label, image.encoded and image.encoded.columns
            yield image

    options = num_views, batch_size, num_workers
    of_image = [condition for condition in conditions if isinstance(condition, ImageCondition)]
    transformed = [condition for condition in of_image if condition.dataset is None]
    paired = [condition for condition in of_image if condition.dataset is not None]
    encoders = [Encoder(model), *(Encoder(c.tokenizer, c.segment.transform) for c in transformed)]
    views = [encode_views(encoders, dataset, told(), *options, progress)]
    for pair, others in zip(paired, condition_images, strict=True):
        found = encode_views([Encoder(pair.tokenizer)], pair.dataset, others, *options)
        views.append(found._replace(skipped=_named(found.skipped, pair.segment.name)))

    skipped = {number: image for part in reversed(views) for number, image in part.skipped.items()}
    first, *codes = [_whole_images(table, part, skipped, num_views) for part in views for table in part.codes]
    by_name = dict(zip([c.segment.name for c in (*transformed, *paired)], codes, strict=True))
    numbers = [number for number in labels if number not in skipped]
    kept_rows = [rows[number] for number in numbers]
    for condition in conditions:
        if not isinstance(condition, ImageCondition):
            ids = condition.ids(dataset.source, numbers, kept_rows)
            by_name[condition.segment.name] = np.tile(ids, (num_views, 1))
    kept = np.array([labels[number] for number in numbers], dtype=np.int64)
    table = kept_columns(dataset.source, numbers, kept_rows, columns)
    table = None if table is None else pa.concat_tables([table] * num_views)
    return EncodedShard(
        first.astype(code_dtype(model.config.num_embeddings)),
        np.tile(kept, num_views),
        table,
        len(labels),
        list(skipped.values()),
        np.concatenate([by_name[c.segment.name] for c in conditions], 1).astype(np.uint32) if conditions else None,
    )


@torch.inference_mode()
def encode_views(
    encoders: Sequence[Encoder],
    dataset: ImageDataset | None,
    images: Iterable[LabeledImage],
    num_views: int,
    batch_size: int,
    num_workers: int,
    progress: tqdm | None = None,
) -> EncodedViews:
    """Encodes all views of images, each with all encoders; see `encode_shard`."""
    assert dataset is not None, "a condition without a data set has no images of its own"
    device = encoders[0].tokenizer.device

    def keys() -> Iterator[ImageKey]:
        for number, encoded, _ in images:  # views of one image are adjacent, so it is decoded once
            yield from (ImageKey(0, number, view, encoded) for view in range(num_views))

    loader = keyed_loader(dataset, keys(), batch_size, num_workers, pin_memory=device.type == "cuda")
    lengths = [encoder.tokenizer.config.num_codes_per_image for encoder in encoders]
    tables = [[torch.empty(0, length, dtype=torch.int64, device=device)] for length in lengths]
    numbers, skipped = [torch.empty(0, dtype=torch.int64)], dict[int, SkippedImage]()
    for batch in loader:
        numbers.append(batch.indices)
        skipped |= {image.image: image for image in batch.skipped}
        if len(batch.indices):
            pixels = batch.images(device)
            for encoder, codes in zip(encoders, tables, strict=True):
                codes.append(encoder(pixels))
        if progress is not None:
            progress.update(len(batch.indices))
    found = [torch.cat(table).cpu().numpy() for table in tables]
    return EncodedViews(found, torch.cat(numbers).numpy(), skipped)


def _whole_images(
    codes: np.ndarray, views: EncodedViews, skipped: Mapping[int, SkippedImage], num_views: int
) -> np.ndarray:
    """The codes `(rows, L)` of the images that are not skipped, view by view: an image keeps all views or none."""
    kept = codes[~np.isin(views.numbers, list(skipped))]
    return rearrange(kept, "(image view) code -> (view image) code", view=num_views)


def _named(skipped: Mapping[int, SkippedImage], name: str) -> dict[int, SkippedImage]:
    """Skipped images whose condition image cannot be decoded; the reason says so."""
    return {number: image._replace(reason=f"{name}: {image.reason}") for number, image in skipped.items()}


def kept_columns(source: Images, numbers: list[int], rows: list[Columns], columns: Sequence[str]) -> pa.Table | None:
    """The columns that a store keeps, of some images; None if it keeps none.

    Args:
        source: the images.
        numbers: their numbers, for a source that is read by number.
        rows: their columns, for a stream.
        columns: names of the columns.
    """
    if not columns:
        return None
    if isinstance(source, ImageSource):
        return source.columns.select_columns(list(columns)).with_format("arrow")[numbers]
    schema = pa.schema([(name, source.images.features[name].pa_type) for name in columns])
    kept = [{name: (row or {})[name] for name in columns} for row in rows]
    return pa.Table.from_pylist(kept, schema=schema)
