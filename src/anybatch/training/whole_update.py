"""One whole update as one compiled function.

    v = losses(w),   c = dR/dv,   G = sum_i c_i grad v_i + grad Omega,   G <- clip(G),
    w <- step(w, G)

`torch.compile` makes one graph of it, for batches of one shape. The graph also computes whether
all losses, counts and gradients are valid. If they are not, weights and the optimiser's state keep
their values. The caller then makes the plain update, which names the cause.

R is linear in each term, and the optimiser has its state: the first updates are plain.
"""

import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from anybatch._torch import copy_in_place, find_dynamo
from anybatch.errors import AnybatchError
from anybatch.example_losses import ExampleLosses, list_outputs, sum_metrics
from anybatch.gradient import ClipNorm, Gradient
from anybatch.objective import Objective
from anybatch.penalties import add_selected, select_parameters
from anybatch.reduction import Reduction
from anybatch.runs.state import TrainingState

__all__ = ["CompileError", "NewGraphError", "WholeUpdate", "list_state"]

BACKEND = "inductor"  # torch's own; tests replace it by a faster one


class CompileError(AnybatchError):
    """Says why an update cannot be compiled."""


class NewGraphError(CompileError):
    """Says that something has changed since the function was compiled."""


class _Results(NamedTuple):
    """Results of the graph; it can return tensors only."""

    is_valid: Tensor
    loss: Tensor
    parts: dict[str, Tensor]
    losses: dict[str, tuple[Tensor, Tensor | None, Tensor | None, dict[str, Tensor]]]
    coefficients: dict[str, Tensor]
    metrics: dict[str, Tensor]
    outputs: dict[str, Tensor]
    norm: Tensor | None


class WholeUpdate:
    """Compiled update of a model, for batches of one shape.

    Args:
        training: weights and the optimiser's state, which the function changes in place.
        parameters: the trainable ones, by name.
        size: examples of a batch.
    """

    def __init__(
        self,
        training: TrainingState,
        objective: Objective,
        clip: ClipNorm | None,
        parameters: Mapping[str, nn.Parameter],
        size: int,
    ) -> None:
        optimizer = training.optimizer
        assert isinstance(optimizer, Optimizer)
        self._names, self._parameters = list(parameters), list(parameters.values())
        self._size, self.clip = size, clip
        self._gradients = [torch.zeros_like(p) for p in self._parameters]
        self._groups = optimizer.param_groups
        self._rates = [torch.zeros((), dtype=torch.float64) for _ in self._groups]
        self._backend = _Backend()
        _widen_scalars(optimizer)
        update = _build(training, objective, clip, parameters, size)
        self._function = torch.compile(update, backend=self._backend, fullgraph=True, dynamic=False)

    def make_first(self, batch: Any, ids: Tensor) -> Gradient | None:
        """Make an update, and compile the function unless it is compiled.

        Raises:
            CompileError: torch cannot compile it; nothing has changed.
        """
        if self._backend.graphs:
            return self(batch, ids)
        dynamo = find_dynamo()
        self._backend.is_open = True
        try:
            with dynamo.config.patch(trace_autograd_ops=True), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch's compiler warns of its own code
                gradient = self(batch, ids)
        except Exception as error:
            raise CompileError(_explain(error)) from error
        finally:
            self._backend.is_open = False
        if not self._backend.graphs:
            raise CompileError("torch.compile is turned off, by TORCH_COMPILE_DISABLE or a stance")
        return gradient

    def __call__(self, batch: Any, ids: Tensor) -> Gradient | None:
        """Make an update; None: its numbers are not valid, and nothing has changed.

        Raises:
            NewGraphError: torch would have to compile it again; nothing has changed.
        """
        for p, gradient in zip(self._parameters, self._gradients, strict=True):
            p.grad = gradient
        rates = [group["lr"] for group in self._groups]
        try:
            for group, rate in zip(self._groups, self._rates, strict=True):
                group["lr"] = rate.fill_(float(group["lr"]))
            results = self._function(batch)
        except Exception as error:  # the plain update raises it too, if it is the data
            if self._backend.is_open:
                raise
            raise NewGraphError(_explain(error)) from error
        finally:
            for group, number in zip(self._groups, rates, strict=True):
                group["lr"] = number
        return self._make_gradient(results, ids) if results.is_valid else None

    def copy_gradients(self) -> dict[str, Tensor]:
        """Copy the gradient of the last update, by name of the parameter."""
        return {name: g.clone() for name, g in zip(self._names, self._gradients, strict=True)}

    def _make_gradient(self, results: _Results, ids: Tensor) -> Gradient:
        return Gradient(
            loss=results.loss,
            parts=results.parts,
            terms={name: ExampleLosses(*term) for name, term in results.losses.items()},
            term_coefficients=results.coefficients,
            metrics=results.metrics,
            num_examples=self._size,
            ids=ids,
            norm=results.norm,
            is_finite=True,
            micro_batch=self._size,
            reduction_state=dict.fromkeys(results.losses),
            outputs=results.outputs,
        )


def list_state(optimizer: Any) -> list[Tensor]:
    """List the tensors of an optimiser's state, in a fixed order."""
    states = [optimizer.state[p] for group in optimizer.param_groups for p in group["params"]]
    return [value for state in states for value in state.values() if isinstance(value, Tensor)]


