"""Images for training: from a folder, parquet, the Hub, or the built-in digits, to uint8 batches.

Every random choice is keyed by (seed, epoch, index, view), never drawn from a global generator, so a batch does not
depend on workers, processes or interruptions.
"""

import io
import logging
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from annotated_types import Ge, Interval
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from configs import ConfigError, Problem, Section
from configs.sections import Fraction
from stage1_vqgan.image_processing_vqgan import convert_mode, resize_and_crop, to_uint8

DIGITS = "digits"

logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class AugmentationConfig(Section):
    """Random changes to training images.

    max_zoom: the shorter side is resized to between 1 and max_zoom times the image size before the crop
    random_crop: crop anywhere; false crops the centre
    horizontal_flip: mirror half of the images
    rotate: largest rotation in degrees
    translate: largest shift as a fraction of the image's side
    scale: largest relative change of size, for instance 0.1 for 0.9 to 1.1
    """

    max_zoom: Annotated[float, Ge(1)] = 1.0
    random_crop: bool = False
    horizontal_flip: bool = False
    rotate: Annotated[float, Interval(ge=0, le=180)] = 0.0
    translate: Fraction = 0.0
    scale: Annotated[float, Interval(ge=0, lt=1)] = 0.0


@dataclass(kw_only=True)
class DataConfig(Section):
    """Where the images come from.

    dataset: "digits" (1,797 handwritten 8×8 digits that ship with scikit-learn), a folder of images (sub-folders are
        classes), a folder of parquet files or one parquet file, or the id of a dataset on the Hugging Face Hub
    dataset_config_name: configuration of a Hub dataset
    train_split, validation_split: names of the splits; without a validation split every n-th training image is held
        out, n = 1 / validation_fraction
    validation_fraction: see above
    image_column, label_column: column names; by default the only image column, and the class label column if any
    use_labels: false ignores the labels: an unconditional model
    """

    dataset: str
    dataset_config_name: str | None = None
    train_split: str = "train"
    validation_split: str | None = None
    validation_fraction: Annotated[float, Interval(gt=0, le=0.5)] = 0.05
    image_column: str | None = None
    label_column: str | None = None
    use_labels: bool = True
    augmentation: AugmentationConfig = field(default_factory=AugmentationConfig)


@dataclass(frozen=True)
class ImageSource:
    """One split: encoded or decoded images by index, with their labels.

    Attributes:
        images: PIL images, or a `datasets.Dataset` of one undecoded image column.
        labels: int64 `(n,)`, or None.
        class_names: names of the labels 0 … C-1, or None.
    """

    images: Any
    labels: np.ndarray | None
    class_names: list[str] | None

    def __len__(self) -> int:
        return len(self.images)

    def read(self, indices: Sequence[int]) -> list[Image.Image]:
        """Decoded images.

        Raises:
            ValueError: an image cannot be decoded.
        """
        if isinstance(self.images, list):
            return [self.images[index] for index in indices]
        (column,) = self.images.column_names
        return [_decode(item, index) for item, index in zip(self.images[list(indices)][column], indices, strict=True)]


def load_images(config: DataConfig) -> tuple[ImageSource, ImageSource]:
    """Opens the training and the validation split.

    Raises:
        ConfigError: the source, a split or a column does not exist.
    """
    if config.dataset == DIGITS:
        return _load_digits(config)
    return _load_dataset(config)


@dataclass(frozen=True)
class ImageDataset(Dataset):
    """Images of one split as uint8 squares, augmented by key.

    Items are addressed by `(epoch, index, view)`; with `augmentation=None` only the index matters. With
    `first_view_plain` view 0 is the image itself.
    """

    source: ImageSource
    image_size: int
    num_channels: int
    augmentation: AugmentationConfig | None = None
    seed: int = 0
    first_view_plain: bool = False

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: tuple[int, int, int]) -> Tensor:
        return self.__getitems__([key])[0]

    def __getitems__(self, keys: Sequence[tuple[int, int, int]]) -> list[Tensor]:
        """uint8 tensors `(C, image_size, image_size)`, one for each key."""
        images = self.source.read([index for _, index, _ in keys])
        return [torch.from_numpy(to_uint8(self._transform(*pair))) for pair in zip(images, keys, strict=True)]

    def _transform(self, image: Image.Image, key: tuple[int, int, int]) -> Image.Image:
        image = convert_mode(image, self.num_channels)
        epoch, index, view = key
        if self.augmentation is None or (self.first_view_plain and view == 0):
            return resize_and_crop(image, self.image_size)
        rng = np.random.default_rng((self.seed, epoch, index, view))
        return augment(image, self.image_size, self.augmentation, rng)


