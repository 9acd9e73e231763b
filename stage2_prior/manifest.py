"""The manifest of a code store: token layout, splits, origin and the checksums of the shards."""

import json
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from annotated_types import Ge, Interval

from configs import ConfigError, Problem
from configs.checksums import sealed, unsealed
from configs.files import read_json, write_json
from stage2_prior.shards import ShardNotes
from stage2_prior.vocabulary import TokenLayout

if TYPE_CHECKING:
    from pydantic import TypeAdapter

MANIFEST_NAME = "manifest.json"
REPAIR = f"copy the store again, or remove {MANIFEST_NAME} and run stage2_prior.tokenize"


@dataclass(frozen=True)
class SplitSummary:
    """A split in the manifest; `shard_rows` and `shard_checksums` have an entry for each shard."""

    images: Annotated[int, Ge(0)]
    rows: Annotated[int, Ge(0)]
    shard_rows: list[Annotated[int, Interval(ge=0, lt=2**40)]]
    shard_checksums: list[str]
    skipped: list[dict[str, Any]]


@dataclass(frozen=True)
class Splits:
    """The splits in the manifest."""

    train: SplitSummary
    validation: SplitSummary


@dataclass(frozen=True)
class Origin:
    """The settings and data that determine the codes."""

    tokenizer_fingerprint: str | None
    data: dict[str, Any]
    num_views: int
    seed: int
    images: list[int | None]
    class_names: list[str] | None
    conditions: dict[str, dict[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class Manifest:
    """The manifest; see `write_manifest`."""

    token_layout: dict[str, Any]
    splits: Splits
    origin: Origin
    seconds: float


def write_manifest(
    folder: Path, layout: TokenLayout, splits: dict[str, list[ShardNotes]], origin: dict[str, Any], seconds: float
) -> None:
    """Writes the manifest, which marks a store as finished.

    Args:
        folder: folder of the store.
        layout: token layout of the codes.
        splits: notes of the shards of "train" and "validation".
        origin: see `claim_folder`.
        seconds: time in which this run encoded the images.
    """
    summaries = {
        name: {
            "images": sum(shard.images for shard in shards),
            "rows": sum(shard.rows for shard in shards),
            "shard_rows": [shard.rows for shard in shards],
            "shard_checksums": [shard.checksum for shard in shards],
            "skipped": [image._asdict() for shard in shards for image in shard.skipped],
        }
        for name, shards in splits.items()
    }
    manifest = {
        "token_layout": layout.to_dict(),
        "splits": summaries,
        "origin": origin,
        "seconds": round(seconds, 1),
    }
    write_json(folder / MANIFEST_NAME, sealed(manifest))


def read_manifest(folder: Path) -> dict[str, Any]:
    """Reads the manifest of a finished store.

    Raises:
        ConfigError: the manifest is missing, malformed or damaged.
    """
    from pydantic import ValidationError

    path = folder / MANIFEST_NAME
    if not path.is_file():
        message = f"received {str(folder)!r}; it holds no finished code store (run stage2_prior.tokenize first)"
        raise store_problem(message)
    try:
        manifest = unsealed(read_json(path), path)
        _reader().validate_json(json.dumps(manifest), strict=True)
        layout = TokenLayout.from_dict(manifest["token_layout"])
    except ValidationError as error:
        found = [
            f"{'.'.join(map(str, problem['loc']))}: {problem['msg'].removeprefix('Value error, ')}"
            for problem in error.errors()
        ]
        raise store_problem(*(f"{path}: {message}" for message in found), REPAIR) from error
    except ValueError as error:  # a layout has a line for each of its problems
        raise store_problem(*str(error).splitlines(), REPAIR) from error
    has = ", ".join(segment.name for segment in layout.segments)
    told = ", ".join(manifest["origin"].get("conditions", {}))
    if has != told:
        reason = f"its token layout has the conditions {has or 'none'}, but its origin names {told or 'none'}"
        raise store_problem(f"{path}: {reason}; {REPAIR}")
    return manifest


def store_problem(*messages: str) -> ConfigError:
    """The error of a code store that cannot be used."""
    return ConfigError([Problem("code_store", message) for message in messages], "code store")


@cache
def _reader() -> "TypeAdapter[Manifest]":
    from pydantic import TypeAdapter

    return TypeAdapter(Manifest)
