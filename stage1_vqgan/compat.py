"""All calls of non-public functions of libraries in this package.

tests/stage1_vqgan/test_compat.py fails when such a function disappears or behaves differently.
"""

import torch


def shared_memory(num_bytes: int) -> torch.UntypedStorage:
    """Memory that worker processes share with their parent, zeros, without a file to clean up.

    The system provides a page when it is first written. The public `share_memory_` would write every page: memory for
    images of the largest possible size, even if all images are smaller.
    """
    return torch.UntypedStorage._new_shared(num_bytes)
