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


def replace_webdataset_reader(samples: Callable[[str, Any], Iterator[dict[str, Any]]], image_field: str) -> None:
    """Replaces the reader of `datasets` for tars in this process. The class around it infers the types of the fields.

    Args:
        samples: receives the path of a tar and its pairs of a name and an open file, and yields its samples.
        image_field: a field that is an image, beside those whose names are extensions of images.
    """
    from datasets.packaged_modules.webdataset import webdataset

    reader: Any = webdataset.WebDataset
    reader.IMAGE_EXTENSIONS = [*reader.IMAGE_EXTENSIONS, image_field]
    reader._get_pipeline_from_tar = staticmethod(samples)
