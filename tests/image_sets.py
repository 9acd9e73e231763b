"""A set of images in memory, for tests of what reads image sets; and its folder of PNG files."""

import torch
from PIL import Image


class TensorImages:
    """Images `(N, C, H, W)` in [-1, 1] as an `ImageSet`. `reads` counts the images that were read."""

    def __init__(self, images, labels=None):
        self.images, self.labels, self.reads = images, labels, 0

    def __len__(self):
        return len(self.images)

    def read(self, rows):
        self.reads += len(rows)
        return self.images[rows.start : rows.stop]


def random_images(count, size=16, seed=0, contrast=1.0):
    """Smooth images of 256 levels."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 4, 4, generator=generator) * 255 * contrast
    return torch.nn.functional.interpolate(coarse, (size, size), mode="bilinear").round() / 127.5 - 1


def write_pngs(folder, images):
    """Writes images `(N, 3, H, W)` in [-1, 1] as the image processor would; their names sort in their order.

    Returns:
        The folder's name.
    """
    folder.mkdir()
    for number, pixels in enumerate((images + 1) / 2 * 255):
        Image.fromarray(pixels.round().byte().permute(1, 2, 0).numpy()).save(folder / f"{number:05}.png")
    return str(folder)
