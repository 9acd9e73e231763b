"""Settings of the training of a feature network."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from annotated_types import Ge, Le

from configs import Section
from configs.sections import LARGEST_BATCH, NonNegative, Positive, PositiveFloat, Seed, worker_problems
from stage1_vqgan.data.config import DataConfig
from stage1_vqgan.training.config import MOST_CHANNELS

LARGEST_SIDE = 2**12  # of an image, in pixels
SMALLEST_INPUT, STRIDE = 64, 32  # pixels; ResNet halves images five times


@dataclass(kw_only=True)
class FeaturesConfig(Section):
    """Trains a small network to tell the classes of your images. Losses and metrics then use its features.

    data: the images; they need labels
    output_dir: a new folder for the network
    image_size: side of the images in pixels, or [height, width]: that of the tokenizer whose images it will see
    in_channels: channels of the images: 1 is gray; with 3 the network takes gray and colour
    max_steps: optimizer steps
    per_device_train_batch_size: images on one device in one step
    learning_rate: peak learning rate
    seed: seed of initial weights, order and augmentation
    dataloader_num_workers: processes that decode images; 0 decodes in the training process
    """

    data: DataConfig
    output_dir: str
    image_size: Annotated[int, Ge(1), Le(LARGEST_SIDE)] | list[Annotated[int, Ge(1), Le(LARGEST_SIDE)]] = 64
    in_channels: Annotated[int, Ge(1), Le(MOST_CHANNELS)] = 3
    max_steps: Positive = 2000
    per_device_train_batch_size: Annotated[int, Ge(2), Le(LARGEST_BATCH)] = 64
    learning_rate: PositiveFloat = 1e-3
    seed: Seed = 0
    dataloader_num_workers: NonNegative = 0

    refused: ClassVar[dict[str, str]] = {
        **dict.fromkeys(("num_train_epochs", "epochs", "num_epochs"), "the length of a training is max_steps"),
        "batch_size": "write per_device_train_batch_size",
        "lr": "write learning_rate",
    }

    @property
    def image_shape(self) -> tuple[int, int]:
        """Height and width of the images."""
        sides = self.image_size if isinstance(self.image_size, list) else [self.image_size] * 2
        return sides[0], sides[1]

    @property
    def input_size(self) -> int:
        """Side of the square to which the network brings images: the longer side, up to a multiple of 32, at least 64.

        ResNet begins with two halvings, so it sees little in smaller images.
        """
        return max(SMALLEST_INPUT, -(-max(self.image_shape) // STRIDE) * STRIDE)

    def problems(self) -> Iterable[tuple[str, Any, str]]:
        if isinstance(self.image_size, list) and len(self.image_size) != 2:
            yield "image_size", self.image_size, "must be a number of pixels, or [height, width]"
        if self.data.augmentation.ten_crop:
            yield "data.augmentation.ten_crop", True, "it is for the views of a code store; use random_crop"
        if self.data.streaming or not self.data.use_labels:
            key = "streaming" if self.data.streaming else "use_labels"
            yield f"data.{key}", getattr(self.data, key), "the network learns labels, which are read by number"
        yield from worker_problems(self)
