"""Measure the noise scale during a short training, or at the checkpoints of a run.

At weights w, from batches b of B examples each, drawn as the recipe draws them:

    B_simple = sum_b tr(S)_b / sum_b |G|^2_b    (see `ledger.noise`)

The measurement does not change the weights.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import reduce
from operator import add
from pathlib import Path
from typing import Any

from anybatch.errors import CheckpointError, LedgerError, RecipeError, RunError
from anybatch.gradient.survey import survey_model
from anybatch.ledger import Observe
from anybatch.ledger.noise import NoiseEstimate
from anybatch.randomness import hash_integers
from anybatch.recipe.build import Setup
from anybatch.recipe.orders import build_order
from anybatch.recipe.runs import find_newest
from anybatch.recipe.schema import BatchSection, OrderSection
from anybatch.recipe.train import collect_state
from anybatch.runs import checkpoints
from anybatch.runs.state import TrainingState
from anybatch.training.batches import Batch, batches
from anybatch.training.evaluation import preserve_buffers

__all__ = [
    "Point",
    "check_noise",
    "draw_batches",
    "estimate_noise",
    "measure_checkpoints",
    "measure_training",
]

POINTS = 5  # measurements of a training
_MIN_BATCH, _MAX_BATCH = 16, 512  # examples of a batch for one measurement, which is held in memory


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """Noise scale at the weights after some updates, in examples."""

    step: int  # number of updates
    noise: float  # inf if |G|^2 is not resolved
    low: float  # 95 % interval
    high: float
    examples: int  # number that it rests on

    @classmethod
    def of(cls, step: int, estimate: NoiseEstimate) -> "Point":
        """Make a point of an estimate."""
        scale, ratio = estimate.scale(), math.inf
        if estimate.gradient_square > 0:
            ratio = max(estimate.variance / estimate.gradient_square, 0.0)
        low = 0.0 if math.isnan(scale.low) else scale.low
        high = math.inf if math.isnan(scale.high) else scale.high
        noise = min(max(ratio, low), high)
        return cls(step=step, noise=noise, low=low, high=high, examples=scale.examples)


def check_noise(setup: Setup) -> None:
    """Check that the noise scale is defined for a recipe, and that it has one batch size."""
    recipe, reductions = setup.recipe, list(setup.objective.reductions.values())
    why = "The noise scale is that of a mean of independent gradients"
    for key in ("clip_norm", "clip_examples"):
        value = getattr(recipe.optimizer, key)
        if value is not None:
            raise RecipeError(
                f"{why}. With optimizer.{key} = {value:g} a batch's gradient is none, and no batch "
                f"size can be advised. To measure the recipe unclipped, copy it without that key."
            )
    if len(reductions) != 1 or reductions[0].factor(1.0, 1) is None:
        raise RecipeError(
            f"{why}. With objective.reduction = {recipe.objective.reduction!r} no batch size can "
            f"be advised. Expected 'mean' or 'sum' of one term."
        )
    setup.model.train()
    layer = survey_model(setup.model).layer
    if layer is not None and layer.endswith("couples examples"):
        raise LedgerError(
            f"{why}. Here {layer}, so no gradient belongs to one example alone, and no batch size "
            f"can be advised. Measure the recipe with GroupNorm or LayerNorm instead."
        )
    if recipe.order.name == "growing":
        raise RecipeError(
            "order.name = 'growing' has no one batch size to compare others with. Measure the "
            "recipe with --set order.name=shuffled --set order.args={}."
        )


def measure_training(setup: Setup, num_updates: int, num_examples: int) -> Iterator[Point]:
    """Train for some updates, and measure the noise at equal distances.

    Args:
        num_updates: length of the training.
        num_examples: examples of each measurement, if the data have so many.
    """
    count = min(POINTS, num_updates)
    stops = {round(num_updates * number / count) for number in range(1, count + 1)}
    setup.model.train()
    for step in setup.make_steps():
        setup.update_averages(step)
        if step.step + 1 in stops:
            yield Point.of(step.step + 1, estimate_noise(setup, num_examples, step.step + 1))
        if step.step + 1 == num_updates:
            return


def measure_checkpoints(setup: Setup, folder: Path, num_examples: int) -> Iterator[Point]:
    """Measure the noise at each good checkpoint of a run, the newest last."""
    scan = find_newest(folder, setup.recipe)
    if scan.checkpoint is None:
        raise RunError(scan.explain())
    setup.model.train()
    state = TrainingState(setup.model, setup.optimizer, collect_state(setup))
    for path in reversed(checkpoints.list_paths(scan.checkpoint.path.parent)):
        try:
            checkpoint = checkpoints.verify(path)
        except CheckpointError:
            continue  # damaged, and older than the newest good one
        state.restore(checkpoints.load(checkpoint))
        yield Point.of(checkpoint.step, estimate_noise(setup, num_examples, checkpoint.step))


def estimate_noise(setup: Setup, num_examples: int, step: int) -> NoiseEstimate:
    """Estimate the noise at the weights as they are.

    Args:
        num_examples: examples to use, if the data have so many.
        step: which examples are drawn depends on it.
    """
    num_train, section = len(setup.splits.train), setup.recipe.batch
    size = section.micro_batch if isinstance(section.micro_batch, int) else section.size
    size = min(max(size, _MIN_BATCH), _MAX_BATCH, num_train)
    count = max(min(num_examples, num_train) // size, 1)
    with preserve_buffers(setup.model):  # the next update replaces `.grad`
        sample = draw_batches(setup, size, count, step)
        return reduce(add, [_estimate_batch_noise(setup, batch) for batch in sample])


def draw_batches(setup: Setup, size: int, count: int | None, step: int) -> Iterator[Batch]:
    """Draw batches of some size, as the recipe draws its own; without end if count is None."""
    recipe = setup.recipe
    order = build_order(
        recipe.model_copy(
            update={
                "order": recipe.order if recipe.order.name == "weighted" else OrderSection(),
                "batch": BatchSection(size=size, last="carry"),
                "run": recipe.run.model_copy(update={"seed": hash_integers(recipe.run.seed, step)}),
            }
        ),
        setup.data,
        setup.splits.train,
        allow_code=False,
    )
    return batches(setup.training_data.columns, order, stop=count, collate=setup.data.collate)


def _estimate_batch_noise(setup: Setup, batch: Batch) -> NoiseEstimate:
    observe = Observe(norms=False, noise_scale=True)
    how: dict[str, Any] = {"key": batch.key, "ids": batch.ids, "observe": observe}
    gradient = setup.compute_gradient(batch.examples, layout=setup.layout, **how)
    assert gradient.ledger is not None
    assert gradient.ledger.noise is not None
    return gradient.ledger.noise
