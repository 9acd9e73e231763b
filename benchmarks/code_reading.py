"""Time to read a batch of 256 rows of 256 codes, compared with `datasets.Dataset` in torch format and the
`default_data_collator` of transformers: `python -m benchmarks.code_reading [--shards 1 8 128] [--rounds 51]`.

All lanes read the same Arrow files, in random order over all shards, without worker processes. "tessella" builds the
training batch, with condition dropout, through a DataLoader. "alone" does the same without the DataLoader. "datasets"
only reads and stacks codes and labels, through a DataLoader. The batches are compared before the measurement.
"""

import argparse
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from torch.utils.data import DataLoader
from transformers import default_data_collator

from benchmarks.machine import environment
from benchmarks.measuring import interleaved, ratio, summary
from benchmarks.report import table, write
from configs.index_sampler import IndexSampler
from stage2_prior import TokenLayout
from stage2_prior.code_store import CodeSplit, shard_path
from stage2_prior.data import CodeDataset, collate
from stage2_prior.shards import write_shard

ROWS, BATCH_SIZE = 2**17, 256
LAYOUT = TokenLayout(16384, tuple(map(str, range(1000))), (16, 16), 16, "")
# Number of batches in one measurement. The first one reads with the CPU caches that the previous lane filled.
BATCHES = 5
LANES = ("tessella", "alone", "datasets")


def write_split(folder: Path, num_shards: int) -> list[int]:
    """Writes random codes and labels; returns the number of rows of every shard."""
    rng = np.random.default_rng(0)
    rows = ROWS // num_shards
    for shard in range(num_shards):
        codes = rng.integers(LAYOUT.num_codes, size=(rows, LAYOUT.length)).astype(np.uint16)
        labels = rng.integers(LAYOUT.num_classes, size=rows)
        write_shard(shard_path(folder, "train", shard), codes, labels, rows)
    return [rows] * num_shards


def batches(name: str, folder: Path, shard_rows: list[int]) -> Iterator[dict[str, Any]]:
    """Yields batches of a lane without end. The order is the same in all lanes."""
    sampler = IndexSampler(ROWS, BATCH_SIZE, 0, 10**9, seed=0)
    ours = CodeDataset(CodeSplit(folder, "train", shard_rows, LAYOUT), LAYOUT, condition_dropout=0.1)
    if name == "alone":
        return (ours.__getitems__(keys) for keys in sampler)
    if name == "tessella":
        return iter(DataLoader(ours, batch_sampler=sampler, collate_fn=collate))
    files = [str(shard_path(folder, "train", shard)) for shard in range(len(shard_rows))]
    theirs: Any = datasets.concatenate_datasets([datasets.Dataset.from_file(file) for file in files])
    rows: Any = (keys[:, 1].tolist() for keys in sampler)
    return iter(DataLoader(theirs.with_format("torch"), batch_sampler=rows, collate_fn=default_data_collator))


def measure(num_shards: int, rounds: int) -> dict[str, Any]:
    """Measures all lanes on a store with this number of shards."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shard_rows = write_split(folder, num_shards)
        readers = {lane: batches(lane, folder, shard_rows) for lane in LANES}
        ours, same, theirs = (next(reader) for reader in readers.values())
        assert all(torch.equal(ours[column], same[column]) for column in ours), "the DataLoader changes a batch"
        kept = ours["input_ids"][:, 0] != LAYOUT.null_token
        assert torch.equal(ours["labels"], theirs["codes"]), "the lanes read different codes"
        assert torch.equal(ours["input_ids"][kept, 0], LAYOUT.class_tokens(theirs["labels"])[kept]), "other labels"
        lanes: dict[str, Callable[[], Any]] = {lane: partial(read_some, reader) for lane, reader in readers.items()}
        times = interleaved(lanes, rounds)
    return {lane: summary(values) | {"time_ratio": ratio(values, times["tessella"])} for lane, values in times.items()}


def read_some(reader: Iterator[Any]) -> None:
    """Reads the batches of one measurement."""
    for _ in range(BATCHES):
        next(reader)


def rows(num_shards: int, lanes: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of the table."""
    return [
        {
            "shards": num_shards,
            "lane": name,
            "ms a batch": round(lane["median_ms"] / BATCHES, 3),
            "min": round(lane["min_ms"] / BATCHES, 3),
            "p90": round(lane["p90_ms"] / BATCHES, 3),
            "rows/s": f"{1e3 * BATCHES * BATCH_SIZE / lane['median_ms']:,.0f}",
            "time / tessella": "{median} ({p10}–{p90})".format(**lane["time_ratio"]),
            "by CPU": lane["time_ratio"]["by_cpu"],
            "contaminated": "yes" if lane["contaminated"] else "",
        }
        for name, lane in lanes.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.code_reading", description=__doc__)
    parser.add_argument("--shards", type=int, nargs="+", default=[1, 8, 128])
    parser.add_argument("--rounds", type=int, default=51)
    parser.add_argument("--output", default="runs/benchmarks/code_reading.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    where = environment()
    results = {num_shards: measure(num_shards, args.rounds) for num_shards in args.shards}
    print(table([row for num_shards, lanes in results.items() for row in rows(num_shards, lanes)]))
    write(args.output, {"environment": where, "rows": ROWS, "batch_size": BATCH_SIZE, "results": results})


if __name__ == "__main__":
    main()
