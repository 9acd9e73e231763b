"""Features of image sets. All processes compute them together, and the main process keeps them in files.

Shape letters: N images of a set, B of a part, C channels, H W image size, D features of an image.
"""

import math
from pathlib import Path

import torch
import torch.nn.functional as F
import xxhash
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor
from tqdm.auto import tqdm

from pipelines.evaluation.feature_files import FeatureFiles
from pipelines.evaluation.image_set import ImageSet
from stage1_vqgan.evaluation.config import INCEPTION
from stage1_vqgan.networks import FrozenNetwork

# Images of a part, which is one batch of the network. It is fixed, so that features depend neither on the number of
# processes nor on an interruption.
PART = 64
# Outputs of a network. Only Inception has the last two: the maps of sFID, and the logits of the Inception score.
POOLED, SPATIAL, LOGITS = "pooled", "spatial", "logits"


def features_of(images: ImageSet, network: FrozenNetwork, accelerator: Accelerator, folder: Path) -> dict[str, Tensor]:
    """Features of all images, in their order. All processes must call this; each computes every n-th part.

    A call that was interrupted goes on. All images are read again, and the network sees the parts whose images are not
    those of the earlier call.

    Args:
        images: the set; every process reads its parts of it.
        network: computes the features; on the device of the process.
        accelerator: the processes.
        folder: of the files; only the main process uses it.

    Returns:
        In the main process: float32 `(N, D)` by the name of the output. They stay on disk until they are used, so
        memory does not grow with N. In other processes: nothing.

    Raises:
        DiskFull: the message names the file.
    """
    files = None
    if accelerator.is_main_process:
        files = FeatureFiles(folder, checksum_of_network(network), len(images), PART)
    done = broadcast_object_list([files.parts[:] if files else None])[0]
    parts = math.ceil(len(images) / PART)
    rounds = range(0, parts, accelerator.num_processes)
    for first in tqdm(rounds, desc=f"features of {network.name}", unit="round", disable=files is None):
        number = min(first + accelerator.process_index, parts - 1)  # a process without a part repeats the last one
        pixels = in_bytes(images.read(range(number * PART, min((number + 1) * PART, len(images)))))
        checksums = gather_object([checksum_of_images(pixels)])[: parts - first]
        if checksums == done[first : first + len(checksums)]:
            continue
        rows = accelerator.gather(outputs_of(network, pixels.to(accelerator.device)))
        if files:
            files.write(first, checksums, {name: values[: len(images) - first * PART] for name, values in rows.items()})
    return files.read() if files else {}


def in_bytes(images: Tensor) -> Tensor:
    """Images in [-1, 1] as a PNG file would hold them, uint8."""
    return ((images + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


@torch.no_grad()
def outputs_of(network: FrozenNetwork, pixels: Tensor) -> dict[str, Tensor]:
    """What metrics use of a network's outputs.

    Args:
        network: computes the features.
        pixels: uint8 `(B, C, H, W)`, at most PART images.

    Returns:
        float32 `(PART, D)` by the name of the output; the rows after the last image are zeros.
    """
    found = network(pixels / 127.5 - 1)
    rows = {POOLED: found.pooled}
    if network.name == INCEPTION:
        rows |= {SPATIAL: found.features[0].flatten(1), LOGITS: found.logits}
    return {name: F.pad(values.float(), (0, 0, 0, PART - len(pixels))) for name, values in rows.items()}


def checksum_of_images(pixels: Tensor) -> str:
    """A checksum of images and of their shape."""
    return xxhash.xxh3_64_hexdigest(str(tuple(pixels.shape)).encode() + pixels.contiguous().numpy().tobytes())


def checksum_of_network(network: FrozenNetwork) -> str:
    """A checksum of the network's name and weights."""
    digest = xxhash.xxh3_128(network.name.encode())
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
