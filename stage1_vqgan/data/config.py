"""Configuration of the image data: the source, and the augmentation of training images."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from typing import Annotated, Any, Literal

from annotated_types import Ge, Interval

from configs import ConfigError, Problem, Section
from configs.sections import Fraction, Positive

# Fields that change how images are loaded, or when a run stops, but not the images.
LOADING_FIELDS = {"shuffle_buffer_size", "max_skipped_fraction"}


@dataclass(kw_only=True)
class AugmentationConfig(Section):
    """Random changes to training images.

    max_zoom: before the crop, the shorter side is resized to between 1 and max_zoom times the image size
    random_crop: crop at a random position; false crops the centre
    horizontal_flip: mirror each image with probability one half
    rotate: largest rotation in degrees
    translate: largest shift, as a fraction of the image's side
    scale: largest relative change of size; 0.1 scales by 0.9 to 1.1
    ten_crop: no random changes; the ten views of a code store are crops of a square max_zoom times the image size: the
        four corners, the centre, and the mirror images of these five
    """

    max_zoom: Annotated[float, Ge(1)] = 1.0
    random_crop: bool = False
    horizontal_flip: bool = False
    rotate: Annotated[float, Interval(ge=0, le=180)] = 0.0
    translate: Fraction = 0.0
    scale: Annotated[float, Interval(ge=0, lt=1)] = 0.0
    ten_crop: bool = False

    def problems(self) -> Iterable[tuple[str, Any, str]]:
        if not self.ten_crop:
            return
        for other in fields(self):
            value = getattr(self, other.name)
            if other.name not in ("max_zoom", "ten_crop") and value != other.default:
                yield other.name, value, "ten_crop allows no random changes; leave it out, or set ten_crop to false"
        if self.max_zoom == 1:
            yield "max_zoom", self.max_zoom, "ten_crop needs more than 1, else all crops are the same; 1.1 is usual"


@dataclass(kw_only=True)
class DataConfig(Section):
    """Where the images come from.

    dataset: "digits" (1,797 handwritten 8×8 digits that ship with scikit-learn), a folder of images (sub-folders are
        classes), a folder of .parquet or webdataset-style .tar files, one such file, a pattern ("data/*.tar"), or the
        id of a dataset on the Hugging Face Hub
    dataset_config_name: configuration of a Hub dataset
    train_split, validation_split: names of the splits. A folder of images has a sub-folder for each split; parquet and
        tar files have the split in their names. Without a validation split, every n-th training image is held out, with
        n = 1 / validation_fraction; a stream must then state its length, and its first images are held out
    validation_fraction: fraction of the training images to hold out if there is no validation split
    image_column, label_column: column names; by default the only image column, and the only column of class labels if
        there is one (in a tar, "cls")
    use_labels: false ignores the labels and trains an unconditional model
    streaming: read parquet, tar or Hub data in order, without a copy on the disk. Images of a folder are always read
        one by one from their files
    shuffle_buffer_size: number of encoded images of a stream to keep in memory; the next image is drawn from them
    aspect_ratio: "crop" resizes the shorter side and crops a square; "pad" resizes the longer side and fills the square
        with white
    max_skipped_fraction: images that cannot be decoded are skipped; the run stops when more than this fraction of a
        split is skipped
    """

    dataset: str
    dataset_config_name: str | None = None
    train_split: str = "train"
    validation_split: str | None = None
    validation_fraction: Annotated[float, Interval(gt=0, le=0.5)] = 0.05
    image_column: str | None = None
    label_column: str | None = None
    use_labels: bool = True
    streaming: bool = False
    shuffle_buffer_size: Positive = 1000
    augmentation: AugmentationConfig = field(default_factory=AugmentationConfig)
    aspect_ratio: Literal["crop", "pad"] = "crop"
    max_skipped_fraction: Fraction = 0.01

    def identity(self) -> dict[str, Any]:
        """The fields that decide which images are read and which pixels they become."""
        return {name: value for name, value in asdict(self).items() if name not in LOADING_FIELDS}


def data_problem(field: str, message: str) -> ConfigError:
    """The error for images that cannot be read as a field of `DataConfig` asks."""
    return ConfigError([Problem(f"data.{field}", message)])
