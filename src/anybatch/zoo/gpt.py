"""Small decoder like GPT-2, which predicts each next token from the tokens before it.

    h_0 = E[x] + P,    a = h + Attention(LN(h)),    h <- a + MLP(LN(a)),    logits = W LN(h_D)

E embeds V tokens, P the T positions, D blocks follow; W is E if tied. Each position attends to
itself and to those before it. So none sees the padding, which follows them.
"""

import math

import torch.nn.functional as F
from torch import Tensor, nn

from anybatch.batch import Padded
from anybatch.errors import ModelError

__all__ = ["gpt"]


def gpt(
    vocabulary: int = 256,
    width: int = 64,
    depth: int = 2,
    heads: int = 4,
    length: int = 64,
    dropout: float = 0.0,
    tied: bool = True,
) -> nn.Module:
    """Build a model from tokens [B, T], or `Padded` ones, to logits [B, T, V] of the next token.

    Example:
        >>> import torch
        >>> gpt(vocabulary=10, width=8, heads=2)(torch.zeros(3, 5, dtype=torch.long)).shape
        torch.Size([3, 5, 10])

    Args:
        vocabulary: V, number of token ids.
        width: of the vectors between the blocks.
        depth: number of blocks.
        heads: of the attention of each block. They must divide the width.
        length: the largest T.
        dropout: of embeddings, attention and the output of each block. Above 0 the model draws
            random numbers, and runs one grain at a time.
        tied: whether the logits are products with the embeddings of the tokens.

    Raises:
        ModelError: the heads do not divide the width; in a call, there are more tokens than
            positions.

    Source: Radford et al. 2019, Language Models are Unsupervised Multitask Learners (GPT-2);
        initial weights as there: normal with standard deviation 0.02, and 0.02 / sqrt(2 D) in the
        last layer of each block's parts.
    """
    if width % heads:
        raise ModelError(f"gpt got {heads} heads. They must divide the width {width}.")
    return _GPT(vocabulary, width, depth, heads, length, dropout, tied)


class _GPT(nn.Module):
    def __init__(
        self,
        vocabulary: int,
        width: int,
        depth: int,
        heads: int,
        length: int,
        dropout: float,
        tied: bool,
    ) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(length, width)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(_Block(width, heads, dropout) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = None if tied else nn.Linear(width, vocabulary, bias=False)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                added = name.endswith(("attention.out.weight", "mlp.2.weight"))
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * depth) if added else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, inputs: Tensor | Padded) -> Tensor:
        tokens = inputs.values if isinstance(inputs, Padded) else inputs
        num_tokens, length = tokens.shape[1], self.positions.num_embeddings
        if num_tokens > length:
            raise ModelError(
                f"the model has {length} positions, but the sequences have {num_tokens} tokens. "
                f"Cut them (data.args.length), or give the model more (model.args.length)."
            )
        h = self.dropout(self.tokens(tokens) + self.positions.weight[:num_tokens])
        for block in self.blocks:
            h = block(h)
        h = self.norm(h)
        return F.linear(h, self.tokens.weight if self.head is None else self.head.weight)


class _Block(nn.Module):
    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = _Attention(width, heads, dropout)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU("tanh"), nn.Linear(4 * width, width)
        )
        self.dropout = nn.Dropout(dropout)

    def forward(self, h: Tensor) -> Tensor:
        h = h + self.dropout(self.attention(self.norm1(h)))
        added: Tensor = self.dropout(self.mlp(self.norm2(h)))
        return h + added


class _Attention(nn.Module):
    """Causal attention: softmax(Q K^T / sqrt(d)) V with d = width / heads."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.heads, self.dropout = heads, dropout

    def forward(self, h: Tensor) -> Tensor:
        q, k, v = self.qkv(h).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        dropout = self.dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
        out: Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return out
