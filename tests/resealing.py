"""Gives changed checkpoints and code stores valid checksums, as a person could who changes them on purpose."""

import json
from collections.abc import Callable
from pathlib import Path

from configs.checkpoints import MARKER_NAME
from configs.checksums import SEAL, listing, sealed
from stage2_prior.manifest import MANIFEST_NAME


def reseal(checkpoint: Path) -> None:
    """Lists the present files of a checkpoint, with their checksums, in its marker."""
    marker = checkpoint / MARKER_NAME
    files = [path for path in checkpoint.rglob("*") if path.is_file() and path != marker]
    marker.write_text(json.dumps({**json.loads(marker.read_text()), "files": listing(files, checkpoint)}))


def edit_manifest(store: Path, edit: Callable[[dict], None]) -> None:
    """Changes the manifest of a code store, and its checksum too."""
    path = store / MANIFEST_NAME
    manifest = json.loads(path.read_text())
    del manifest[SEAL]
    edit(manifest)
    path.write_text(json.dumps(sealed(manifest)))
