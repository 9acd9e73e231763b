"""Trains image generators in two stages, and uses them. Command line: `tessella --help`."""

from pipelines import (
    ScoreOutput as ScoreOutput,
    VQGANPipeline as VQGANPipeline,
    VQGANPipelineOutput as VQGANPipelineOutput,
)
from stage1_vqgan import (
    DataConfig as DataConfig,
    Stage1Config as Stage1Config,
    VQGANConfig as VQGANConfig,
    VQGANImageProcessor as VQGANImageProcessor,
    VQGANModel as VQGANModel,
    image_grid as image_grid,
    load_image_processor as load_image_processor,
    load_images as load_images,
    load_tokenizer as load_tokenizer,
)
from stage2_prior import (
    CodeStore as CodeStore,
    GuidanceSchedule as GuidanceSchedule,
    Stage2Config as Stage2Config,
    TokenLayout as TokenLayout,
    load_prior as load_prior,
)

__version__: str
