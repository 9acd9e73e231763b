"""The pipeline: prior and tokenizer together, images out."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pipelines.pipeline_vqgan import VQGANPipeline, VQGANPipelineOutput

# Names are loaded on first use: importing this package imports nothing else.
_HOMES = {"VQGANPipeline": "pipeline_vqgan", "VQGANPipelineOutput": "pipeline_vqgan"}

__all__ = ["VQGANPipeline", "VQGANPipelineOutput"]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'pipelines' has no attribute '{name}'")
    from importlib import import_module

    return getattr(import_module(f"pipelines.{_HOMES[name]}"), name)