def augment(image: Image.Image, size: int, config: AugmentationConfig, rng: np.random.Generator) -> Image.Image:
    """Random resize, crop, flip and affine change of an 8-bit image; the result is a `size × size` square."""
    zoom, left, top, flip = rng.random(4)
    position = (left, top) if config.random_crop else (0.5, 0.5)
    image = resize_and_crop(image, size, 1 + zoom * (config.max_zoom - 1), position)
    if config.horizontal_flip and flip < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if config.rotate or config.translate or config.scale:
        angle, shift_x, shift_y, scale = rng.uniform(-1, 1, 4)
        image = affine(
            image,
            math.radians(angle * config.rotate),
            1 + scale * config.scale,
            (shift_x * config.translate * size, shift_y * config.translate * size),
        )
    return image


def affine(image: Image.Image, angle: float, scale: float, shift: tuple[float, float]) -> Image.Image:
    """Rotates by `angle` (radians) and scales about the centre, then shifts (pixels); the border is repeated."""
    size = image.size[0]
    cos, sin = math.cos(angle) / scale, math.sin(angle) / scale
    centre = size / 2
    # how far outside the image its corners are looked up, and two pixels more for the interpolation
    reach = centre * (abs(cos) + abs(sin)) + math.hypot(*shift) / scale
    margin = max(0, math.ceil(reach - centre)) + 2
    pixels = np.asarray(image)
    padded = Image.fromarray(np.pad(pixels, [(margin, margin)] * 2 + [(0, 0)] * (pixels.ndim - 2), mode="edge"))
    # PIL wants the map from result to source: undo the shift, rotate back about the centre, then the margin
    x, y = -centre - shift[0], -centre - shift[1]
    matrix = (
        cos, sin, cos * x + sin * y + centre + margin,
        -sin, cos, -sin * x + cos * y + centre + margin,
    )  # fmt: skip
    return padded.transform((size, size), Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC)


class TrainingSampler(Sampler[list[tuple[int, int, int]]]):
    """Batches of keys for one process, a pure function of (seed, step): nothing to save for an exact resume.

    Every epoch is a permutation; one batch of every process together is a slice of it, so no image comes twice in an
    epoch and at most one global batch is dropped at its end.

    Args:
        num_images: images in the split.
        batch_size: images in a batch of one process.
        start, stop: range of batches to yield.
        seed: of the permutations.
        rank, world_size: this process and how many there are.
    """

    def __init__(
        self, num_images: int, batch_size: int, start: int, stop: int, seed: int, rank: int = 0, world_size: int = 1
    ):
        if num_images < batch_size * world_size:
            raise ConfigError(
                [
                    Problem(
                        "per_device_train_batch_size",
                        f"received {batch_size} on {world_size} process(es), but there are only {num_images} training "
                        "images; use a smaller batch",
                    )
                ]
            )
        self.num_images, self.batch_size, self.seed = num_images, batch_size, seed
        self.start, self.stop, self.rank, self.world_size = start, stop, rank, world_size

    def __len__(self) -> int:
        return self.stop - self.start

    def __iter__(self) -> Iterator[list[tuple[int, int, int]]]:
        global_batch = self.batch_size * self.world_size
        per_epoch = self.num_images // global_batch
        current, order = -1, np.empty(0, dtype=np.int64)
        for batch in range(self.start, self.stop):
            epoch, position = divmod(batch, per_epoch)
            if epoch != current:
                current, order = epoch, np.random.default_rng((self.seed, epoch)).permutation(self.num_images)
            first = position * global_batch + self.rank * self.batch_size
            yield [(epoch, int(index), 0) for index in order[first : first + self.batch_size]]


def training_loader(dataset: ImageDataset, sampler: TrainingSampler, num_workers: int, pin_memory: bool) -> DataLoader:
    """uint8 batches `(B, C, H, W)` in the sampler's order."""
    return DataLoader(dataset, batch_sampler=sampler, num_workers=num_workers, pin_memory=pin_memory)


def keyed_loader(
    dataset: ImageDataset,
    keys: Iterable[tuple[int, int, int]],
    batch_size: int,
    num_workers: int = 0,
    pin_memory: bool = False,
) -> DataLoader:
    """uint8 batches of the given keys in order, each exactly once."""
    return DataLoader(
        dataset,
        sampler=list(keys),  # type: ignore[arg-type]
        batch_size=batch_size,
        num_workers=num_workers,
        pin_memory=pin_memory,
    )


