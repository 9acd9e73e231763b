"""The pipeline: the prior samples codes, the tokenizer decodes them into images."""

from .pipeline_vqgan import VQGANPipeline as VQGANPipeline, VQGANPipelineOutput as VQGANPipelineOutput
