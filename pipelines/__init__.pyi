"""The pipeline: the prior samples codes, the tokenizer decodes them into images."""

from .clip.guidance import CLIPGuidance as CLIPGuidance, CLIPGuidanceOutput as CLIPGuidanceOutput
from .outputs import VQGANPipelineOutput as VQGANPipelineOutput
from .pipeline_vqgan import VQGANPipeline as VQGANPipeline
from .scoring import ScoreOutput as ScoreOutput
