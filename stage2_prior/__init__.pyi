"""Stage 2: the autoregressive prior over a tokenizer's codes, its data, training and sampling."""

from .adapters import without_adapters as without_adapters
from .code_store import CodeSplit as CodeSplit, CodeStore as CodeStore
from .conditions import CLASS as CLASS, Segment as Segment
from .entropy_coding import (
    SymbolReader as SymbolReader,
    SymbolWriter as SymbolWriter,
    read_codes as read_codes,
    write_codes as write_codes,
)
from .likelihood import code_nats as code_nats, marginal_nats as marginal_nats
from .pretrained import load_language_model as load_language_model
from .prior import load_prior as load_prior
from .sampling.arguments import require_callback as require_callback
from .sampling.decoders import DecoderPool as DecoderPool
from .sampling.loop import sample as sample, sample_codes as sample_codes
from .sampling.memory import batch_size_that_fits as batch_size_that_fits
from .sampling.options import GuidanceSchedule as GuidanceSchedule, SamplingOptions as SamplingOptions
from .sampling.unmasking import UnmaskingOptions as UnmaskingOptions, UnmaskingOrder as UnmaskingOrder, unmask as unmask
from .training.config import Stage2Config as Stage2Config
from .vocabulary import TokenLayout as TokenLayout
