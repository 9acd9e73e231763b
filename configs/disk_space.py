"""Full disks: free space is checked before a large write, and the error of any write says how to go on."""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from configs.problems import in_bytes

# Numbers of the errors if the disk, the quota or the largest file is full, and how other libraries write them.
NUMBERS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
WORDS = ("no space left on device", "disk quota exceeded", *(f"os error {number})" for number in NUMBERS))

SHARED_MEMORY = (
    "the shared memory (/dev/shm) through which workers send images is full; enlarge it (docker run --shm-size 2g), "
    "or set dataloader_num_workers 0"
)


class DiskFull(OSError):
    """A disk has too little space. The message names the file, the free space and, if known, the needed space."""

    exit_code = 4


def require_space(folder: str | Path, needed: int, what: str) -> None:
    """Checks the free space before something is written.

    Args:
        folder: an existing folder on the disk.
        needed: bytes.
        what: what is written, for the message.

    Raises:
        DiskFull: less than `needed` is free.
    """
    free = free_space(folder)
    if free < needed:
        raise DiskFull(errno.ENOSPC, f"{what} needs {in_bytes(needed)} in {folder}, and only {in_bytes(free)} are free")


def free_space(path: str | Path) -> int:
    """Free bytes on the disk of a path, which may not exist yet."""
    return shutil.disk_usage(next(folder for folder in (Path(path), *Path(path).parents) if folder.exists())).free


@contextmanager
def naming_full_disk(folder: str | Path) -> Iterator[None]:
    """Turns the errors of a full disk, of any library, into `DiskFull`.

    Args:
        folder: the file or folder that the context writes; the message names it if the error names no file.
    """
    try:
        yield
    except DiskFull:
        raise
    except Exception as error:
        if not is_disk_full(error):
            raise
        if "/torch_" in str(error):
            raise DiskFull(errno.ENOSPC, SHARED_MEMORY) from error
        file = os.fspath(getattr(error, "filename", None) or folder)
        raise DiskFull(errno.ENOSPC, f"{file} could not be written: {in_bytes(free_space(folder))} are free") from error


def is_disk_full(error: BaseException) -> bool:
    """Whether an error, or one that it was raised from, says that a disk is full."""
    seen: BaseException | None = error
    while seen is not None:
        if getattr(seen, "errno", None) in NUMBERS:
            return True
        if any(words in str(seen).lower() for words in WORDS):
            return True
        seen = seen.__cause__ or seen.__context__
    return False
