"""From a recipe to the objects of a run."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from torch import nn
from torch.optim import Optimizer

from anybatch import kernels
from anybatch.data import DataSet, OrderWithin, Splits
from anybatch.data.sets import beside, without_weights
from anybatch.distributed import ProcessGroup
from anybatch.errors import RecipeError
from anybatch.gradient import ClipExamples, ClipNorm
from anybatch.layout import Layout
from anybatch.ledger import Observe
from anybatch.limits import max_processes
from anybatch.objective import Objective
from anybatch.recipe.datasets import data_of, fingerprint_of
from anybatch.recipe.fit import CLASS_LOSSES, check_fit, warn_of_harm
from anybatch.recipe.models import model_of, start_from
from anybatch.recipe.objectives import objective_of
from anybatch.recipe.optimizers import optimizer_of
from anybatch.recipe.orders import order_of
from anybatch.recipe.scaling import Carried, at_its_size
from anybatch.recipe.schema import (
    USED_BY,
    BatchSection,
    ObserveSection,
    OptimizerSection,
    Recipe,
    ScheduleSection,
)
from anybatch.schedules import (
    Constant,
    Cosine,
    Exponential,
    Inverse,
    Schedule,
    StepDecay,
    WarmUp,
)
from anybatch.training.adascale import AdaScale
from anybatch.training.averages import Average
from anybatch.training.evaluation import Evaluation, evaluate
from anybatch.training.steps import Step

__all__ = ["CLASS_LOSSES", "Built", "Part", "build"]

Part = Literal["train", "validation", "held_out"]

SCHEDULES: dict[str, Callable[..., Schedule]] = {
    "constant": Constant,
    "step": StepDecay,
    "inverse": Inverse,
    "exponential": Exponential,
    "cosine": Cosine,
}


@dataclass(frozen=True, kw_only=True)
class Built:
    """All that training needs."""

    recipe: Recipe  # as stated
    carried: Carried | None  # to batch.size, where its numbers belong to batch.reference_size
    model: nn.Module
    weights_sha256: str | None  # of the file that the weights were read from
    data: DataSet
    parts: Splits
    objective: Objective
    optimizer: Optimizer
    order: OrderWithin  # of the part to train on
    schedule: Schedule
    clip: ClipNorm | ClipExamples | None
    observe: Observe | None
    layout: Layout
    adascale: AdaScale | None  # the schedule, where it measures the rate
    average: Average | None  # to be evaluated in the weights' stead

    def part(self, name: Part) -> DataSet:
        """The examples of one part of the data."""
        return self.data.of_ids(getattr(self.parts, name))

    @cached_property
    def data_fingerprint(self) -> dict[str, Any]:
        """See `anybatch.training.data_fingerprint`."""
        return fingerprint_of(self.recipe.data, self.data, self.parts)

    @property
    def drawn(self) -> DataSet:
        """The examples as training takes them: weights by which they are drawn count no more."""
        return without_weights(self.data) if self.recipe.order.name == "weighted" else self.data

    @property
    def watched(self) -> Part:
        """The part that is evaluated after each epoch, and that [stop] looks at."""
        return "validation" if len(self.parts.validation) else "held_out"

    def note(self, step: Step) -> None:
        """Take an update into the average and into the measured rate."""
        if self.adascale is not None:
            self.adascale.update(step.gradient)
        if self.average is not None and not step.is_skipped:
            self.average.update(self.model)

    def split_loss(self, parts: Mapping[str, float]) -> dict[str, float]:
        """Split a loss by its parts into the loss of the data and the penalty, if there is one."""
        data = self.objective.reductions
        found = {"loss": sum(value for name, value in parts.items() if name in data)}
        if self.objective.penalty is not None:
            found["penalty"] = sum(value for name, value in parts.items() if name not in data)
        return found

    def by_average(self) -> AbstractContextManager[object]:
        """The model has the average of its weights, if there is one."""
        return nullcontext() if self.average is None else self.average.swapped(self.model)

    def evaluated(
        self, name: Part, *, objective: Objective | None = None, group: ProcessGroup | None = None
    ) -> Evaluation:
        """Loss and metrics of the model, as it is, over a part of the data.

        Args:
            objective: None: the recipe's.
            group: ranks that share the work; see `evaluate`.
        """
        examples = self.part(name)
        return evaluate(
            self.model,
            objective or self.objective,
            examples.columns,
            collate=examples.collate,
            precision=self.recipe.run.precision,
            group=group,
        )


def build(recipe: Recipe, *, allow_code: bool, fresh: bool = True) -> Built:
    """Build what a recipe states, at its batch size; the weights are those of its seed, or of
    `model.weights`.

    Nothing is written. Two examples pass through the model, so that what does not fit together
    is found before a run is begun.

    Args:
        recipe: what to build.
        allow_code: whether names of the user's own code may be imported.
        fresh: False: the weights will be those of a checkpoint, and `model.weights` is not read.

    Raises:
        RecipeError, DataError, OrderError and others: what the recipe asks for in vain.
    """
    _check_processes(recipe)
    device = _device(recipe.run.device)
    if recipe.run.kernels == "fastest":  # else what the environment says
        kernels.use("fastest")
    if recipe.run.threads is not None:
        torch.set_num_threads(recipe.run.threads)
    dtype = getattr(torch, recipe.run.dtype)
    model = model_of(recipe.model, recipe.run.seed, allow_code=allow_code)
    weights = recipe.model.weights if fresh else None
    sha256 = None if weights is None else start_from(model, weights)
    model = model.to(device, dtype)
    stated, carried = recipe, at_its_size(recipe, model)
    recipe = recipe if carried is None else carried.recipe
    data, parts = data_of(recipe.data, dtype, allow_code=allow_code)
    if recipe.data.workers == 0:  # a worker process has no access to an accelerator
        data = beside(data, device, _free_bytes(device))
    objective = objective_of(recipe.objective, allow_code=allow_code)
    check_fit(recipe, model, objective, data, parts)
    warn_of_harm(recipe, data, parts, fresh=fresh)
    schedule = _schedule(recipe.schedule, recipe.optimizer.lr)
    adascale = _adascale(stated.batch, schedule)
    return Built(
        recipe=stated,
        carried=carried,
        model=model,
        weights_sha256=sha256,
        data=data,
        parts=parts,
        objective=objective,
        optimizer=optimizer_of(recipe.optimizer, model, allow_code=allow_code),
        order=order_of(recipe, data, parts.train, allow_code=allow_code),
        schedule=adascale or schedule,
        adascale=adascale,
        clip=_clip(recipe.optimizer),
        observe=_observe(recipe.observe, noise_scale=adascale is not None),
        layout=Layout(micro_batch=recipe.batch.micro_batch),
        average=_average(recipe, model),
    )


def _check_processes(recipe: Recipe) -> None:
    """See that the machine can have as many threads and processes: torch would crash or hang."""
    for key, number in (("run.threads", recipe.run.threads), ("data.workers", recipe.data.workers)):
        if number is not None and number > max_processes():
            raise RecipeError(
                f"{key} = {number}. Expected at most {max_processes()} on this machine. "
                f"Set it to about the number of cores."
            )


def _device(name: str) -> torch.device:
    try:
        torch.empty(0, device=name).cpu()
    except Exception as error:  # each kind of device raises its own
        raise RecipeError(
            f"run.device {name!r} is not to be had here: {str(error).partition(chr(10))[0]} "
            f"Expected 'cpu', or an accelerator that this torch was built for."
        ) from error
    return torch.device(name)


def _free_bytes(device: torch.device) -> int:
    """Of the device's memory; 0 where it does not tell."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0


