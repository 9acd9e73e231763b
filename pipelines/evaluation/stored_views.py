"""The training images of a prior, as its code store holds them: each in several views, decoded by the tokenizer.

Shape letters: V views, N images, L codes of an image.
"""

import numpy as np
import torch
from torch import Tensor

from pipelines.evaluation.image_set import ImageSet
from pipelines.evaluation.reconstructions import eight_bits
from stage1_vqgan import VQGANModel, spread
from stage2_prior import CodeSplit, CodeStore


class StoredView:
    """An `ImageSet` of one view of each image, decoded when it is read.

    Args:
        split: the training split of the store.
        rows: row of this view of each image, int64 `(N,)`.
        model: the tokenizer. It computes on the device where it lies.
    """

    labels: np.ndarray | None = None

    def __init__(self, split: CodeSplit, rows: np.ndarray, model: VQGANModel):
        self.split, self.rows, self.model = split, rows, model

    def __len__(self) -> int:
        return len(self.rows)

    @torch.no_grad()
    def read(self, rows: range) -> Tensor:
        """See `ImageSet.read`."""
        layout = self.split.layout
        codes = self.split.read(self.rows[rows.start : rows.stop]).codes.astype(np.int64)
        shaped = torch.from_numpy(codes).unflatten(1, layout.codes_shape).to(self.model.device)
        return eight_bits(self.model.decode_codes(shaped, layout.grid))


def stored_views(store: CodeStore, model: VQGANModel, max_images: int) -> list[ImageSet]:
    """The views of training images in a code store: V sets, in which the image n is the same.

    Args:
        store: the code store.
        model: its tokenizer.
        max_images: largest number of images; of more, some are chosen, spread evenly over all.
    """
    split, num_views = store.split("train"), store.manifest["origin"]["num_views"]
    table = view_rows(split, num_views)
    chosen = table[:, spread(table.shape[1], max_images)]
    return [StoredView(split, rows, model) for rows in chosen]


def view_rows(split: CodeSplit, num_views: int) -> np.ndarray:
    """The row of each view of each image, int64 `(V, N)`. A shard holds one view of all its images, then the next."""
    return np.concatenate(
        [np.arange(start, end).reshape(num_views, -1) for start, end in zip(split.starts, split.ends, strict=True)],
        axis=1,
    )