def _build(
    training: TrainingState,
    objective: Objective,
    clip: ClipNorm | None,
    parameters: Mapping[str, nn.Parameter],
    size: int,
) -> Callable[[Any], _Results]:
    """Write the update as one function that `torch.compile` can trace."""
    model, optimizer, weights = training.model, training.optimizer, list(parameters.values())
    penalties = [(term, select_parameters(term, model)) for term in objective.penalty or ()]
    reductions = objective.reductions

    def update(batch: Any) -> _Results:
        terms = objective.check(objective.example_losses(model, batch), size)
        losses = {name: term.map(torch.detach) for name, term in terms.items()}
        reduced = {name: _reduce(reductions[name], term) for name, term in losses.items()}
        trained = {name: term.values for name, term in terms.items() if term.values.requires_grad}
        values, seeds = list(trained.values()), [reduced[name][1] for name in trained]
        sums = torch.autograd.grad(values, weights, seeds, materialize_grads=True)
        with torch.no_grad():
            parts = {name: value for name, (value, _, _) in reduced.items()}
            flags = [flag for _, _, flag in reduced.values()]
            flags.append(torch.stack([gradient.sum() for gradient in sums]).sum().isfinite())
            gradients = dict(zip(parameters, sums, strict=True))
            for term, selection in penalties:
                parts[term.part] = add_selected(term, selection, gradients)
            norm = None if clip is None else clip.apply(list(sums))
            loss = torch.stack(list(parts.values())).sum()
            is_valid = torch.stack([*flags, loss.isfinite()]).all()
            _step(optimizer, gradients, parameters, is_valid)
        tensors = {n: (t.values, t.counts, t.groups, dict(t.metrics)) for n, t in losses.items()}
        coefficients = {name: c for name, (_, c, _) in reduced.items()}
        metrics, outputs = sum_metrics(losses), list_outputs(terms)
        return _Results(is_valid, loss, parts, tensors, coefficients, metrics, outputs, norm)

    copy: Callable[[Any], _Results] = _copy_function(update)
    return copy


def _step(
    optimizer: Any,
    gradients: Mapping[str, Tensor],
    parameters: Mapping[str, nn.Parameter],
    is_valid: Tensor,
) -> None:
    """Deliver the gradients and make the optimiser's step, if all numbers are valid."""
    for name, p in parameters.items():
        assert p.grad is not None
        p.grad.copy_(gradients[name])
    tensors = [*parameters.values(), *list_state(optimizer)]
    before = [tensor.clone() for tensor in tensors]
    inspect.unwrap(type(optimizer).step)(optimizer)  # without hooks and profiling
    pairs = zip(tensors, before, strict=True)
    copy_in_place(tensors, [torch.where(is_valid, new, old) for new, old in pairs])


def _reduce(reduction: Reduction, losses: ExampleLosses) -> tuple[Tensor, Tensor, Tensor]:
    """Return R, c and whether losses and counts are valid, for a linear reduction."""
    v, n, size = losses.values, losses.counts, len(losses.values)
    is_valid = v.sum().isfinite()
    if n is None:
        c: Any = reduction.factor(size, size)
        return v.sum() * c, torch.full_like(v, c), is_valid
    present, total = n > 0, n.sum(dtype=torch.float64)
    is_valid = is_valid & total.isfinite() & (n >= 0).all()
    if reduction.needs_counts:
        is_valid = is_valid & present.any()
    c = torch.as_tensor(reduction.factor(total, size), dtype=v.dtype)  # type: ignore[arg-type]
    return torch.where(present, v, 0).sum() * c, torch.where(present, c, 0), is_valid


class _Backend:
    """Backend of `torch.compile` that compiles only while it is open.

    Otherwise a change in the model would be compiled in the middle of a training, unchecked.
    """

    def __init__(self) -> None:
        self.is_open = False
        self.graphs: list[Any] = []

    def __call__(self, graph: Any, inputs: Sequence[Any]) -> Any:
        if not self.is_open:
            raise NewGraphError("the model, the loss or the optimiser has changed")
        self.graphs.append(find_dynamo().lookup_backend(BACKEND)(graph, inputs))
        return self.graphs[-1]


def _copy_function(function: Any) -> Any:
    """Copy a function with its code: torch keeps compiled graphs, and a limit, by code."""
    code, closure = function.__code__.replace(), function.__closure__
    return FunctionType(code, function.__globals__, function.__name__, None, closure)


def _widen_scalars(optimizer: Any) -> None:
    """Hold counters and products in float64. Compiled, 1 - 0.999^t loses four digits in float32."""
    for state in optimizer.state.values():
        for name, value in state.items():
            if isinstance(value, Tensor) and value.ndim == 0 and value.is_floating_point():
                state[name] = value.double()


def _explain(error: Exception) -> str:
    """Return the first lines of an error of torch, which name the cause."""
    cause = getattr(error, "inner_exception", error)
    if isinstance(cause, FileNotFoundError):
        return f"torch needs a C++ compiler, and {cause.filename} is not installed"
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    return f"{type(cause).__name__}: {' '.join(lines[:3])[:400]}"
