"""How many images the tokenizer encodes or decodes at once."""

from configs.memory import USABLE, free_memory
from stage1_vqgan import VQGANModel

# Larger chunks are not faster.
LARGEST_CHUNK = 2**22  # pixels

# Feature maps of the widest level that the tokenizer holds at once: input and output of a residual block, what its
# normalisation and convolution leave between them, and the memory that the convolution works in.
MAPS_AT_ONCE = 8


def images_at_once(vqgan: VQGANModel, pixels: int) -> int:
    """Images in one chunk, at least 1.

    Args:
        vqgan: the tokenizer, on its device.
        pixels: of one image, H·W.
    """
    widths = vqgan.config.widths
    # at each level the decoder holds the channels of this level or of the one below, for a quarter of the pixels above
    pairs = zip(widths, [*widths[1:], widths[-1]], strict=True)
    channels_per_pixel = max(vqgan.config.base_channels, *(max(pair) / 4**level for level, pair in enumerate(pairs)))
    each = int(MAPS_AT_ONCE * channels_per_pixel * pixels * vqgan.dtype.itemsize)
    return max(1, min(LARGEST_CHUNK // pixels, int(USABLE * free_memory(vqgan.device)) // each))