def _schedule(section: ScheduleSection, lr: float) -> Schedule:
    stated = {key: getattr(section, key) for key in USED_BY[section.name]}
    if section.name == "step":
        stated["at"] = tuple(section.at or ())
    schedule = SCHEDULES[section.name](lr, **stated)
    if section.warm_up:
        schedule = WarmUp(schedule, section.warm_up, section.warm_up_start)
    return schedule


def _clip(section: OptimizerSection) -> ClipNorm | ClipExamples | None:
    if section.clip_norm is not None:
        return ClipNorm(section.clip_norm)
    return None if section.clip_examples is None else ClipExamples(section.clip_examples)


def _adascale(section: BatchSection, schedule: Schedule) -> AdaScale | None:
    reference = section.reference_size
    if section.scaling != "adascale" or reference is None:
        return None
    return AdaScale(schedule, reference_size=reference, batch_size=section.size)


def _observe(section: ObserveSection, *, noise_scale: bool) -> Observe | None:
    asked = section.model_dump() | {"noise_scale": noise_scale}
    return Observe(**asked) if any(asked.values()) else None


def _average(recipe: Recipe, model: nn.Module) -> Average | None:
    decay = recipe.average.decay
    return None if decay is None else Average(model, decay, warm_up=recipe.average.warm_up)
