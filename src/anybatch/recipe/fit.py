"""Whether the parts of a recipe fit together: model, loss, data and the metric to stop by.

Two examples pass through the model before a run is begun.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from traceback import walk_tb

import torch
from torch import Tensor, nn

from anybatch import penalties
from anybatch._torch import tree_leaves
from anybatch.data import DataSet, Examples, Splits
from anybatch.data.arrays import check_classes
from anybatch.errors import AnybatchError, RecipeError
from anybatch.objective import Objective
from anybatch.recipe.names import nearest, place_in_user_code
from anybatch.recipe.schema import Recipe
from anybatch.training.evaluation import evaluate, outputs

__all__ = ["CLASS_LOSSES", "check_fit", "describe_raw_bytes", "warn_of_harm"]

CLASS_LOSSES = ("cross_entropy", "sigmoid_cross_entropy")  # their targets are classes
AXES = (("length",), ("height", "width"), ("depth", "height", "width"))  # of convolutions

_log = logging.getLogger(__name__)


def check_fit(
    recipe: Recipe, model: nn.Module, objective: Objective, data: DataSet, parts: Splits
) -> None:
    """Check on two examples that model, loss, penalty, data and stop.metric fit together.

    Raises:
        RecipeError, DataError: parts that do not fit.
    """
    two = data.of_ids(parts.train[:2])
    if recipe.objective.loss in CLASS_LOSSES and data.targets is not None:
        check_classes(data.targets, _num_outputs(model, two))
    with _explain_misfit(model, f"the model or its loss does not take examples{_shapes(two)}"):
        found = evaluate(
            model,
            objective,
            two.columns,
            collate=two.collate,
            precision=recipe.run.precision,
        )
    penalties.compute_values(objective.penalty, model)
    metric, known = recipe.stop.metric, ["loss", *found.metrics]
    if metric is not None and metric not in known:
        raise RecipeError(f"stop.metric: there is no {metric!r}; {nearest(metric, known)}")


def warn_of_harm(recipe: Recipe, data: DataSet, parts: Splits, *, fresh: bool) -> None:
    """Warn of what can hardly be meant; of images that nobody scaled before a new run alone."""
    if fresh and (raw := describe_raw_bytes(data)):
        _log.warning(raw)
    decays = [
        recipe.optimizer.args,
        *(group.model_extra or {} for group in recipe.optimizer.groups),
    ]
    squares = [p for p in recipe.objective.penalty if p.kind == "L2" and p.strength]
    if squares and any(args.get("weight_decay") for args in decays):
        _log.warning(
            "the weights decay twice: by weight_decay of the optimizer, and by the L2 penalty of "
            "the objective. Leave one of them out, unless both are meant."
        )
    if recipe.objective.loss in CLASS_LOSSES and data.targets is not None:
        targets = data.targets[parts.train]
        if targets.ndim == 1 and len(targets) > 1 and (targets == targets[0]).all():
            _log.warning(
                "all %d examples to train on are of class %d: a model learns nothing from them but "
                "that class. Is it the right target column?",
                len(targets),
                int(targets[0]),
            )


def describe_raw_bytes(data: DataSet) -> str:
    """Describe inputs that are whole numbers from 0 to 255, such as bytes of images; "" if they
    are anything else."""
    if not isinstance(data, Examples) or not data.inputs.is_floating_point():
        return ""
    low, high = (float(end) for end in torch.aminmax(data.inputs))
    if (low, high) != (0.0, 255.0) or not bool((data.inputs[:64] % 1 == 0).all()):
        return ""
    return (
        "the inputs are whole numbers from 0 to 255, as images have that nobody scaled. Training "
        "may diverge or learn slowly. Divide them by 255 where the data are made."
    )


def _num_outputs(model: nn.Module, examples: DataSet) -> int:
    """Measure the width of the model's output."""
    what = f"the model does not take the inputs of examples{_shapes(examples)}"
    with _explain_misfit(model, what):
        output = outputs(
            model, lambda batch, _: model(batch[0]), examples.columns, collate=examples.collate
        )
        return int(output[0].shape[-1])


def _shapes(examples: DataSet) -> str:
    """Name the shapes of one example, for the message."""
    leaves = [leaf for leaf in tree_leaves(examples.columns) if isinstance(leaf, Tensor)]
    shapes = " and ".join(str(tuple(leaf.shape[1:])) for leaf in leaves)
    return f" of shapes {shapes}" if shapes else " of the data"


@contextmanager
def _explain_misfit(model: nn.Module, what: str) -> Iterator[None]:
    """Explain errors of torch by the layer that raised them; the user's own code keeps its error,
    with the explanation as a note."""
    try:
        yield
    except AnybatchError:
        raise
    except Exception as error:
        layer = _layer_of(error, model)
        if place_in_user_code(error) is not None:
            if layer:
                error.add_note(layer)
            raise
        came = f"{type(error).__name__}: {error}".splitlines()[0].rstrip(".")
        why = layer or "Do model.args fit the data?"
        raise RecipeError(f"{what}: {came}. {why}") from error


def _layer_of(error: BaseException, model: nn.Module) -> str:
    """Say which layer raised an error, what it was given, and what it takes; "" if none did."""
    names = {id(module): name for name, module in model.named_modules()}
    found = ""
    for frame, _ in walk_tb(error.__traceback__):
        layer = frame.f_locals.get("self")
        given = [frame.f_locals.get(name) for name in frame.f_code.co_varnames[1:2]]
        if isinstance(layer, nn.Module) and id(layer) in names and isinstance(given[0], Tensor):
            name, kind = names[id(layer)], type(layer).__name__
            place = f"Layer {name} ({kind})" if name else f"The model ({kind})"
            shape = tuple(given[0].shape)
            found = (
                f"{place} was given 2 examples in shape {shape}. {_takes(layer, shape)}".rstrip()
            )
    return found


def _takes(layer: nn.Module, shape: tuple[int, ...]) -> str:
    """Say which shape a layer takes."""
    if isinstance(layer, nn.Linear):
        return f"It takes {layer.in_features} numbers in the last dimension."
    if not isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return ""
    axes = AXES[len(layer.kernel_size) - 1]
    takes = f"It takes examples of shape ({layer.in_channels}, {', '.join(axes)})"
    if len(shape) == len(axes) + 1:
        return (
            f"{takes}: the channels are missing. Add them where the data are made, such as "
            f"inputs[:, None] for one channel."
        )
    return f"{takes}, the channels first."
