"""Check that model, loss, data and the metric to stop by fit together, before a run is made.

Two examples pass through the model.
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
from anybatch.recipe.names import locate_user_code, suggest_name
from anybatch.recipe.schema import Recipe
from anybatch.training.evaluation import evaluate, map_micro_batches

__all__ = ["CLASS_LOSSES", "check_fit", "describe_raw_bytes", "warn_of_harm"]

CLASS_LOSSES = ("cross_entropy", "sigmoid_cross_entropy")  # their targets are classes
AXES = (("length",), ("height", "width"), ("depth", "height", "width"))  # of convolutions

_log = logging.getLogger(__name__)


def check_fit(
    recipe: Recipe, model: nn.Module, objective: Objective, data: DataSet, splits: Splits
) -> None:
    """Check on two examples that model, loss, penalty, data and stop.metric fit together."""
    pair = data.select(splits.train[:2])
    shapes = _describe_shapes(pair)
    if recipe.objective.loss in CLASS_LOSSES and data.targets is not None:
        with _explain_misfit(model, f"the model does not take the inputs of examples{shapes}"):
            num_outputs = _count_outputs(model, pair)
        check_classes(data.targets, num_outputs)
    with _explain_misfit(model, f"the model or its loss does not take examples{shapes}"):
        precision = recipe.run.precision
        evaluation = evaluate(
            model, objective, pair.columns, collate=pair.collate, precision=precision
        )
    penalties.compute_values(objective.penalty, model)
    metric, metrics = recipe.stop.metric, ["loss", *evaluation.metrics]
    if metric is not None and metric not in metrics:
        raise RecipeError(f"stop.metric: there is no {metric!r}; {suggest_name(metric, metrics)}")


def warn_of_harm(recipe: Recipe, data: DataSet, splits: Splits, *, fresh: bool) -> None:
    """Warn of what is hardly intended.

    Args:
        fresh: whether the run is new. Only then images that nobody scaled are worth a warning.
    """
    if fresh and (raw := describe_raw_bytes(data)):
        _log.warning(raw)
    arguments = [recipe.optimizer.args, *(g.model_extra or {} for g in recipe.optimizer.groups)]
    has_l2 = any(p.kind == "L2" and p.strength for p in recipe.objective.penalty)
    if has_l2 and any(args.get("weight_decay") for args in arguments):
        _log.warning(
            "the weights decay twice: by weight_decay of the optimizer, and by the L2 penalty of "
            "the objective. Leave one of them out, unless both are meant."
        )
    if recipe.objective.loss in CLASS_LOSSES and data.targets is not None:
        targets = data.targets[splits.train]
        if targets.ndim == 1 and len(targets) > 1 and (targets == targets[0]).all():
            _log.warning(
                "all %d examples to train on are of class %d: a model learns nothing from them but "
                "that class. Is it the right target column?",
                len(targets),
                int(targets[0]),
            )


def describe_raw_bytes(data: DataSet) -> str:
    """Describe inputs that are whole numbers from 0 to 255, such as bytes of images; else ""."""
    if not isinstance(data, Examples) or not data.inputs.is_floating_point():
        return ""
    low, high = (float(end) for end in torch.aminmax(data.inputs))
    if (low, high) != (0.0, 255.0) or not bool((data.inputs[:64] % 1 == 0).all()):
        return ""
    return (
        "the inputs are whole numbers from 0 to 255, like images that nobody scaled. Training may "
        "diverge or learn slowly. Divide them by 255 where the data are made."
    )


def _count_outputs(model: nn.Module, examples: DataSet) -> int:
    """Count the model's outputs: the size of their last dimension."""
    output = map_micro_batches(
        model, lambda batch, _: model(batch[0]), examples.columns, collate=examples.collate
    )
    return int(output[0].shape[-1])


def _describe_shapes(examples: DataSet) -> str:
    """Describe the shapes of one example, for a message."""
    leaves = [leaf for leaf in tree_leaves(examples.columns) if isinstance(leaf, Tensor)]
    shapes = " and ".join(str(tuple(leaf.shape[1:])) for leaf in leaves)
    return f" of shapes {shapes}" if shapes else " of the data"


@contextmanager
def _explain_misfit(model: nn.Module, problem: str) -> Iterator[None]:
    """Explain errors of torch by the layer that raised them.

    An error in the user's own code stays as it is, with the explanation as a note.
    """
    try:
        yield
    except AnybatchError:
        raise
    except Exception as error:
        layer = _describe_layer(error, model)
        if locate_user_code(error) is not None:
            if layer:
                error.add_note(layer)
            raise
        reason = f"{type(error).__name__}: {error}".splitlines()[0].rstrip(".")
        hint = layer or "Do model.args fit the data?"
        raise RecipeError(f"{problem}: {reason}. {hint}") from error


def _describe_layer(error: BaseException, model: nn.Module) -> str:
    """Say which layer raised an error, and which shapes it got and takes; "" if none did."""
    names = {id(module): name for name, module in model.named_modules()}
    text = ""
    for frame, _ in walk_tb(error.__traceback__):
        layer = frame.f_locals.get("self")
        inputs = [frame.f_locals.get(name) for name in frame.f_code.co_varnames[1:2]]
        if isinstance(layer, nn.Module) and id(layer) in names and isinstance(inputs[0], Tensor):
            name, kind = names[id(layer)], type(layer).__name__
            place = f"Layer {name} ({kind})" if name else f"The model ({kind})"
            shape = tuple(inputs[0].shape)
            takes = _describe_input(layer, shape)
            text = f"{place} was given 2 examples in shape {shape}. {takes}".rstrip()
    return text


def _describe_input(layer: nn.Module, shape: tuple[int, ...]) -> str:
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
