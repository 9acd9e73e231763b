"""Settings of the image data: where it comes from, and how training images are changed."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from typing import Annotated, Any, Literal

from annotated_types import Ge, Interval

from configs import ConfigError, Problem, Section
from configs.sections import Fraction, Positive

# How images are brought along, and when a run stops: no influence on the images themselves.
LOADING_FIELDS = {"shuffle_buffer_size", "max_skipped_fraction"}


@dataclass(kw_only=True)
class AugmentationConfig(Section):
    """Random changes to training images.

    max_zoom: the shorter side is resized to between 1 and max_zoom times the image size before the crop
    random_crop: crop anywhere; false crops the centre
    horizontal_flip: mirror half of the images
    rotate: largest rotation in degrees
    translate: largest shift as a fraction of the image's side
    scale: largest relative change of size, for instance 0.1 for 0.9 to 1.1
    ten_crop: instead of random changes the ten views of a code store are the corners and the centre of the square
        that max_zoom makes, and their mirror images
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
                yield other.name, value, "ten_crop leaves nothing to chance; leave it out, or set ten_crop to false"
        if self.max_zoom == 1:
            yield "max_zoom", self.max_zoom, "ten_crop needs more than 1, else all its crops are the same; 1.1 is usual"


@dataclass(kw_only=True)
class DataConfig(Section):
    """Where the images come from.

    dataset: "digits" (1,797 handwritten 8×8 digits that ship with scikit-learn), a folder of images (sub-folders are
        classes), a folder of .parquet or webdataset-style .tar files, one such file, a pattern ("data/*.tar"), or the
        id of a dataset on the Hugging Face Hub
    dataset_config_name: configuration of a Hub dataset
    train_split, validation_split: names of the splits; of a folder of images they are sub-folders, of parquet and tar
        files words in their names. Without a validation split every n-th training image is held out,
        n = 1 / validation_fraction; of a stream, whose length must then be known, the first images are
    validation_fraction: see above
    image_column, label_column: column names; by default the only image column, and the class label column if any
        (of a tar "cls")
    use_labels: false ignores the labels: an unconditional model
    streaming: read parquet, tars or a Hub dataset from front to back, without a copy on the disk. Files of a folder of
        images are read when they are wanted in any case
    shuffle_buffer_size: encoded images of a stream in memory, from which the next is drawn
    aspect_ratio: "crop" resizes the shorter side and crops a square; "pad" resizes the longer side and fills up with
        white
    max_skipped_fraction: images that cannot be used are left out; when they are more than this share of their split,
        the run stops
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
        """The settings that decide which images there are, and what is made of them."""
        return {name: value for name, value in asdict(self).items() if name not in LOADING_FIELDS}


def data_problem(field: str, message: str) -> ConfigError:
    """What to raise when images cannot be had as one key of a `DataConfig` says."""
    return ConfigError([Problem(f"data.{field}", message)])
