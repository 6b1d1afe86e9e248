"""The noise scale along a training: in a short one of its own, or at a run's checkpoints.

At weights w, from batches b of B examples each, drawn as the recipe draws them:

    B_simple = sum_b tr(S)_b / sum_b |G|^2_b    (see `ledger.noise`)

Weights stay as they are while they are looked at.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import reduce
from operator import add
from pathlib import Path

from anybatch.data import OrderWithin
from anybatch.errors import CheckpointError, LedgerError, RecipeError, RunError
from anybatch.gradient import batch_gradient
from anybatch.gradient.buffers import Buffers
from anybatch.gradient.survey import survey_model
from anybatch.ledger import Observe
from anybatch.ledger.noise import NoiseEstimate
from anybatch.randomness import hash_integers
from anybatch.recipe.build import Built
from anybatch.recipe.orders import order_of
from anybatch.recipe.runs import carried, newest
from anybatch.recipe.schema import BatchSection, OrderSection
from anybatch.training import checkpoints
from anybatch.training.batches import Batch, batches
from anybatch.training.state import TrainingState
from anybatch.training.steps import steps

__all__ = ["Point", "along_training", "at_checkpoints", "check_noise", "drawn", "noise_at"]

POINTS = 5
_MOST_TOGETHER = 512  # examples of a batch that is looked at: what it is made of is kept


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """The noise scale at the weights after so many updates, in examples."""

    step: int
    noise: float  # the best guess: inf where |G|^2 does not stand out
    low: float  # 95 % interval
    high: float
    examples: int  # that it rests on

    @classmethod
    def of(cls, step: int, estimate: NoiseEstimate) -> "Point":
        """From what batches tell."""
        found, ratio = estimate.scale(), math.inf
        if estimate.gradient_square > 0:
            ratio = max(estimate.variance / estimate.gradient_square, 0.0)
        low, high = (0.0 if math.isnan(found.low) else found.low), found.high
        high = math.inf if math.isnan(high) else high
        return cls(
            step=step,
            noise=min(max(ratio, low), high),
            low=low,
            high=high,
            examples=found.examples,
        )


def check_noise(built: Built) -> None:
    """See that the noise scale is defined for a recipe, and that it has one batch size.

    Raises:
        RecipeError, LedgerError: it is not, and why.
    """
    recipe, reductions = built.recipe, list(built.objective.reductions.values())
    why = "The noise scale is that of a mean of independent gradients"
    for key in ("clip_norm", "clip_examples"):
        if getattr(recipe.optimizer, key) is not None:
            raise RecipeError(
                f"{why}: with optimizer.{key} = {getattr(recipe.optimizer, key):g} a batch's "
                f"gradient is none, and no batch size can be advised. To look at the recipe "
                f"unclipped, copy it without that key."
            )
    if len(reductions) != 1 or reductions[0].factor(1.0, 1) is None:
        raise RecipeError(
            f"{why}: expected objective.reduction = 'mean' or 'sum' of one term, got "
            f"{recipe.objective.reduction!r}, and no batch size can be advised."
        )
    built.model.train()
    layer = survey_model(built.model).layer
    if layer is not None and layer.endswith("couples examples"):
        raise LedgerError(
            f"{why}: {layer}, so that no gradient belongs to one example alone, and no batch "
            f"size can be advised. Look at the recipe with GroupNorm or LayerNorm in its place."
        )
    if recipe.order.name == "growing":
        raise RecipeError(
            "order.name = 'growing' has no one batch size to compare others with: look at the "
            "recipe with --set order.name=shuffled --set order.args={}."
        )


def along_training(built: Built, num_updates: int, num_examples: int) -> Iterator[Point]:
    """Train for so many updates, and look at a few equal distances.

    Args:
        num_examples: that each look rests on, as far as there are so many.
    """
    count = min(POINTS, num_updates)
    places = {round(num_updates * place / count) for place in range(1, count + 1)}
    built.model.train()
    training = steps(
        built.model,
        built.objective,
        built.optimizer,
        built.drawn.columns,
        order=built.order,
        epochs=built.recipe.run.epochs,
        layout=built.layout,
        observe=built.observe,
        collate=built.data.collate,
        schedule=built.schedule,
        precision=built.recipe.run.precision,
    )
    for step in training:
        built.note(step)
        if step.step + 1 in places:
            yield Point.of(step.step + 1, noise_at(built, num_examples, step.step + 1))
        if step.step + 1 == num_updates:
            return


def at_checkpoints(built: Built, folder: Path, num_examples: int) -> Iterator[Point]:
    """Look at the weights of each good checkpoint of a run, the newest last.

    Raises:
        RunError: there is none.
    """
    scan = newest(folder, built.recipe)
    if scan.found is None:
        raise RunError(scan.explain())
    built.model.train()
    state = TrainingState(built.model, built.optimizer, carried(built))
    for path in reversed(checkpoints.named(scan.found.path.parent)):
        try:
            found = checkpoints.verify(path)
        except CheckpointError:
            continue  # damaged: an older one, or `newest` would have named it
        state.restore(checkpoints.load(found))
        yield Point.of(found.step, noise_at(built, num_examples, found.step))


def noise_at(built: Built, num_examples: int, step: int) -> NoiseEstimate:
    """What so many examples tell of the noise at the weights as they are.

    Args:
        step: which examples are drawn depends on it.
    """
    num_train, asked = len(built.parts.train), built.recipe.batch
    together = asked.micro_batch if isinstance(asked.micro_batch, int) else asked.size
    size = min(max(together, 16), _MOST_TOGETHER, num_train)
    count = max(min(num_examples, num_train) // size, 1)
    with _untouched(built):
        found = [_noise_of(built, batch) for batch in drawn(built, size, count, step)]
    return reduce(add, found)


def drawn(built: Built, size: int, count: int | None, step: int) -> Iterator[Batch]:
    """Batches of some size, drawn as the recipe draws its own; without end where count is None."""
    recipe = built.recipe
    order: OrderWithin = order_of(
        recipe.model_copy(
            update={
                "order": recipe.order if recipe.order.name == "weighted" else OrderSection(),
                "batch": BatchSection(size=size, last="carry"),
                "run": recipe.run.model_copy(update={"seed": hash_integers(recipe.run.seed, step)}),
            }
        ),
        built.data,
        built.parts.train,
        allow_code=False,
    )
    return batches(built.drawn.columns, order, stop=count, collate=built.data.collate)


def _noise_of(built: Built, batch: Batch) -> NoiseEstimate:
    gradient = batch_gradient(
        built.model,
        built.objective,
        batch.examples,
        key=batch.key,
        layout=built.layout,
        ids=batch.ids,
        observe=Observe(norms=False, noise_scale=True),
        precision=built.recipe.run.precision,
    )
    assert gradient.ledger is not None
    assert gradient.ledger.noise is not None
    return gradient.ledger.noise


@contextmanager
def _untouched(built: Built) -> Iterator[None]:
    """Buffers are as before afterwards; `.grad` is replaced by the next update."""
    buffers = Buffers.of(built.model)
    try:
        yield
    finally:
        buffers.restore()
