"""From a recipe to the objects of a run."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from anybatch import penalties, zoo
from anybatch.data import Examples, OrderWithin, Splits, sources, split
from anybatch.data.arrays import check_classes
from anybatch.errors import AnybatchError, DataError, RecipeError
from anybatch.gradient import ClipNorm
from anybatch.gradient.habits import survey
from anybatch.layout import Layout
from anybatch.objective import Objective
from anybatch.order import Order
from anybatch.randomness import fold, generators_restored, seed_generators
from anybatch.recipe.names import called, looked_up, nearest, place_in_user_code
from anybatch.recipe.objectives import objective_of
from anybatch.recipe.schema import USED_BY, OptimizerSection, Recipe, ScheduleSection
from anybatch.schedules import (
    Constant,
    Cosine,
    Exponential,
    Inverse,
    Schedule,
    StepDecay,
    WarmUp,
)
from anybatch.training.averages import Average
from anybatch.training.evaluation import evaluate, outputs
from anybatch.zoo.caffe import CaffeSGD

__all__ = ["CLASS_LOSSES", "Built", "Part", "build"]

Part = Literal["train", "held_out"]

OPTIMIZERS = {
    "sgd": torch.optim.SGD,
    "caffe_sgd": CaffeSGD,
    "adagrad": torch.optim.Adagrad,
    "rmsprop": torch.optim.RMSprop,
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
}
CLASS_LOSSES = ("cross_entropy", "sigmoid_cross_entropy")  # their targets are classes
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

    recipe: Recipe
    model: nn.Module
    data: Examples
    parts: Splits
    objective: Objective
    optimizer: Optimizer
    order: OrderWithin  # of the part to train on
    schedule: Schedule
    clip: ClipNorm | None
    layout: Layout
    average: Average | None  # to be evaluated in the weights' stead

    def part(self, name: Part) -> Examples:
        """The examples of one part of the data."""
        return self.data.of_ids(getattr(self.parts, name))


def build(recipe: Recipe, *, allow_code: bool) -> Built:
    """Build what a recipe states; the weights are those of its seed.

    Nothing is written. Two examples pass through the model, so that what does not fit together
    is found before a run is begun.

    Args:
        recipe: what to build.
        allow_code: whether names of the user's own code may be imported.

    Raises:
        RecipeError, DataError, OrderError and others: what the recipe asks for in vain.
    """
    device = _device(recipe.run.device)
    if recipe.run.threads is not None:
        torch.set_num_threads(recipe.run.threads)
    dtype = getattr(torch, recipe.run.dtype)
    model = _model(recipe, allow_code).to(device, dtype)
    data, parts = _data(recipe, model, dtype, allow_code)
    objective = objective_of(recipe.objective, allow_code=allow_code)
    _try(model, objective, data.of_ids(parts.train[:2]), recipe.stop.metric)
    clip_norm = recipe.optimizer.clip_norm
    return Built(
        recipe=recipe,
        model=model,
        data=data,
        parts=parts,
        objective=objective,
        optimizer=_optimizer(recipe.optimizer, model),
        order=_order(recipe, parts.train),
        schedule=_schedule(recipe.schedule, recipe.optimizer.lr),
        clip=None if clip_norm is None else ClipNorm(clip_norm),
        layout=Layout(micro_batch=recipe.batch.micro_batch),
        average=_average(recipe, model),
    )


def _device(name: str) -> torch.device:
    try:
        torch.empty(0, device=name).cpu()
    except (RuntimeError, AssertionError) as error:
        raise RecipeError(
            f"run.device {name!r} is not to be had here: {str(error).splitlines()[0]} "
            f"Expected 'cpu', or an accelerator that this torch was built for."
        ) from error
    return torch.device(name)


@contextmanager
def _drawing_from(*numbers: int) -> Iterator[None]:
    """Draws from the global generators are the same in every session."""
    with generators_restored(torch.device("cpu")):
        seed_generators(fold(*numbers))
        yield


def _model(recipe: Recipe, allow_code: bool) -> nn.Module:
    make = looked_up(recipe.model.name, zoo.models, "model", allow_code=allow_code)
    with _drawing_from(recipe.run.seed, 0):
        model = called(make, recipe.model.args, "model.args")
    if not isinstance(model, nn.Module):
        raise RecipeError(
            f"model {recipe.model.name!r} made a {type(model).__name__}, "
            f"expected a torch.nn.Module."
        )
    survey(model)  # refuses what cannot be trained
    return model


def _data(
    recipe: Recipe, model: nn.Module, dtype: torch.dtype, allow_code: bool
) -> tuple[Examples, Splits]:
    load = looked_up(recipe.data.name, sources, "data set", allow_code=allow_code)
    with _drawing_from(0):  # whatever the seed of the run: it is the same data set
        loaded = called(load, recipe.data.args, "data.args")
    if not isinstance(loaded, tuple | list) or len(loaded) != 2:
        raise DataError(
            f"data {recipe.data.name!r} gave a {type(loaded).__name__}, "
            f"expected a pair (inputs, targets) with the examples first."
        )
    found = loaded if isinstance(loaded, Examples) else Examples.of(*loaded)
    inputs, targets = found.to(dtype)
    if recipe.objective.loss in CLASS_LOSSES:
        targets = check_classes(found.targets, _num_outputs(model, inputs))
    parts = split(
        targets,
        recipe.data.held_out,
        seed=recipe.data.split,
        stratify=recipe.data.stratify and targets.ndim == 1 and not targets.is_floating_point(),
    )
    return Examples(inputs, targets), parts


def _num_outputs(model: nn.Module, inputs: Tensor) -> int:
    """Width of the model's output, by trying it on one example."""
    with _no_misfit(f"the model does not take an input of shape {tuple(inputs.shape[1:])}"):
        (output,) = outputs(model, lambda batch, _: model(batch), inputs[:1])
        return int(output.shape[-1])


