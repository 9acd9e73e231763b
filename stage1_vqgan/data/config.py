"""Settings of the image data: its source, and the augmentation of training images."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from typing import Annotated, Any, Literal

from annotated_types import Interval

from configs import ConfigError, Problem, Section
from configs.sections import Fraction, Positive

# These settings do not change the images, so an interrupted code store may continue with other values. The range of
# values is that of the tokenizer.
FREE_KEYS = {"shuffle_buffer_size", "max_skipped_fraction", "value_range"}

# The columns of a code store that are not those of the data set.
STORED = ("codes", "label", "condition")


@dataclass(kw_only=True)
class AugmentationConfig(Section):
    """Augmentation: random changes to training images.

    max_zoom: before the crop, the shorter side is resized to the image size times a random factor from 1 to max_zoom
    random_crop: crop at a random position; false crops the centre
    horizontal_flip: mirror an image with probability 1/2
    rotate: largest rotation in degrees
    translate: largest shift as a fraction of the image's side
    scale: largest relative change of size, for instance 0.1 for 0.9 to 1.1
    ten_crop: replaces random changes by ten fixed views for a code store: images are resized by max_zoom and cropped at
        the four corners and the centre, and each crop is mirrored as well
    """

    max_zoom: Annotated[float, Interval(ge=1, le=16)] = 1.0
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
                yield other.name, value, "ten_crop makes no random changes; leave this out, or set ten_crop to false"
        if self.max_zoom == 1:
            yield "max_zoom", self.max_zoom, "ten_crop needs more than 1, or all crops are the same; 1.1 is usual"


@dataclass(kw_only=True)
class DataConfig(Section):
    """Image data.

    dataset: "digits" (1,797 handwritten 8×8 digits that ship with scikit-learn), a folder of images (sub-folders are
        classes), a folder of .parquet or webdataset-style .tar files, one such file, a pattern ("data/*.tar"), or the
        id of a dataset on the Hugging Face Hub
    dataset_config_name: name of a configuration of a Hub dataset
    train_split, validation_split: names of the splits: sub-folders of a folder of images, words in the names of parquet
        and tar files, or splits of a Hub dataset; with validation_split null, validation images are held out from
        the training split
    validation_fraction: fraction of the training images to hold out: every n-th image, n = 1 / validation_fraction; of
        a stream the first images, which needs a stream of known length
    image_column, label_column: names of columns; by default the only image column, and the column that is declared as
        labels or named label (in a tar "cls", or the key label of "json", which is the column "json.label")
    columns: further columns to keep in a code store, such as [style, text]; text and numbers only
    use_labels: false ignores the labels and gives an unconditional model
    streaming: read parquet files, tar files or a Hub dataset from front to back, without a copy on disk; has no effect
        on a folder of images, whose files are always read on demand
    shuffle_buffer_size: number of encoded images of a stream in memory, from which the next image is drawn
    aspect_ratio: "crop" resizes the shorter side and crops a square; "pad" resizes the longer side and pads with white
    value_range: the pixel values that become black and white, one range for all images: null takes that of the type
        (8 bits 0 to 255, 16 bits 0 to 65535; floats and signed numbers have none), [low, high] is taken, "auto"
        measures the training images; the tokenizer keeps the range
    max_skipped_fraction: images that cannot be decoded are skipped; the run stops when they exceed this fraction of
        their split
    """

    dataset: str
    dataset_config_name: str | None = None
    train_split: str = "train"
    validation_split: str | None = None
    validation_fraction: Annotated[float, Interval(gt=0, le=0.5)] = 0.05
    image_column: str | None = None
    label_column: str | None = None
    columns: list[str] = field(default_factory=list)
    use_labels: bool = True
    streaming: bool = False
    shuffle_buffer_size: Positive = 1000
    augmentation: AugmentationConfig = field(default_factory=AugmentationConfig)
    aspect_ratio: Literal["crop", "pad"] = "crop"
    value_range: list[float] | str | None = None
    max_skipped_fraction: Fraction = 0.01

    def problems(self) -> Iterable[tuple[str, Any, str]]:
        given = self.value_range
        is_pair = isinstance(given, list) and len(given) == 2 and given[0] < given[1]
        if given is not None and given != "auto" and not is_pair:
            allowed = "must be null, 'auto' or [low, high], the values that become black and white, low below high"
            yield "value_range", given, allowed
        if len(set(self.columns)) < len(self.columns) or set(self.columns) & set(STORED):
            yield (
                "columns",
                self.columns,
                f"a name may stand here once, and {', '.join(STORED)} are columns of every code store",
            )

    def identity(self) -> dict[str, Any]:
        """The settings that determine which images the data set contains, and how they are prepared."""
        settings = {key: value for key, value in asdict(self).items() if key not in FREE_KEYS}
        if not self.columns:  # so that the codes of earlier stores stay valid
            del settings["columns"]
        return settings


def data_problem(key: str, message: str) -> ConfigError:
    """The error to raise when a key of a `DataConfig` does not fit the data."""
    return ConfigError([Problem(f"data.{key}", message)])
