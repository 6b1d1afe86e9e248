"""Training examples whose gradients align with that of a held-out one, at a run's last checkpoint.

    cos(S g_i, S g),    g the gradient of the held-out example's own loss, S a random projection

All gradients are computed anew, at the same weights and in evaluation mode. An update on an
example with a positive cosine lowers the loss of the held-out one; with a negative, it raises it.

Source: TracIn at one checkpoint, Pruthi et al. 2020, 2002.08484.
"""

from typing import Any

import torch
from torch import Tensor

from anybatch.errors import RunError
from anybatch.ledger import Observe
from anybatch.randomness import Key
from anybatch.recipe.build import Setup, Split
from anybatch.recipe.results import predict_examples
from anybatch.runs.ledger_files import PROJECTION, make_columns
from anybatch.runs.similar import compute_cosines, select_ends
from anybatch.training.evaluation import map_micro_batches

__all__ = ["rank_for_held_out"]

_SIZE = 4096  # numbers of a projection; nothing of it is stored


def rank_for_held_out(setup: Setup, example: int, top: int) -> dict[str, Any]:
    """Rank the training examples by the cosine of their gradients with a held-out one's.

    Returns:
        The prediction of the held-out example, and "aligned" and "opposed": at most `top` training
        examples each, with cosine, loss, norm and target.

    Raises:
        RunError: the example is not held out.
    """
    splits: tuple[Split, ...] = ("held_out", "validation")
    split = next((s for s in splits if example in getattr(setup.splits, s)), None)
    if split is None:
        ids = ", ".join(map(str, setup.splits.held_out[:5].tolist())) or "none"
        raise RunError(
            f"Example {example} is not held out. Expected the id of a held-out or validation "
            f"example, as 'anybatch predict' lists them: {ids}, ... For an example that was "
            f"trained on, use --similar {example}."
        )
    predicted = next(row for row in predict_examples(setup, split) if row["example"] == example)
    one = _project(setup, torch.tensor([example]))
    columns = _project(setup, setup.splits.train)
    cosines = compute_cosines(columns.pop(PROJECTION), one[PROJECTION][0])
    ends = select_ends({"example": columns.pop("example"), "cosine": cosines, **columns}, top)
    return {name: value for name, value in predicted.items() if name != "outputs"} | ends


def _project(setup: Setup, ids: Tensor) -> dict[str, Any]:
    """Compute id, loss, norm, projection and target of examples, in evaluation mode."""

    @torch.enable_grad()
    def compute(batch: Any, size: int) -> dict[str, Tensor]:
        observe = Observe(projections=_SIZE)
        how: dict[str, Any] = {"layout": setup.layout, "observe": observe, "self_check": False}
        return make_columns(0, 0, setup.compute_gradient(batch, key=Key(seed=0, step=0), **how))

    examples = setup.data.select(ids)
    size = setup.recipe.batch.size
    how: dict[str, Any] = {"micro_batch": size, "collate": examples.collate}
    pieces = map_micro_batches(setup.model, compute, examples.columns, **how)
    names = [name for name in ("loss", "norm", PROJECTION) if name in pieces[0]]
    columns = {name: torch.cat([piece[name] for piece in pieces]).numpy() for name in names}
    targets = examples.targets
    if targets is not None and targets.ndim == 1:
        columns["target"] = targets.cpu().numpy()
    return {"example": ids.numpy(), **columns}
