"""SimVQ ("simvq"): vector quantization with a frozen random codebook behind a learned linear layer."""

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from .quantizer_base import unit_length
from .quantizer_vq import NearestEntryOptions, NearestEntryQuantizer


class RandomCodebook(nn.Embedding):
    """Random rows `(K, D)` with a mean squared length of 1."""

    def reset_parameters(self) -> None:
        init.normal_(self.weight, std=self.embedding_dim**-0.5)


class SimVQuantizer(NearestEntryQuantizer):
    """The nearest entry, where the entries are a linear function of frozen random rows.

    A gradient to one entry moves the linear layer, and with it all entries. So no entry is left behind, and neither
    k-means nor restarts are needed.

    Source: Zhu et al. 2024, "Addressing representation collapse in vector quantized models with one linear layer",
    section 4; the layer has a bias, as in their code.
    """

    Options = NearestEntryOptions

    def __init__(self, num_embeddings: int, embed_dim: int, options: NearestEntryOptions):
        super().__init__(num_embeddings, embed_dim, options)
        self.embedding = RandomCodebook(num_embeddings, embed_dim)
        self.embedding_proj = nn.Linear(embed_dim, embed_dim)
        self.freeze()

    def freeze(self) -> None:
        self.embedding.requires_grad_(False)

    @property
    def codebook(self) -> Tensor:
        weight, bias = self.embedding_proj.weight.float(), self.embedding_proj.bias.float()
        # a copy: loaded weights lie elsewhere in memory, and the rounding of a product depends on their alignment
        rows = self.embedding.weight.float().clone()
        entries = F.linear(rows, weight, bias)
        return unit_length(entries) if self.l2_normalize else entries

    def entries(self, codes: Tensor) -> Tensor:
        return F.embedding(codes, self.codebook)
