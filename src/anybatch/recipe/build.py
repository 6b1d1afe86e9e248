"""Build the objects that training needs from a recipe."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from torch import nn
from torch.optim import Optimizer

from anybatch import kernels
from anybatch.data import DataSet, OrderWithin, Splits
from anybatch.data.data_set import drop_weights, move_to_device
from anybatch.distributed import ProcessGroup
from anybatch.errors import RecipeError
from anybatch.gradient import ClipExamples, ClipNorm, Gradient, batch_gradient
from anybatch.layout import Layout
from anybatch.ledger import Observe
from anybatch.limits import max_processes
from anybatch.objective import Objective
from anybatch.optim.adascale import AdaScale
from anybatch.optim.averages import Average
from anybatch.recipe.datasets import fingerprint_data, load_data
from anybatch.recipe.fit import CLASS_LOSSES, check_fit, warn_of_harm
from anybatch.recipe.models import build_model, load_weights
from anybatch.recipe.objectives import build_objective
from anybatch.recipe.optimizers import build_optimizer
from anybatch.recipe.orders import build_order
from anybatch.recipe.scaling import ScaledRecipe, rescale_to_batch_size
from anybatch.recipe.schema import (
    SCHEDULE_KEYS,
    BatchSection,
    ObserveSection,
    OptimizerSection,
    Recipe,
    ScheduleSection,
)
from anybatch.reductions import Sum
from anybatch.schedules import Constant, Cosine, Exponential, Inverse, Schedule, StepDecay, WarmUp
from anybatch.training.evaluation import Evaluation, evaluate
from anybatch.training.loop import Step, steps
from anybatch.training.spikes import SpikeWatch

__all__ = ["CLASS_LOSSES", "Setup", "Split", "build"]

Split = Literal["train", "validation", "held_out"]

SCHEDULES: dict[str, Callable[..., Schedule]] = {
    "constant": Constant,
    "step": StepDecay,
    "inverse": Inverse,
    "exponential": Exponential,
    "cosine": Cosine,
}


@dataclass(frozen=True, kw_only=True)
class Setup:
    """Objects that training needs, built from a recipe."""

    recipe: Recipe  # as written
    scaled_recipe: ScaledRecipe | None  # at batch.size, if batch.reference_size is set
    model: nn.Module
    weights_sha256: str | None  # of the file that the weights were read from
    data: DataSet
    splits: Splits
    objective: Objective
    optimizer: Optimizer
    order: OrderWithin  # of the train split
    schedule: Schedule
    clip: ClipNorm | ClipExamples | None
    observe: Observe | None
    layout: Layout
    adascale: AdaScale | None  # the schedule, if AdaScale measures the rate
    average: Average | None  # of the weights, for evaluation

    def select_split(self, split: Split) -> DataSet:
        """Select the examples of a split."""
        return self.data.select(getattr(self.splits, split))

    @cached_property
    def data_fingerprint(self) -> dict[str, Any]:
        """Fingerprint of data and splits: see `anybatch.runs.data_fingerprint`."""
        return fingerprint_data(self.recipe.data, self.data, self.splits)

    @property
    def training_data(self) -> DataSet:
        """Data as training reads them.

        If the order draws examples by their weights, the weights do not count a second time.
        """
        return drop_weights(self.data) if self.recipe.order.name == "weighted" else self.data

    @property
    def monitor_split(self) -> Split:
        """Split that is evaluated after each epoch, and that [stop] looks at."""
        return "validation" if len(self.splits.validation) else "held_out"

    def make_steps(self, **arguments: Any) -> Iterator[Step]:
        """Return the loop over updates, `steps`, with the arguments that the recipe states.

        Args:
            arguments: further arguments of `steps`, such as `run`, or `steps` in place of the
                recipe's epochs.
        """
        if "steps" not in arguments:
            arguments["epochs"] = self.recipe.run.epochs
        spikes = self.recipe.spikes
        watch = None if spikes.window is None else SpikeWatch(spikes.window, spikes.factor)
        return steps(
            self.model,
            self.objective,
            self.optimizer,
            self.training_data.columns,
            order=self.order,
            layout=self.layout,
            observe=self.observe,
            spikes=watch,
            collate=self.data.collate,
            schedule=self.schedule,
            precision=self.recipe.run.precision,
            **arguments,
        )

    def compute_gradient(self, examples: Any, **arguments: Any) -> Gradient:
        """Compute the gradient of a batch, in the precision that the recipe states.

        Args:
            arguments: further arguments of `batch_gradient`.
        """
        arguments["precision"] = self.recipe.run.precision
        return batch_gradient(self.model, self.objective, examples, **arguments)

    def update_averages(self, step: Step) -> None:
        """Update the average of the weights and the measured rate after a step."""
        if self.adascale is not None:
            self.adascale.update(step.gradient)
        if self.average is not None and not step.is_skipped:
            self.average.update(self.model)

    def split_loss(self, parts: Mapping[str, float], num_examples: int) -> dict[str, float]:
        """Split the parts of a loss into the loss of the data and the penalty, if there is one.

        Under Sum the loss grows with the number of examples. So the loss per example is added,
        which can be compared between a batch and the held-out data.
        """
        terms = self.objective.reductions
        losses = {"loss": sum(value for name, value in parts.items() if name in terms)}
        if all(isinstance(reduction, Sum) for reduction in terms.values()):
            losses["loss_per_example"] = losses["loss"] / num_examples
        if self.objective.penalty is not None:
            losses["penalty"] = sum(value for name, value in parts.items() if name not in terms)
        return losses

    def list_figures(self, evaluation: Evaluation) -> dict[str, float]:
        """List the data loss and the metrics of an evaluation, without the penalty."""
        loss = self.split_loss(evaluation.parts, evaluation.num_examples)
        loss.pop("penalty", None)
        return loss | dict(evaluation.metrics) | loss  # first, and no metric of that name hides it

    def use_average(self) -> AbstractContextManager[object]:
        """Give the model the average of its weights, if there is one, within a `with` block."""
        return nullcontext() if self.average is None else self.average.swapped(self.model)

    def evaluate(
        self, split: Split, *, objective: Objective | None = None, group: ProcessGroup | None = None
    ) -> Evaluation:
        """Evaluate loss and metrics of the model on a split.

        Args:
            split: name of the split.
            objective: None: that of the recipe.
            group: ranks that share the work; see `anybatch.training.evaluation.evaluate`.
        """
        examples = self.select_split(split)
        return evaluate(
            self.model,
            objective or self.objective,
            examples.columns,
            collate=examples.collate,
            precision=self.recipe.run.precision,
            group=group,
        )


def build(recipe: Recipe, *, allow_code: bool, fresh: bool = True) -> Setup:
    """Build what a recipe states, at its batch size.

    Nothing is written. Two examples pass through the model, so that mistakes are found before
    a run is made.

    Example:
        >>> from anybatch.recipe import build, find_recipe, read_recipe
        >>> setup = build(read_recipe(find_recipe("lenet-digits")), allow_code=False)
        >>> len(setup.splits.train), setup.order.num_steps(epochs=1)
        (1438, 23)

    Args:
        allow_code: whether names of the user's own code may be imported.
        fresh: whether to read `model.weights`. False if a checkpoint will be loaded.

    Raises:
        RecipeError, DataError, OrderError and others: a key that cannot be built.
    """
    _check_processes(recipe)
    device = _check_device(recipe.run.device)
    if recipe.run.kernels == "fastest":  # otherwise the environment decides
        kernels.use("fastest")
    if recipe.run.threads is not None:
        torch.set_num_threads(recipe.run.threads)
    dtype = getattr(torch, recipe.run.dtype)
    model = build_model(recipe.model, recipe.run.seed, allow_code=allow_code)
    weights = recipe.model.weights if fresh else None
    sha256 = None if weights is None else load_weights(model, weights)
    model = model.to(device, dtype)
    original, scaled_recipe = recipe, rescale_to_batch_size(recipe, model)
    recipe = recipe if scaled_recipe is None else scaled_recipe.recipe
    data, splits = load_data(recipe.data, dtype, allow_code=allow_code)
    if recipe.data.workers == 0:  # a worker process has no access to an accelerator
        data = move_to_device(data, device, _get_free_bytes(device))
    objective = build_objective(recipe.objective, allow_code=allow_code)
    check_fit(recipe, model, objective, data, splits)
    warn_of_harm(recipe, data, splits, fresh=fresh)
    schedule = _build_schedule(recipe.schedule, recipe.optimizer.lr)
    adascale = _build_adascale(original.batch, schedule)
    decay = recipe.average.decay
    return Setup(
        recipe=original,
        scaled_recipe=scaled_recipe,
        model=model,
        weights_sha256=sha256,
        data=data,
        splits=splits,
        objective=objective,
        optimizer=_build_optimizer(recipe, model, allow_code=allow_code),
        order=build_order(recipe, data, splits.train, allow_code=allow_code),
        schedule=adascale or schedule,
        adascale=adascale,
        clip=_build_clip(recipe.optimizer),
        observe=_build_observe(recipe.observe, noise_scale=adascale is not None),
        layout=Layout(micro_batch=recipe.batch.micro_batch),
        average=None if decay is None else Average(model, decay, warm_up=recipe.average.warm_up),
    )


def _build_optimizer(recipe: Recipe, model: nn.Module, *, allow_code: bool) -> Optimizer:
    """Build the optimiser, fused unless the run is bitwise, compiled or in shards."""
    run = recipe.run
    fused = not (run.bitwise or run.shard or run.compile)
    return build_optimizer(recipe.optimizer, model, allow_code=allow_code, fused=fused)


def _check_processes(recipe: Recipe) -> None:
    """Refuse more threads or processes than the machine allows: torch would crash or hang."""
    for key, number in (("run.threads", recipe.run.threads), ("data.workers", recipe.data.workers)):
        if number is not None and number > max_processes():
            raise RecipeError(
                f"{key} = {number}. Expected at most {max_processes()} on this machine. "
                f"Set it to about the number of cores."
            )


def _check_device(name: str) -> torch.device:
    """Check that a device can be used."""
    try:
        torch.empty(0, device=name).cpu()
    except Exception as error:  # each kind of device raises its own
        raise RecipeError(
            f"run.device {name!r} cannot be used here: {str(error).partition(chr(10))[0]} "
            f"Expected 'cpu', or an accelerator that this torch was built for."
        ) from error
    return torch.device(name)


def _get_free_bytes(device: torch.device) -> int:
    """Return the free bytes of an accelerator; 0 if it does not tell."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0


def _build_schedule(section: ScheduleSection, lr: float) -> Schedule:
    arguments = {key: getattr(section, key) for key in SCHEDULE_KEYS[section.name]}
    if section.name == "step":
        arguments["at"] = tuple(section.at or ())
    schedule = SCHEDULES[section.name](lr, **arguments)
    if section.warm_up:
        schedule = WarmUp(schedule, section.warm_up, section.warm_up_start)
    return schedule


def _build_clip(section: OptimizerSection) -> ClipNorm | ClipExamples | None:
    if section.clip_norm is not None:
        return ClipNorm(section.clip_norm)
    return None if section.clip_examples is None else ClipExamples(section.clip_examples)


def _build_adascale(section: BatchSection, schedule: Schedule) -> AdaScale | None:
    reference = section.reference_size
    if section.scaling != "adascale" or reference is None:
        return None
    return AdaScale(schedule, reference_size=reference, batch_size=section.size)


def _build_observe(section: ObserveSection, *, noise_scale: bool) -> Observe | None:
    quantities = section.model_dump() | {"noise_scale": noise_scale}
    quantities["norms"] |= section.projections > 0  # which has computed them already
    return Observe(**quantities) if any(quantities.values()) else None
