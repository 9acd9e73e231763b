"""Stage 1: the VQGAN tokenizer, its data and its training."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from stage1_vqgan.configuration_vqgan import VQGANConfig
    from stage1_vqgan.data import ImageBatch, ImageDataset, ImageKey
    from stage1_vqgan.data_config import AugmentationConfig, DataConfig
    from stage1_vqgan.decoding import EncodedImage, SkippedImage, UndecodableImage, decode
    from stage1_vqgan.image_processing_vqgan import VQGANImageProcessor, image_grid, normalize
    from stage1_vqgan.image_source import ImageSource
    from stage1_vqgan.image_stream import ImageStream
    from stage1_vqgan.loading import keyed_loader
    from stage1_vqgan.modeling_vqgan import VQGANModel
    from stage1_vqgan.pretrained import is_repo_id, load_tokenizer
    from stage1_vqgan.samplers import IndexSampler, TrainingSampler
    from stage1_vqgan.skipped import too_many_skipped
    from stage1_vqgan.sources import Images, load_images
    from stage1_vqgan.training_config import Stage1Config

# Names are loaded on first use: importing this package imports nothing else.
_HOMES = {
    "VQGANConfig": "configuration_vqgan",
    "VQGANModel": "modeling_vqgan",
    "VQGANImageProcessor": "image_processing_vqgan",
    "image_grid": "image_processing_vqgan",
    "normalize": "image_processing_vqgan",
    "AugmentationConfig": "data_config",
    "DataConfig": "data_config",
    "ImageBatch": "data",
    "ImageDataset": "data",
    "ImageKey": "data",
    "EncodedImage": "decoding",
    "SkippedImage": "decoding",
    "UndecodableImage": "decoding",
    "decode": "decoding",
    "Images": "sources",
    "ImageSource": "image_source",
    "ImageStream": "image_stream",
    "IndexSampler": "samplers",
    "TrainingSampler": "samplers",
    "keyed_loader": "loading",
    "load_images": "sources",
    "too_many_skipped": "skipped",
    "is_repo_id": "pretrained",
    "load_tokenizer": "pretrained",
    "Stage1Config": "training_config",
}

__all__ = [
    "AugmentationConfig",
    "DataConfig",
    "EncodedImage",
    "ImageBatch",
    "ImageDataset",
    "ImageKey",
    "ImageSource",
    "ImageStream",
    "Images",
    "IndexSampler",
    "SkippedImage",
    "Stage1Config",
    "TrainingSampler",
    "UndecodableImage",
    "VQGANConfig",
    "VQGANImageProcessor",
    "VQGANModel",
    "decode",
    "image_grid",
    "is_repo_id",
    "keyed_loader",
    "load_images",
    "load_tokenizer",
    "normalize",
    "too_many_skipped",
]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'stage1_vqgan' has no attribute '{name}'")
    from importlib import import_module

    return getattr(import_module(f"stage1_vqgan.{_HOMES[name]}"), name)
