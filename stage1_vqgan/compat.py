"""All calls of non-public functions of libraries in this package.

tests/stage1_vqgan/test_compat.py fails when such a function disappears or behaves differently.
"""

import torch


def shared_memory(num_bytes: int) -> torch.UntypedStorage:
    """Memory filled with zeros that worker processes share with their parent. It leaves no file behind.

    The operating system allocates a page when a process first writes to it. The public `share_memory_` writes to every
    page, so it would allocate memory for images of the largest size even if all images are smaller.
    """
    return torch.UntypedStorage._new_shared(num_bytes)
