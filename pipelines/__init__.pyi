"""The pipeline: prior and tokenizer together, images out."""

from .pipeline_vqgan import VQGANPipeline as VQGANPipeline, VQGANPipelineOutput as VQGANPipelineOutput
