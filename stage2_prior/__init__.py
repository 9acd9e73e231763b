"""Stage 2: the autoregressive prior over a tokenizer's codes, its data, training and sampling."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from stage2_prior.code_store import CodeStore
    from stage2_prior.prior import load_prior
    from stage2_prior.randomness import draw_seeds
    from stage2_prior.sampling import CodeSampler, sample_codes
    from stage2_prior.sampling_memory import batch_size_that_fits
    from stage2_prior.sampling_options import GuidanceSchedule, SamplingOptions
    from stage2_prior.training_config import Stage2Config
    from stage2_prior.vocabulary import TokenLayout

# Names are loaded on first use: importing this package imports nothing else.
_HOMES = {
    "CodeSampler": "sampling",
    "CodeStore": "code_store",
    "GuidanceSchedule": "sampling_options",
    "SamplingOptions": "sampling_options",
    "load_prior": "prior",
    "batch_size_that_fits": "sampling_memory",
    "draw_seeds": "randomness",
    "sample_codes": "sampling",
    "Stage2Config": "training_config",
    "TokenLayout": "vocabulary",
}

__all__ = [
    "CodeSampler",
    "CodeStore",
    "GuidanceSchedule",
    "SamplingOptions",
    "Stage2Config",
    "TokenLayout",
    "batch_size_that_fits",
    "draw_seeds",
    "load_prior",
    "sample_codes",
]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'stage2_prior' has no attribute '{name}'")
    from importlib import import_module

    return getattr(import_module(f"stage2_prior.{_HOMES[name]}"), name)