def _try(model: nn.Module, objective: Objective, examples: Examples, metric: str | None) -> None:
    """See that model, loss, penalty, data and the metric to stop by fit together, on two
    examples."""
    shapes = " and ".join(str(tuple(tensor.shape[1:])) for tensor in examples)
    with _no_misfit(f"the model or its loss does not take examples of shapes {shapes}"):
        outputs(model, lambda batch, size: objective.losses(model, batch, size), tuple(examples))
    penalties.values(objective.penalty, model)
    if metric not in (None, "loss"):
        known = ["loss", *evaluate(model, objective, tuple(examples)).metrics]
        if metric not in known:
            raise RecipeError(f"stop.metric: there is no {metric!r}; {nearest(metric, known)}")


@contextmanager
def _no_misfit(what: str) -> Iterator[None]:
    """Errors of torch are the recipe's; those in the user's own code are left as they are."""
    try:
        yield
    except AnybatchError:
        raise
    except Exception as error:
        if place_in_user_code(error) is not None:
            raise
        came = f"{type(error).__name__}: {error}".splitlines()[0]
        raise RecipeError(f"{what}: {came}. Do model.args fit the data?") from error


def _optimizer(section: OptimizerSection, model: nn.Module) -> Optimizer:
    for name, place in (("lr", "optimizer.lr"), ("params", "[model]: they are all the model's")):
        if name in section.args:
            raise RecipeError(f"optimizer.args.{name}: expected in {place}; take it out of args.")
    make, given = OPTIMIZERS[section.name], {"params": model.parameters(), "lr": section.lr}
    optimizer: Optimizer = called(make, section.args, "optimizer.args", **given)
    if section.groups:
        optimizer = make(_groups(section, model), lr=section.lr, **section.args)
    return optimizer


def _groups(section: OptimizerSection, model: nn.Module) -> list[dict[str, Any]]:
    """The parameters that no group holds, at the optimiser's own rate, and then each group."""
    left = _names(model)
    groups: list[dict[str, Any]] = []
    for number, group in enumerate(section.groups):
        where = f"optimizer.groups.{number}"
        held = _held(group.on, left, model, where)
        args = dict(group.model_extra or {})
        for name, instead in (("lr", "lr_factor"), ("params", "on")):
            if name in args:
                raise RecipeError(f"{where}.{name}: expected {instead} instead.")
        make, lr = OPTIMIZERS[section.name], section.lr * group.lr_factor
        # Made only to be refused: torch checks no argument of a group.
        called(make, section.args | args, where, params=held, lr=lr)
        groups.append({"params": held, "lr": lr, **args})
        left = {p: names for p, names in left.items() if not any(p is own for own in held)}
    return [{"params": list(left)}, *groups]


def _names(model: nn.Module) -> dict[nn.Parameter, list[str]]:
    """All names of each parameter; a tied one has several."""
    names: dict[nn.Parameter, list[str]] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        names.setdefault(p, []).append(name)
    return names


def _held(
    patterns: list[str], left: dict[nn.Parameter, list[str]], model: nn.Module, where: str
) -> list[nn.Parameter]:
    """The parameters left of which a name matches; each pattern must match one of the model's."""
    every = [name for names in _names(model).values() for name in names]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in every):
            raise RecipeError(
                f"{where}.on: {pattern!r} matches no parameter. There are: {', '.join(every)}."
            )
    held = [
        p
        for p, names in left.items()
        if any(fnmatchcase(name, pattern) for name in names for pattern in patterns)
    ]
    if not held:
        raise RecipeError(
            f"{where}.on = {patterns} leaves this group empty: the first group that matches a "
            f"parameter holds it. Put the narrower patterns first, or take the group out."
        )
    return held


def _order(recipe: Recipe, ids: Tensor) -> OrderWithin:
    batch, seed = recipe.batch, recipe.run.seed
    return OrderWithin(Order(len(ids), batch_size=batch.size, seed=seed, last=batch.last), ids)


def _schedule(section: ScheduleSection, lr: float) -> Schedule:
    stated = {key: getattr(section, key) for key in USED_BY[section.name]}
    if section.name == "step":
        stated["at"] = tuple(section.at or ())
    schedule = SCHEDULES[section.name](lr, **stated)
    if section.warm_up:
        schedule = WarmUp(schedule, section.warm_up, section.warm_up_start)
    return schedule


def _average(recipe: Recipe, model: nn.Module) -> Average | None:
    decay = recipe.average.decay
    return None if decay is None else Average(model, decay, warm_up=recipe.average.warm_up)
