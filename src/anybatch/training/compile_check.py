"""Compare a compiled update with a plain one.

    |G_p - H_p|  <=  tolerance * max(|G_p|, |G| / 1000)  +  100 * |G - G'|    for each parameter p

H is the compiled gradient, G the plain one, and G' the plain one in two micro-batches: |G - G'| is
rounding. The optimiser's plain step from H must lead to the weights of the compiled step. Their
distance is compared with the length of the step.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from anybatch.gradient import Gradient, batch_gradient
from anybatch.gradient.survey import survey_model
from anybatch.layout import Layout
from anybatch.objective import Objective
from anybatch.pytree import list_leaves, sum_versions
from anybatch.runs.state import TrainingState
from anybatch.training.whole_update import CompileError, WholeUpdate, list_state

__all__ = ["make_checked_update"]

_FLOOR = 1e-3  # of the norm over all parameters: a smaller one is compared with this
_ROUNDINGS = 100  # factor of the rounding of another order of summation

Tensors = Mapping[str, Tensor]


def make_checked_update(
    function: WholeUpdate,
    training: TrainingState,
    objective: Objective,
    ids: Tensor,
    examples: Any,
    compute_plain: Callable[[], Gradient],
) -> tuple[Gradient, bool]:
    """Make an update from the compiled gradient, after comparing it with the plain update.

    Returns:
        The plain gradient, and whether the weights have moved: not if a number is not valid.

    Raises:
        CompileError: they differ, or the update cannot be compiled; nothing has changed.
    """
    optimizer, survey = training.optimizer, survey_model(training.model)
    state = {f"state {i}": tensor for i, tensor in enumerate(list_state(optimizer))}
    tensors = {**survey.parameters, **state}
    before, others = _copy(tensors), [*(b for *_, b in survey.buffers), *list_leaves(examples)]
    versions, attributes = sum_versions(others), _list_attributes(training.model)
    try:
        compiled = function.make_first(examples, ids)
        after, gradients = _copy(tensors), [function.copy_gradients()]
    finally:
        _restore(tensors, before)
    if sum_versions(others) != versions:
        raise CompileError("the forward pass writes into a buffer of the model, or into its batch")
    if changed := attributes ^ _list_attributes(training.model):
        raise CompileError(f"the forward pass changes the attribute {min(changed)[0]!r}")
    if compiled is None:
        return compute_plain(), False
    half = Layout(micro_batch=(len(ids) + 1) // 2)
    model, clip = training.model, function.clip
    batch_gradient(model, objective, examples, clip=clip, layout=half, self_check=False)
    gradients.append(_get_gradients(survey.parameters))
    plain = compute_plain()
    gradients.insert(1, _get_gradients(survey.parameters))
    problem = _find_difference(compiled, plain, gradients)
    if problem is None:
        for name, p in survey.parameters.items():
            p.grad = gradients[0][name]
        optimizer.step()
        problem = _find_step_difference(before, after, tensors)
    if problem is not None:
        _restore(tensors, before)
        raise CompileError(f"the compiled and the plain update differ in {problem}")
    return plain, True


def _find_difference(
    compiled: Gradient, plain: Gradient, gradients: Sequence[Tensors]
) -> str | None:
    """Find the first difference of two gradients that is no rounding; None: there is none.

    Args:
        gradients: by name of the parameter: compiled, plain, and plain in two micro-batches.
    """
    for name, term in plain.terms.items():
        for kind, a, b in (
            ("losses", term.values, compiled.terms[name].values),
            ("coefficients", plain.term_coefficients[name], compiled.term_coefficients[name]),
        ):
            tolerance = _get_tolerance(a)
            if not torch.allclose(a, b, tolerance, tolerance * float(a.abs().mean())):
                return f"the {kind} of the term {name!r}"
    for part, value in plain.parts.items():
        sizes = [
            float((c * plain.terms[n].values).abs().sum())
            for n, c in plain.term_coefficients.items()
            if n == part
        ]
        scale = sum(sizes) or abs(float(value))
        if not abs(float(value - compiled.parts[part])) <= _get_tolerance(value) * scale:
            return f"the part {part!r} of the loss"
    h, g, cut = gradients
    total = _norm(g.values())
    rounding = _ROUNDINGS * _norm(g[name] - cut[name] for name in g)
    for name in g:
        limit = _get_tolerance(g[name]) * max(_norm([g[name]]), _FLOOR * total) + rounding
        if not (distance := _norm([g[name] - h[name]])) <= limit:  # nan too
            return f"the gradient of {name}, by {distance:.1e} where rounding allows {limit:.1e}"
    return None


def _find_step_difference(before: Tensors, compiled: Tensors, plain: Tensors) -> str | None:
    """Find a tensor that the optimiser's step leaves elsewhere, by more than rounding."""
    for name, end in plain.items():
        step, eps = _norm([end.double() - before[name].double()]), torch.finfo(end.dtype).eps
        limit = _get_tolerance(end) * step + 8 * eps * _norm([end])
        if not (distance := _norm([end - compiled[name]])) <= limit:
            return f"the optimiser's step of {name}, by {distance:.1e} of {step:.1e}"
    return None


def _list_attributes(model: nn.Module) -> set[tuple[str, str]]:
    """List the numbers and texts among the attributes of all modules, as they are printed."""
    return {
        (f"{prefix}.{name}".lstrip("."), repr(value))
        for prefix, module in model.named_modules()
        for name, value in vars(module).items()
        if isinstance(value, int | float | str)
    }


def _copy(tensors: Tensors) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def _restore(tensors: Tensors, copies: Tensors) -> None:
    with torch.no_grad():
        for name, tensor in tensors.items():
            tensor.copy_(copies[name])


def _get_gradients(parameters: Tensors) -> dict[str, Tensor]:
    return {name: p.grad for name, p in parameters.items() if p.grad is not None}


def _get_tolerance(tensor: Tensor) -> float:
    return 1e-10 if tensor.dtype == torch.float64 else 1e-4


def _norm(tensors: Iterable[Tensor]) -> float:
    return math.hypot(*(float(torch.linalg.vector_norm(tensor.detach())) for tensor in tensors))
