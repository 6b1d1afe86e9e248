"""From a recipe to the objects of a run."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from anybatch import reductions, zoo
from anybatch.data import Examples, sources, split
from anybatch.data.arrays import check_classes
from anybatch.errors import DataError, RecipeError
from anybatch.gradient import ClipNorm
from anybatch.layout import Layout
from anybatch.objective import Objective
from anybatch.order import Order
from anybatch.penalties import L1, L2, Penalties
from anybatch.randomness import fold, generators_restored, seed_generators
from anybatch.recipe.names import called, looked_up
from anybatch.recipe.schema import ObjectiveSection, Recipe, ScheduleSection
from anybatch.schedules import Constant, Schedule, StepDecay, WarmUp

__all__ = ["Built", "Parts", "build"]

OPTIMIZERS = {
    "sgd": torch.optim.SGD,
    "adagrad": torch.optim.Adagrad,
    "rmsprop": torch.optim.RMSprop,
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
}
REDUCTIONS: dict[str, Callable[..., reductions.Reduction]] = {
    "mean": reductions.Mean,
    "sum": reductions.Sum,
    "max": reductions.Max,
    "top_fraction": reductions.TopFraction,
    "tilted": reductions.Tilted,
    "group_dro": reductions.GroupDRO,
}


class Parts(NamedTuple):
    """The data, parted."""

    train: Any
    held_out: Any


@dataclass(frozen=True, kw_only=True)
class Built:
    """All that training needs."""

    recipe: Recipe
    model: nn.Module
    data: Parts
    objective: Objective
    optimizer: Optimizer
    order: Order
    schedule: Schedule
    clip: ClipNorm | None
    layout: Layout


def build(recipe: Recipe, *, allow_code: bool) -> Built:
    """Build what a recipe states; the weights are those of its seed.

    Args:
        allow_code: whether names of the user's own code may be imported.

    Raises:
        RecipeError, DataError, OrderError and others: what the recipe asks for in vain.
    """
    device = _device(recipe.run.device)
    if recipe.run.threads is not None:
        torch.set_num_threads(recipe.run.threads)
    dtype = getattr(torch, recipe.run.dtype)
    model = _model(recipe, allow_code).to(device, dtype)
    data = _data(recipe, model, dtype, allow_code)
    optimizer = called(
        partial(OPTIMIZERS[recipe.optimizer.name], model.parameters(), lr=recipe.optimizer.lr),
        recipe.optimizer.args,
        "optimizer.args",
    )
    return Built(
        recipe=recipe,
        model=model,
        data=data,
        objective=_objective(recipe.objective, allow_code),
        optimizer=optimizer,
        order=Order(
            len(data.train.targets),
            batch_size=recipe.batch.size,
            seed=recipe.run.seed,
            last=recipe.batch.last,
        ),
        schedule=_schedule(recipe.schedule, recipe.optimizer.lr),
        clip=None if recipe.optimizer.clip_norm is None else ClipNorm(recipe.optimizer.clip_norm),
        layout=Layout(micro_batch=recipe.batch.micro_batch),
    )


def _device(name: str) -> torch.device:
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise RecipeError(
            f"run.device {name!r} is not to be had here: {str(error).splitlines()[0]} "
            f"Expected 'cpu', or an accelerator that this torch was built for."
        ) from error
    return torch.device(name)


def _model(recipe: Recipe, allow_code: bool) -> nn.Module:
    make = looked_up(recipe.model.name, zoo.models, "model", allow_code=allow_code)
    with generators_restored(torch.device("cpu")):
        seed_generators(fold(recipe.run.seed, 0))
        model = called(make, recipe.model.args, "model.args")
    if not isinstance(model, nn.Module):
        raise RecipeError(
            f"model {recipe.model.name!r} made a {type(model).__name__}, "
            f"expected a torch.nn.Module."
        )
    return model


def _data(recipe: Recipe, model: nn.Module, dtype: torch.dtype, allow_code: bool) -> Parts:
    load = looked_up(recipe.data.name, sources, "data set", allow_code=allow_code)
    loaded = called(load, recipe.data.args, "data.args")
    try:
        examples = Examples.of(*loaded)
    except TypeError as error:
        raise DataError(
            f"data {recipe.data.name!r} gave a {type(loaded).__name__}, "
            f"expected (inputs, targets) with the examples first."
        ) from error
    inputs, targets = examples.inputs.to(dtype), examples.targets
    if recipe.objective.loss == "cross_entropy":
        targets = check_classes(targets, _num_outputs(model, inputs))
    elif targets.is_floating_point():
        targets = targets.to(dtype)
    chosen = split(
        targets,
        recipe.data.held_out,
        seed=recipe.data.split,
        stratify=recipe.data.stratify and targets.ndim == 1 and not targets.is_floating_point(),
    )
    return Parts(*(Examples(inputs[ids], targets[ids]) for ids in chosen))


def _num_outputs(model: nn.Module, inputs: Tensor) -> int:
    """Width of the model's output, by trying it on one example."""
    device = next(model.parameters()).device
    training = model.training
    try:
        with torch.no_grad():
            return int(model.eval()(inputs[:1].to(device)).shape[-1])
    except (RuntimeError, TypeError, ValueError, AttributeError) as error:
        raise RecipeError(
            f"the model does not take an input of shape {tuple(inputs.shape[1:])}: "
            f"{str(error).splitlines()[0]}. Do model.args fit the data?"
        ) from error
    finally:
        model.train(training)


def _objective(section: ObjectiveSection, allow_code: bool) -> Objective:
    kinds = {"L1": L1, "L2": L2}
    terms = tuple(kinds[p.kind](p.strength, p.on, p.name) for p in section.penalty)
    return Objective(
        looked_up(section.loss, zoo.losses, "loss", allow_code=allow_code),
        reduction=_reductions(section.reduction, allow_code),
        penalty=Penalties(terms) if terms else None,
        grain=section.grain,
    )


def _reductions(given: str | Mapping[str, Any], allow_code: bool) -> Any:
    if isinstance(given, str) or "name" in given:
        return _reduction(given, allow_code)
    return {term: _reduction(one, allow_code) for term, one in given.items()}


def _reduction(given: str | Mapping[str, Any], allow_code: bool) -> Any:
    args = {"name": given} if isinstance(given, str) else dict(given)
    name, scale = args.pop("name"), args.pop("scale", 1.0)
    found = looked_up(name, REDUCTIONS, "reduction", allow_code=allow_code)
    if name not in REDUCTIONS:
        return reductions.as_reduction(found)
    reduction = called(found, args, "objective.reduction")
    return reduction if scale == 1.0 else scale * reduction


def _schedule(section: ScheduleSection, lr: float) -> Schedule:
    schedule: Schedule = Constant(lr)
    if section.name == "step":
        schedule = StepDecay(lr, section.factor, section.every, tuple(section.at or ()))
    if section.warm_up:
        schedule = WarmUp(schedule, section.warm_up, section.warm_up_start)
    return schedule