def _load_digits(config: DataConfig) -> tuple[ImageSource, ImageSource]:
    from sklearn.datasets import load_digits

    digits = load_digits()
    pixels = np.round(digits.images * (255 / 16)).astype(np.uint8)
    is_test = np.arange(len(pixels)) % 5 == 0

    def split(mask: np.ndarray) -> ImageSource:
        labels = digits.target[mask].astype(np.int64) if config.use_labels else None
        names = [str(digit) for digit in range(10)] if config.use_labels else None
        return ImageSource([Image.fromarray(image) for image in pixels[mask]], labels, names)

    return split(~is_test), split(is_test)


def _load_dataset(config: DataConfig) -> tuple[ImageSource, ImageSource]:
    import datasets

    path = Path(config.dataset).expanduser()
    if not path.exists() and _looks_like_a_path(config.dataset):
        raise ConfigError(
            [Problem("data.dataset", f"received {config.dataset!r}; there is no such file or folder (give 'digits', "
                     "a folder of images or parquet files, a parquet file, or a Hub dataset id)")]
        )  # fmt: skip
    try:
        if path.is_file():
            splits = datasets.load_dataset("parquet", data_files={config.train_split: str(path)})
        else:
            source = str(path) if path.is_dir() else config.dataset
            splits = datasets.load_dataset(source, name=config.dataset_config_name)
    except Exception as error:  # datasets raises many kinds; each means that this source cannot be used
        raise ConfigError([Problem("data.dataset", f"{config.dataset!r} cannot be loaded: {error}")]) from error
    for key in ("train_split", "validation_split"):
        name = getattr(config, key)
        if name is not None and name not in splits:
            raise ConfigError([Problem(f"data.{key}", f"received {name!r}; the dataset has {sorted(splits)}")])
    train = splits[config.train_split]
    if config.validation_split is not None:
        pair = _to_source(train, config), _to_source(splits[config.validation_split], config)
    else:
        held_out = np.arange(len(train)) % round(1 / config.validation_fraction) == 0
        training, validation = (train.select(np.flatnonzero(chosen)) for chosen in (~held_out, held_out))
        pair = _to_source(training, config), _to_source(validation, config)
    if pair[0].labels is None and config.use_labels:
        logger.warning("no class labels in %s: the model will be unconditional", config.dataset)
    # classes without names are counted over both splits
    names = max((source.class_names for source in pair if source.class_names is not None), key=len, default=None)
    return replace(pair[0], class_names=names), replace(pair[1], class_names=names)


def _to_source(split: Any, config: DataConfig) -> ImageSource:
    from datasets import ClassLabel
    from datasets import Image as ImageFeature

    image_columns = [name for name, feature in split.features.items() if isinstance(feature, ImageFeature)]
    image_column = config.image_column or (image_columns[0] if len(image_columns) == 1 else "image")
    if image_column not in split.features:
        raise ConfigError(
            [Problem("data.image_column", f"received {config.image_column!r}; the columns are {split.column_names}")]
        )
    try:
        images = split.select_columns([image_column]).cast_column(image_column, ImageFeature(decode=False))
    except Exception as error:  # Arrow's own kinds, one for each type that is not an image
        message = f"received {image_column!r}; its values are not images but {split.features[image_column]}"
        raise ConfigError([Problem("data.image_column", message)]) from error

    label_columns = [name for name, feature in split.features.items() if isinstance(feature, ClassLabel)]
    if config.use_labels and config.label_column is None and len(label_columns) > 1:
        message = f"there are several columns of class labels; name one: {', '.join(label_columns)}"
        raise ConfigError([Problem("data.label_column", message)])
    label_column = config.label_column or (label_columns[0] if label_columns else None)
    if not config.use_labels or label_column is None:
        return ImageSource(images, None, None)
    if label_column not in split.features:
        raise ConfigError(
            [Problem("data.label_column", f"received {label_column!r}; the columns are {split.column_names}")]
        )
    labels = np.asarray(split.with_format("numpy")[label_column][:])
    if not np.issubdtype(labels.dtype, np.integer) or labels.min(initial=0) < 0:
        raise ConfigError(
            [Problem("data.label_column", f"received {label_column!r}; its values must be class numbers from 0 up")]
        )
    feature = split.features[label_column]
    names = feature.names if isinstance(feature, ClassLabel) else [str(n) for n in range(int(labels.max()) + 1)]
    return ImageSource(images, labels.astype(np.int64), list(names))


def _looks_like_a_path(name: str) -> bool:
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or Path(name).suffix == ".parquet"


def _decode(item: dict[str, Any], index: int) -> Image.Image:
    name = item["path"] or f"image {index}"
    try:
        image = Image.open(io.BytesIO(item["bytes"]) if item["bytes"] is not None else item["path"])
        image.load()
    except Exception as error:
        raise ValueError(f"{name} (index {index}) cannot be decoded: {error}") from error
    return image
