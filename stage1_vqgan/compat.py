"""All uses of non-public names of torch and datasets in this package.

tests/stage1_vqgan/test_compat.py fails when such a name disappears or behaves differently.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch


def shared_memory(num_bytes: int) -> torch.UntypedStorage:
    """Memory filled with zeros that worker processes share with their parent. It leaves no file behind.

    The operating system allocates a page when a process first writes to it. The public `share_memory_` writes to every
    page, so it would allocate memory for images of the largest size even if all images are smaller.
    """
    return torch.UntypedStorage._new_shared(num_bytes)


def restrict_webdataset(decoded: set[str], check: Callable[[str, Any], Iterator[tuple[str, Any]]]) -> None:
    """Restricts the webdataset reader of `datasets` in this process. All other files in a tar stay bytes.

    Args:
        decoded: extensions of the files that it may decode.
        check: receives the path of a tar and its pairs of a name and an open file, and yields those pairs.
    """
    from datasets.packaged_modules.webdataset import webdataset

    reader: Any = webdataset.WebDataset
    reader.DECODERS = {name: decode for name, decode in reader.DECODERS.items() if name in decoded}
    webdataset.EXTENSION_TO_COMPRESSION_FS_FILE_CLS = {}
    read = reader._get_pipeline_from_tar.__func__
    reader._get_pipeline_from_tar = classmethod(lambda cls, path, files: read(cls, path, check(path, files)))
