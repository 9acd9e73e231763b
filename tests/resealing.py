"""Makes a changed checkpoint look complete, as a person could who changes its files on purpose."""

import json
from pathlib import Path

from configs.checkpoints import MARKER_NAME
from configs.checksums import listing


def reseal(checkpoint: Path) -> None:
    """Lists the present files of a checkpoint, with their checksums, in its marker."""
    marker = checkpoint / MARKER_NAME
    files = [path for path in checkpoint.rglob("*") if path.is_file() and path != marker]
    marker.write_text(json.dumps({**json.loads(marker.read_text()), "files": listing(files, checkpoint)}))
