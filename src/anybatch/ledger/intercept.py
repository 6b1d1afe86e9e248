"""Interception of every operation in which the batch meets a parameter, in an unchanged model.

Each such call of torch runs with its parameters as constants, so that autograd leaves no gradient
in them. A tap collects what the gradients are computed from (`contractions`). A gradient that still
reaches `.grad` was not intercepted and is an error.

| the call takes | what the ledger does |
|---|---|
| parameters alone | run the call; track its result like a parameter (`derived`) |
| an operation made of others, such as a recurrent layer | run those (`decompositions`) |
| an elementwise operation, an assignment | use copies of parameters (`elementwise`) |
| a parameter repeated or joined per example | the same |
| an einsum | follow the letter of the example (`einsum`) |
| an operation with a rule | apply the rule (`RULES`) |
| a function of torch written in Python, such as attention | intercept its body |
| anything else | map it over the examples (`vmap_fallback`) |

If an operation with a parameter does not contain the examples, for example a look-up of position
embeddings that all examples share, its result is tracked like a parameter.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NoReturn, Protocol

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from anybatch._torch import function_modes, leave_transforms, tree_leaves
from anybatch.kernels.operations import FASTER
from anybatch.ledger.contractions import CASTS, ELEMENTWISE, EXPANSIONS, JOINS, RULES
from anybatch.ledger.contractions.calls import Call, Context, ParameterTracker, Receive
from anybatch.ledger.contractions.decompositions import (
    BACKWARD_CALLS,
    DECOMPOSITIONS,
    is_composite,
    strip_mode_check,
)
from anybatch.ledger.contractions.einsum import parse_einsum, run_einsum
from anybatch.ledger.contractions.elementwise import (
    run_assignment,
    run_elementwise,
    run_expansion,
    run_rearrangement,
)
from anybatch.ledger.contractions.placement import Plan, Site
from anybatch.ledger.contractions.recurrent_layers import TWICE_DIFFERENTIABLE
from anybatch.ledger.contractions.vmap_fallback import run_mapped
from anybatch.ledger.gradient_taps import SecondDerivative, check_transforms
from anybatch.ledger.unplaced import UnplacedError

__all__ = ["Intercept", "Watcher", "list_active_modes"]


class Watcher(Protocol):
    """Observer of a loop of the user's own, which the mode hands some calls to."""

    def handles(self, func: Any) -> bool:
        """Return whether `run_call` takes the calls of a function."""

    def run_call(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run a call of such a function."""

    def run_operation(self, operands: list[Tensor], run: Callable[[], Any]) -> Any:
        """Run an operation that takes parameters; operands are its other tensors."""


class Intercept(TorchFunctionMode):
    """Mode in which operations with parameters pass their gradients to a receiver.

    Args:
        parameters: the parameters to watch, by name.
        num_examples: B of the forward pass.
        plan: placements of the examples.
        receive: gets the gradients in the backward pass.
    """

    def __init__(
        self, parameters: Mapping[str, Tensor], num_examples: int, plan: Plan, receive: Receive
    ) -> None:
        super().__init__()
        self.tracker = ParameterTracker(parameters)
        self.watcher: Watcher | None = None
        """Observer of a loop of the user's own; None: the library runs the passes."""
        self.is_paused = False  # calls run unchanged
        self.may_mix = False  # rows of different examples may have changed places
        self._context = Context(self.tracker, num_examples, plan, receive)

    def reset(self, plan: Plan) -> None:
        """Forget the last forward pass; the next calls process no examples."""
        self.tracker.reset()
        self.may_mix = False
        self._context = Context(self.tracker, 0, plan, self._context.receive)

    def switch_to(
        self, num_examples: int, plan: Plan, receive: Receive, uses: dict[str, int]
    ) -> None:
        """Go on with a micro-batch, which has its own receiver and counts of uses."""
        self.tracker.uses = uses
        self._context = Context(self.tracker, num_examples, plan, receive)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if self.is_paused:
            return func(*args, **kwargs)
        if self.watcher is not None and self.watcher.handles(func):
            return self.watcher.run_call(func, args, kwargs)
        names = self.tracker.names
        if _contains_any(names, args) or (kwargs and _contains_any(names, kwargs.values())):
            return self._run_with_parameters(func, args, kwargs)
        return self._run_without_parameters(func, args, kwargs)

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        if isinstance(error[1], SecondDerivative):
            self._context.plan.needs_copies = True  # from the next forward pass on

    def _run_with_parameters(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run a call that takes parameters or tensors derived from them."""
        tracker, names = self.tracker, self.tracker.names
        if func is torch.autograd.grad:
            self._refuse_parameter_gradient(args, kwargs)
        decomposition = DECOMPOSITIONS.get(func)
        if self._context.plan.needs_copies and func in TWICE_DIFFERENTIABLE:
            decomposition = TWICE_DIFFERENTIABLE[func]
        if decomposition is not None:
            with self:
                return decomposition(*args, **kwargs)
        tensors = _list_tensors(args, kwargs)
        if func in CASTS or func in EXPANSIONS:
            tensors = tensors[:1]
        parameters = [t for t in tensors if id(t) in names]
        if not parameters:
            return func(*args, **kwargs)
        data = [t for t in tensors if id(t) not in names]
        if not data and func not in EXPANSIONS and func not in JOINS:
            with leave_transforms():
                result = func(*args, **kwargs)
            tracker.add_derived(func.__name__, result, parameters)
            return result
        ndim = max((t.ndim for t in data), default=0)
        label = tracker.labels[names[id(parameters[0])]]
        sites = {id(p): Site(names[id(p)], label, func.__name__, ndim) for p in parameters}
        call = Call(func, args, kwargs, data, parameters, sites, sites[id(parameters[0])])
        if self.watcher is None:
            return self._run_operation(call)
        return self.watcher.run_operation(data, partial(self._run_operation, call))

    def _run_operation(self, call: Call) -> Any:
        """Run an operation in which the batch meets parameters. See the table above."""
        func, context = call.func, self._context
        if context.num_examples == 0:
            return context.run_shared(call)
        check_transforms(call.site, call.data, has_copies=context.plan.needs_copies)
        if not torch.is_grad_enabled() and not is_composite(func):
            for site in call.sites.values():  # checkpointing computes the gradient later
                self.tracker.count_use(site)
            return call.run()
        if func in EXPANSIONS:
            return run_expansion(call, context)
        if func in JOINS and not call.data:
            return run_rearrangement(call, context)
        if func in ELEMENTWISE:
            return run_elementwise(call, context)
        if func is torch.Tensor.__setitem__ and call.parameters[0] is call.args[2]:
            return run_assignment(call, context)
        if not context.plan.needs_copies:
            if func is torch.einsum and (letters := parse_einsum(*call.args)) is not None:
                return run_einsum(call, context, letters)
            rule = RULES.get(func)
            result = None
            if rule is not None:
                result = rule(self.tracker.detach, *call.args, **call.kwargs)
            if result is not None and {id(p) for p, _ in result.uses} >= call.sites.keys():
                return context.run_rule(call, result)
        if is_composite(func):
            with self:
                return strip_mode_check(func)(*call.args, **call.kwargs)
        return run_mapped(call, context)

    def _run_without_parameters(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run a call that takes no parameter."""
        if func in BACKWARD_CALLS:
            with self:  # checkpointing runs forward again in the backward pass
                return strip_mode_check(func)(*args, **kwargs)
        if func is torch.autograd.grad:
            return self._run_grad(args, kwargs)
        tracker, context = self.tracker, self._context
        if tracker.is_forward and not self.may_mix and context.num_examples:
            row_moves = context.plan.row_moves
            self.may_mix = row_moves.may_move(func, args, kwargs, context.num_examples)
        faster = FASTER.get(func)
        output = None if faster is None else faster(*args, **kwargs)
        return func(*args, **kwargs) if output is None else output

    def _run_grad(self, args: Any, kwargs: Any) -> Any:
        """Run `torch.autograd.grad` in the loss, where checkpointing runs forward again."""
        was_forward, self.tracker.is_forward = self.tracker.is_forward, False
        try:
            with self:
                return strip_mode_check(torch.autograd.grad)(*args, **kwargs)
        finally:
            self.tracker.is_forward = was_forward

    def _refuse_parameter_gradient(self, args: Any, kwargs: Any) -> NoReturn:
        names = self.tracker.names
        name = next(names[id(leaf)] for leaf in tree_leaves((args, kwargs)) if id(leaf) in names)
        raise UnplacedError(
            f"The loss differentiates with respect to the parameter {name}. That gradient mixes "
            f"examples, or is not in the graph that the ledger watches. Leave the model "
            f"unobserved."
        )


def _contains_any(names: Mapping[int, str], values: Any) -> bool:
    """Return whether a tensor with a name is among values or nested lists of values."""
    for value in values:
        if id(value) in names:
            return True
        if isinstance(value, list | tuple) and _contains_any(names, value):
            return True
    return False


def _list_tensors(args: Any, kwargs: Any) -> list[Tensor]:
    """List the tensors among arguments, in their order."""
    operands = (*args, *kwargs.values())
    if any(isinstance(x, list | tuple | dict) for x in operands):
        operands = tuple(tree_leaves(operands))
    return [x for x in operands if isinstance(x, Tensor)]


def list_active_modes() -> list[Intercept]:
    """List the modes of the ledger that are entered, the innermost last."""
    stack = function_modes()
    return [mode for mode in stack if isinstance(mode, Intercept)]
