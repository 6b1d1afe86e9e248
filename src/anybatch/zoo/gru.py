"""Classifier of ragged sequences, by the last state of a GRU.

h_t = GRU(E[x_t], h_(t-1)),    logits = W h_T + b,    T the sequence's own length
"""

import torch
from torch import Tensor, nn

from anybatch.batch import Padded

__all__ = ["gru_classifier"]


def gru_classifier(
    vocabulary: int = 256, width: int = 64, classes: int = 2, embedding: int = 32, depth: int = 1
) -> nn.Module:
    """Build a model from tokens [B, T], or `Padded` ones, to logits [B, classes].

    Example:
        >>> gru_classifier(classes=3)(torch.zeros(4, 5, dtype=torch.long)).shape
        torch.Size([4, 3])

    Args:
        vocabulary: number of token ids.
        width: of the state.
        classes: number of logits.
        embedding: width of the vector of a token.
        depth: layers of the GRU.

    Source: Cho et al. 2014, 1406.1078, with torch's reset gate, which acts after the product.
    """
    return _Classifier(vocabulary, width, classes, embedding, depth)


class _Classifier(nn.Module):
    def __init__(
        self, vocabulary: int, width: int, classes: int, embedding: int, depth: int
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, embedding)
        self.gru = nn.GRU(embedding, width, depth, batch_first=True)
        self.head = nn.Linear(width, classes)

    def forward(self, inputs: Tensor | Padded) -> Tensor:
        if isinstance(inputs, Padded):
            tokens, last = inputs.values, inputs.mask.sum(1) - 1
        else:
            tokens, last = inputs, torch.full((len(inputs),), -1, device=inputs.device)
        states = self.gru(self.embedding(tokens))[0]  # those after the padding are left out
        logits: Tensor = self.head(states[torch.arange(len(states), device=last.device), last])
        return logits
