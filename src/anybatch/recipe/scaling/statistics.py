"""What batch normalisation keeps beside a recipe, inside the model: running statistics.

    s <- (1 - m) s + m s_batch,    one update a batch;    m' = 1 - (1 - m)^k

The batch whose statistics an example is normalised by is the grain. Without one it is the whole
batch, which would be another function of the examples at another size: it becomes the old batch.
"""

from torch import nn

from anybatch._torch import BATCH_NORMS
from anybatch.recipe.scaling import rules
from anybatch.recipe.scaling.changes import Change

__all__ = ["carry_statistics", "norms_of"]


def norms_of(model: nn.Module) -> list[BATCH_NORMS]:
    """The layers of batch normalisation."""
    return [layer for layer in model.modules() if isinstance(layer, BATCH_NORMS)]


def carry_statistics(model: nn.Module, k: float) -> list[Change]:
    """Give running statistics the momentum that belongs to batches of k times the size.

    Layers without running statistics, or that average them over all batches (momentum None), stay.
    """
    changes: dict[float, Change] = {}
    for layer in norms_of(model):
        old = layer.momentum
        if old is not None and layer.running_mean is not None and k != 1:
            layer.momentum = rules.running_statistics(old, k)
            why = "1 - (1 - m)^k: running statistics keep as much over the same examples"
            key = "momentum of batch normalisation, in the model"
            changes[old] = Change(key, old, layer.momentum, "statistics", why)
    return list(changes.values())
