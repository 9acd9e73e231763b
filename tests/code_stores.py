"""A finished code store of random codes."""

import numpy as np

from stage2_prior import TokenLayout
from stage2_prior.code_store import shard_path
from stage2_prior.manifest import write_manifest
from stage2_prior.shards import code_dtype, read_notes, write_shard

ROWS, LENGTH = 10, 6
ORIGIN = {"tokenizer_fingerprint": "0" * 16, "data": {}, "num_views": 1, "seed": 0, "images": [10, 3]}
ORIGIN["class_names"] = None


def write_store(folder, shard_rows, num_codes=1000, with_labels=True):
    """Writes a store of ROWS training and 3 validation rows; returns training codes, training labels and layout."""
    rng = np.random.default_rng(0)
    layout = TokenLayout(num_codes, tuple("abcde"[: 5 * with_labels]), (2, 3), 4, "0" * 16)
    rows, notes = {}, {}
    for split, size in (("train", ROWS), ("validation", 3)):
        codes = rng.integers(num_codes, size=(size, LENGTH)).astype(code_dtype(num_codes))
        rows[split] = codes, rng.integers(5, size=size) if with_labels else None
        notes[split] = write_shards(
            folder, split, *rows[split], [min(shard_rows, size - n) for n in range(0, size, shard_rows)]
        )
    write_manifest(folder, layout, notes, ORIGIN, 1.0)
    return *rows["train"], layout


def write_shards(folder, split, codes, labels, sizes):
    """Writes rows as shards of the given sizes; returns their notes."""
    for shard, (size, end) in enumerate(zip(sizes, np.cumsum(sizes, dtype=int), strict=True)):
        part = slice(end - size, end)
        write_shard(shard_path(folder, split, shard), codes[part], None if labels is None else labels[part], size)
    return [read_notes(shard_path(folder, split, shard)) for shard in range(len(sizes))]
