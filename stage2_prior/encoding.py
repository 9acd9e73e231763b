"""Images of a split → the rows of a code store's shards."""

from collections.abc import Iterable, Iterator
from itertools import groupby
from math import prod
from typing import Any, NamedTuple, cast

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
    """

    codes: np.ndarray
    labels: np.ndarray
    columns: pa.Table | None
    images: int
    skipped: list[SkippedImage]


def split_into_shards(source: Images, size: int) -> Iterator[tuple[int, Iterable[LabeledImage]]]:
    """Yields number and images of every shard of `size` images. The caller may skip the images of a shard."""
    if isinstance(source, ImageSource):
        labels = source.labels if source.labels is not None else np.full(len(source), -1)
        images = (LabeledImage(number, None, int(label)) for number, label in enumerate(labels))
    else:
        items = enumerate(source.read())
        images = (LabeledImage(number, encoded, -1 if label is None else label) for number, (encoded, label) in items)
    return groupby(images, key=lambda image: image.number // size)


@torch.inference_mode()
def encode_shard(
    model: VQGANModel,
    dataset: ImageDataset,
    images: Iterable[LabeledImage],
    num_views: int,
    batch_size: int,
    num_workers: int,
    progress: tqdm,
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
    """
    labels: dict[int, int] = {}
    columns: dict[int, dict[str, Any] | None] = {}

    def keys() -> Iterator[ImageKey]:
        for number, encoded, label in images:  # views of one image are adjacent, so it is decoded once
            labels[number], columns[number] = label, None if encoded is None else encoded.columns
            yield from (ImageKey(0, number, view, encoded) for view in range(num_views))

    loader = keyed_loader(dataset, keys(), batch_size, num_workers, pin_memory=model.device.type == "cuda")
    codes = [torch.empty(0, prod(model.config.grid), dtype=torch.int64, device=model.device)]
    numbers, skipped = [], dict[int, SkippedImage]()
    for batch in loader:
        numbers.append(batch.indices)
        skipped |= {image.image: image for image in batch.skipped}
        if len(batch.indices):
            out = model.encode(batch.images(model.device))
            codes.append(cast(Tensor, out.codes).flatten(1))
        progress.update(len(batch.indices))
    rows = torch.cat(codes).cpu().numpy().astype(code_dtype(model.config.num_embeddings))
    rows = rows[~np.isin(torch.cat(numbers).numpy(), list(skipped))]  # an image keeps all of its views or none
    rows = rearrange(rows, "(image view) code -> (view image) code", view=num_views)
    numbers_kept = [number for number in labels if number not in skipped]
    kept = np.array([labels[number] for number in numbers_kept], dtype=np.int64)
    table = kept_columns(dataset.source, numbers_kept, [columns[number] for number in numbers_kept])
    table = None if table is None else pa.concat_tables([table] * num_views)
    return EncodedShard(rows, np.tile(kept, num_views), table, len(labels), list(skipped.values()))


def kept_columns(source: Images, numbers: list[int], rows: list[dict[str, Any] | None]) -> pa.Table | None:
    """The columns that `data.columns` keeps, of some images; None if it keeps none.

    Args:
        source: the images.
        numbers: their numbers, for a source that is read by number.
        rows: their columns, for a stream.
    """
    if isinstance(source, ImageSource):
        return None if source.columns is None else source.columns.with_format("arrow")[numbers]
    if not source.columns:
        return None
    schema = pa.schema([(name, source.images.features[name].pa_type) for name in source.columns])
    return pa.Table.from_pylist(rows, schema=schema)
