"""Stage 1: the VQGAN tokenizer, its data and its training."""

from .configuration_vqgan import VQGANConfig as VQGANConfig
from .convert.command import import_tokenizer as import_tokenizer, written_beside as written_beside
from .convert.config import ConvertConfig as ConvertConfig
from .convert.files import (
    as_float32 as as_float32,
    is_stored as is_stored,
    read_mapping as read_mapping,
    refuse as refuse,
)
from .convert.names import count as count
from .convert.original import leave_out as leave_out, require_complete as require_complete, section as section
from .convert.unwrap import prefixes as prefixes, read_state as read_state
from .data.config import AugmentationConfig as AugmentationConfig, DataConfig as DataConfig
from .data.dataset import ImageBatch as ImageBatch, ImageDataset as ImageDataset, ImageKey as ImageKey
from .data.decoding import (
    EncodedImage as EncodedImage,
    SkippedImage as SkippedImage,
    UndecodableImage as UndecodableImage,
    decode as decode,
)
from .data.fingerprint import fingerprint_of_images as fingerprint_of_images, some_keys as some_keys
from .data.indexed import ImageSource as ImageSource
from .data.labels import read_labels as read_labels, warn_of_empty_classes as warn_of_empty_classes
from .data.loading import keyed_loader as keyed_loader
from .data.overview import LOOKED_AT_FIRST as LOOKED_AT_FIRST, data_facts as data_facts, look as look
from .data.samplers import TrainingSampler as TrainingSampler
from .data.skipped import too_many_skipped as too_many_skipped
from .data.sources import Images as Images, load_images as load_images
from .data.streamed import ImageStream as ImageStream
from .image_processing_shapes import AspectRatio as AspectRatio, normalize as normalize, to_shape as to_shape
from .image_processing_values import ValueRange as ValueRange
from .image_processing_vqgan import VQGANImageProcessor as VQGANImageProcessor
from .modeling_vqgan import VQGANModel as VQGANModel
from .pictures import (
    image_grid as image_grid,
    labelled_grid as labelled_grid,
    reconstruction_grid as reconstruction_grid,
    spread as spread,
    with_row_labels as with_row_labels,
)
from .pretrained import (
    load_image_processor as load_image_processor,
    load_tokenizer as load_tokenizer,
    load_vqgan as load_vqgan,
    require_range as require_range,
    trained_range as trained_range,
)
from .quantizer_grids import (
    Grids as Grids,
    codes_shape as codes_shape,
    grids_text as grids_text,
    num_codes as num_codes,
)
from .siblings import import_own as import_own
from .tiles import decode_tiled as decode_tiled, encode_tiled as encode_tiled, tiled as tiled
from .training.config import Stage1Config as Stage1Config
