"""Decoding one code on a CPU, as a recording: the operations of the model's forward without the Python between them.

A forward of one token is some four hundred small operations, and half of its time goes into getting from one to the
next. TorchScript's tracer records them once, for every position: where a key is written and how far attention looks
are tensors to it.
"""

import copy
import logging
import textwrap
import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from stage2_prior.sampling.cache import PreallocatedCache

# Rows from which products are faster with a matrix stored by columns, in float32.
FEW_ROWS = 8

logger = logging.getLogger(__name__)

Decode = Callable[[Tensor, Tensor], Tensor]


def trace_decoding(
    prior: PreTrainedModel, forward: Callable[..., Tensor], cache: PreallocatedCache, rows: slice, position: int
) -> Decode | None:
    """Records `forward` for one token, at the last place of the cache, and compares it with the model at `position`.

    Neither place may have been written yet.

    Args:
        prior: the model; the recording has its weights as they are now.
        forward: `forward(prior, tokens, cache, **inputs)`, logits `(rows, V)`.
        cache: that the recording writes and reads.
        rows: of the cache.
        position: the next to be written.

    Returns:
        `decode(tokens, position)`: logits of what follows int64 `tokens` `(rows, 1)` at `position` `(1,)`. None, with a
        warning, if the model cannot be recorded, or decodes otherwise at another position.
    """
    tokens = torch.zeros(rows.stop - rows.start, 1, dtype=torch.int64)
    here, last = torch.tensor([position]), torch.tensor([cache.length - 1])
    expected = forward(prior, tokens, cache.open(rows, position, position + 1))
    try:
        model = without_gradients(prior, len(tokens))

        def decode(tokens: Tensor, position: Tensor) -> Tensor:
            opened = cache.open_window(rows, position, position + 1)  # type: ignore[arg-type]
            return forward(model, tokens, opened, position_ids=position[None], attention_mask=opened.mask)

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a recording that may not hold elsewhere: that is tried
            # not torch.jit.trace, which keeps what it has recorded, weights and cache included, for ever
            graph, _ = torch.jit._get_trace_graph(decode, (tokens, last))
            traced = torch._C._create_function_from_graph("decode", graph)
        if torch.allclose(traced(tokens, here), expected, rtol=1e-3, atol=1e-3 * float(expected.std())):
            return traced
        reason = "what was recorded at one position does not hold at another"
    except (AttributeError, RuntimeError, TypeError, ValueError) as error:
        reason = textwrap.shorten(f"{type(error).__name__}: {error}", 200, placeholder=" …")
    logger.warning("the steps of a %s cannot be recorded and take longer: %s", prior.config.model_type, reason)
    return None


def without_gradients(prior: PreTrainedModel, rows: int) -> PreTrainedModel:
    """The model again, on the same weights, or on copies of matrices whose products are faster stored by columns."""
    weights = {id(parameter): parameter.detach() for parameter in prior.parameters()}
    if rows >= FEW_ROWS:
        table = prior.get_input_embeddings().weight  # read by rows; an output layer may share it
        for weight in (module.weight for module in prior.modules() if isinstance(module, nn.Linear)):
            if weight.dtype == torch.float32 and weight is not table:
                weights[id(weight)] = weight.detach().T.contiguous().T
    return copy.deepcopy(prior, {key: nn.Parameter(weight, requires_grad=False) for key, weight in weights.items()})
