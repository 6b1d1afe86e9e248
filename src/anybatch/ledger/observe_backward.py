"""Backward passes in the user's own loop: results of each example, and `.grad` as without a ledger.

    .grad += sum_i g_i,      |g_i| of all examples since `.grad` was cleared or a weight changed

At the 1st, 10th, 100th, ... forward pass plain autograd computes the gradients as well, and the
ledger's sum must agree with it for each parameter.
"""

import inspect
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any, NamedTuple, final

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointError

from anybatch._torch import tree_leaves
from anybatch.errors import LedgerError
from anybatch.ledger.contractions.calls import ParameterTracker
from anybatch.ledger.contractions.decompositions import BACKWARD_CALLS, strip_mode_check
from anybatch.ledger.gradient_stats import GradientCollector
from anybatch.ledger.intercept import list_active_modes
from anybatch.ledger.observe_checks import confirm_placements, refuse_other_dimension
from anybatch.ledger.observe_forward import Arrival, ForwardObserver, OnArrival
from anybatch.ledger.observe_micro_batches import MicroBatch, find_sources
from anybatch.ledger.watched_pass import add_to_grad, refuse_missed

__all__ = ["BackwardObserver"]

Run = Callable[[], Any]
Collectors = dict[MicroBatch, GradientCollector]
_SCALE = "anybatch loss scale"
_NUM_NODES = 32
"""Nodes of the graph behind a loss that are searched for the product of a GradScaler."""


class _Request(NamedTuple):
    """A backward pass that the user has begun."""

    roots: list[Any]
    keeps_graph: bool
    is_partial: bool  # it leads to some tensors, and leaves parameters alone
    is_internal: bool  # begun by ab.batch_gradient


@final
class BackwardObserver:
    """Takes the calls that begin a backward pass.

    Args:
        forward: observer of the forward passes.
    """

    def __init__(self, forward: ForwardObserver) -> None:
        self.results = _Results(forward)
        self._forward = forward
        self._num_passes = 0
        self._has_failed = False
        """True if an error was raised, which says more than that nothing was observed."""
        self._eps = 0.0  # of the narrowest gradient of the present pass
        forward.mode.watcher = self

    def run_operation(self, operands: list[Tensor], run: Run) -> Any:
        """Run an operation that takes parameters."""
        return self._forward.run_operation(operands, run)

    def handles(self, func: Any) -> bool:
        """Return whether `run_call` takes the calls of a function."""
        if func is torch.Tensor.mul:
            return _find_caller() == "torch.amp.grad_scaler"
        return func is torch.autograd.grad or func in BACKWARD_CALLS

    def run_call(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run a call that begins a backward pass, or one that scales a loss."""
        if func is torch.Tensor.mul:
            result = func(*args, **kwargs)
            node: Any = result.grad_fn
            if node is not None:
                node.metadata[_SCALE] = args[1]
            return result
        mode = self._forward.mode
        if not mode.tracker.is_forward:  # a backward pass runs another one
            with mode:
                return strip_mode_check(func)(*args, **kwargs)
        request = self._make_request(func, args, kwargs)
        observers = [self, *_list_outer_observers()]
        run: Run = partial(strip_mode_check(func), *args, **kwargs)
        if request.is_partial:
            for observer in observers:
                run = partial(observer.run_partial, run, request)
            return run()
        with ExitStack() as stack:
            for observer in observers:
                stack.enter_context(observer.arriving(lambda _: None))
            for observer in observers:
                observer.prepare(request)
        for observer in observers:
            run = partial(observer.run_backward, run, request)
        return run()

    def prepare(self, request: _Request) -> None:
        """Confirm where examples lie, before any gradient is added to `.grad`."""
        self._num_passes += 1
        with self._convert_failures():
            roots = [root for root in request.roots if isinstance(root, Tensor)]
            micro_batches = self._forward.micro_batches
            sources, _ = find_sources(roots, micro_batches.key)
            confirm_placements(self._forward, sources, self.arriving)
            if not micro_batches.has_dim:
                for root in roots:
                    refuse_other_dimension(root, micro_batches.key)

    def run_partial(self, run: Run, request: _Request) -> Any:
        """Run a pass that leaves parameters alone."""
        reached: set[MicroBatch] = set()
        with self.arriving(lambda arrival: reached.update(m.root for m in arrival.target)):
            result = run()
        for micro_batch in () if request.keeps_graph else reached:
            micro_batch.outputs.clear()  # their graph is freed
        return result

    def run_backward(self, run: Run, request: _Request) -> Any:
        """Run a backward pass, and add its results."""
        with self._convert_failures():
            return self._collect(run, request)

    def finish(self) -> None:
        """Check that something was observed.

        Raises:
            LedgerError: nothing was observed, though there was a backward pass.
        """
        if self._num_passes and self.results.is_empty and not self._has_failed:
            raise LedgerError(
                "Nothing was observed: no backward pass has reached a parameter of the model. The "
                "forward pass must be made within 'with ab.observe(model):', with the model that "
                "is observed and not with a copy of it."
            )

    @contextmanager
    def arriving(self, on_arrival: OnArrival) -> Iterator[None]:
        """Hand gradients to a function; checkpointing can repeat forward passes meanwhile."""
        forward, tracker = self._forward, self._forward.mode.tracker
        before = forward.on_arrival, tracker.is_forward
        forward.on_arrival, tracker.is_forward = on_arrival, False
        try:
            with nullcontext() if forward.mode in list_active_modes() else forward.mode:
                yield
        finally:
            forward.on_arrival, tracker.is_forward = before

    @contextmanager
    def _convert_failures(self) -> Iterator[None]:
        try:
            yield
        except CheckpointError as error:
            self._has_failed = True
            raise LedgerError(
                f"Activation checkpointing could not repeat a forward pass: {error}. The ledger "
                f"follows it in one forward pass before each backward pass. Go backward after each "
                f"forward pass."
            ) from error
        except LedgerError:
            self._has_failed = True
            raise

    def _make_request(self, func: Any, args: Any, kwargs: Any) -> _Request:
        arguments = inspect.signature(func).bind(*args, **kwargs).arguments
        inputs = tree_leaves(arguments.get("inputs"))
        if any(id(x) in self._forward.mode.tracker.names for x in inputs):
            raise LedgerError(
                f"{func.__name__}(..., inputs=...) names parameters of the observed model. The "
                f"ledger sees passes that reach all parameters. Call loss.backward(), and read "
                f"their .grad, or leave the model unobserved."
            )
        roots = next(iter(arguments.values()))
        keeps_graph = bool(arguments.get("retain_graph") or arguments.get("create_graph"))
        is_partial = func is torch.autograd.grad or arguments.get("inputs") is not None
        is_internal = _find_caller().startswith("anybatch.gradient")
        return _Request(tree_leaves(roots), keeps_graph, is_partial, is_internal)

    def _collect(self, run: Run, request: _Request) -> Any:
        forward, tracker = self._forward, self._forward.mode.tracker
        self._eps = 0.0
        self.results.clear_stale()
        forward.resume_recomputation(None)
        for constant in (tracker.constants or {}).values():
            constant.grad = None
        collectors: Collectors = {}
        with (
            forward.add_hints(),
            refuse_missed(forward.parameters),
            self.arriving(partial(self._add_arrival, collectors, request)),
        ):
            result = run()
        scale = _find_loss_scale(request.roots)
        totals = self.results.add(collectors, scale)
        if tracker.constants is not None:
            _compare_with_autograd(tracker, totals, collectors, scale, self._eps)
        add_to_grad(forward.parameters, totals)
        self.results.note_grads(collectors)
        if not request.keeps_graph:
            forward.close(collectors)
        return result

    def _add_arrival(self, collectors: Collectors, request: _Request, arrival: Arrival) -> None:
        """Add a gradient to the collectors of its micro-batches."""
        if request.is_internal:
            raise LedgerError(
                "ab.batch_gradient was called within ab.observe(model), which is for loops that "
                "call loss.backward() themselves. Leave ab.observe away, and ask for "
                "ab.batch_gradient(..., observe=ab.Observe())."
            )
        self._eps = max(self._eps, torch.finfo(arrival.d.dtype).eps)
        for micro_batch in {m.root for m in arrival.target}:
            if micro_batch not in collectors:
                collectors[micro_batch] = GradientCollector(
                    None,
                    keep_uses=request.keeps_graph,
                    keep_gradients=False,
                    earlier=micro_batch.earlier,
                )
        for site, use in zip(arrival.sites, arrival.make(arrival.placement), strict=True):
            name, start = site.parameter, 0
            if len(arrival.target) == 1:
                micro_batch = arrival.target[0].root
                num_uses = None if request.keeps_graph else self._count_uses(micro_batch, name)
                collectors[micro_batch].add(name, use, num_uses)
                continue
            for micro_batch in arrival.target:
                part = use.take(start, start + micro_batch.size)
                collectors[micro_batch.root].add(name, part, None)
                start += micro_batch.size

    def _count_uses(self, micro_batch: MicroBatch, name: str) -> int | None:
        """Return the number of uses of a parameter; None: it is not known."""
        is_indirect = self._forward.mode.tracker.is_indirect(name)
        return micro_batch.uses.get(name) if micro_batch.has_all_uses and not is_indirect else None


@final
class _Results:
    """Micro-batches whose gradients are in `.grad`, in the order of forward passes."""

    def __init__(self, forward: ForwardObserver) -> None:
        self.micro_batches: list[MicroBatch] = []
        self._forward = forward
        self._grads: tuple[int, dict[str, tuple[Tensor, int]]] | None = None
        """Number of steps, and `.grad` with its version, after the last backward pass."""

    @property
    def is_empty(self) -> bool:
        """True if no backward pass has reached a parameter."""
        return self._grads is None

    def add(self, collectors: Collectors, scale: Tensor | float) -> dict[str, Tensor]:
        """Add the results of a backward pass to its micro-batches; return sum_i g_i."""
        totals: dict[str, Tensor] = {}
        for micro_batch, collector in collectors.items():
            collector.move_to_parameters(self._forward.mode.tracker)
            collector.keep_uses |= collector.expects_more(micro_batch.uses)
            stats = collector.finish()
            for name, square in stats.squares.items():
                if name in micro_batch.squares and name not in micro_batch.earlier:
                    raise _second_pass_error(name)
                micro_batch.squares[name] = square / scale**2
            for name, uses in stats.uses.items():
                micro_batch.earlier[name] = [*micro_batch.earlier.get(name, []), *uses]
            for name, total in stats.totals.items():
                if name not in self._forward.parameters:
                    raise _second_pass_error(name)
                totals[name] = totals[name] + total if name in totals else total
        return totals

    def note_grads(self, collectors: Collectors) -> None:
        """Note which gradients `.grad` holds after a backward pass."""
        if not collectors:
            return
        micro_batches = {*self.micro_batches, *collectors}
        self.micro_batches = sorted(micro_batches, key=lambda m: m.number)
        parameters = self._forward.parameters.items()
        grads = {name: p.grad for name, p in parameters if p.grad is not None}
        versions = {name: (g, g._version) for name, g in grads.items()}
        self._grads = self._forward.count_steps(), versions

    def clear_stale(self) -> None:
        """Clear the results whose gradients are no longer in `.grad`."""
        if self._grads is None:
            return
        num_steps, grads = self._grads
        parameters = self._forward.parameters
        is_cleared = any(_is_cleared(parameters[name], *state) for name, state in grads.items())
        if is_cleared or num_steps != self._forward.count_steps():
            for micro_batch in self.micro_batches:
                micro_batch.clear_results()
            self.micro_batches = []


def _is_cleared(p: nn.Parameter, before: Tensor, version: int) -> bool:
    """Return whether `.grad` was removed or set to 0 since the last backward pass."""
    grad = p.grad
    if grad is before and grad._version == version:
        return False
    return grad is None or not bool(grad.any())


def _compare_with_autograd(
    tracker: ParameterTracker,
    totals: Mapping[str, Tensor],
    micro_batches: Mapping[MicroBatch, object],
    scale: Tensor | float,
    eps: float,
) -> None:
    """Check that the sums agree with plain autograd's gradients."""
    plain = _pop_plain_gradients(tracker)
    zero = torch.zeros(())
    norms = dict.fromkeys(plain.keys() | totals.keys(), 0.0)
    for name in norms:
        parts = [m.squares[name].sqrt() * scale for m in micro_batches if name in m.squares]
        norms[name] = float(torch.cat(parts).sum()) if parts else 0.0
    tolerance = max(1e-10, min(0.2, 1000 * eps))  # the two add in different orders
    for name, norm in norms.items():
        size = norm + 1e-3 * max(norms.values())
        distance = float((totals.get(name, zero) - plain.get(name, zero)).norm())
        if math.isfinite(size) and not distance <= tolerance * size:
            raise LedgerError(
                f"The gradient that the ledger has found for {name} differs from plain "
                f"autograd's by {distance:.3g}, whose norm is "
                f"{float(plain.get(name, zero).norm()):.3g}. They should agree. The ledger cannot "
                f"take an operation that uses {name} apart by example. Freeze the parameter, or "
                f"leave the model unobserved."
            )


def _pop_plain_gradients(tracker: ParameterTracker) -> dict[str, Tensor]:
    """Return the gradients that autograd has computed, by parameter, and clear them."""
    constants = tracker.constants or {}
    plain = {name: c.grad for name, c in constants.items() if c.grad is not None}
    for constant in constants.values():
        constant.grad = None
    for name in plain.keys() & tracker.derived.keys():
        d, tensor, roots = plain.pop(name), tracker.derived[name], sorted(tracker.roots[name])
        parameters = [tracker.parameters[root] for root in roots]
        gradients = torch.autograd.grad(tensor, parameters, d, retain_graph=True)
        for root, g in zip(roots, gradients, strict=True):
            plain[root] = plain[root] + g if root in plain else g
    return plain


def _find_loss_scale(roots: list[Any]) -> Tensor | float:
    """Return the factor by which a GradScaler has multiplied a loss or its terms."""
    todo = [root.grad_fn for root in roots if isinstance(root, Tensor)]
    for _ in range(_NUM_NODES):
        node: Any = todo.pop(0) if todo else None
        if node is None:
            continue
        if _SCALE in node.metadata:
            scale: Tensor = node.metadata[_SCALE]
            return scale
        todo += [parent for parent, _ in node.next_functions]
    return 1.0


def _list_outer_observers() -> list[BackwardObserver]:
    """List the observers of other models that are observed too, the nearest first."""
    watchers = [mode.watcher for mode in list_active_modes()[::-1]]
    return [w for w in watchers if isinstance(w, BackwardObserver)]


def _find_caller() -> str:
    """Return the module whose code makes the present call, other than the ledger and autograd."""
    internal = "anybatch.ledger.", "torch.overrides", "torch.autograd", "torch._tensor"
    frame, name = sys._getframe(1), ""
    while frame.f_back is not None and (not name or name.startswith(internal)):
        frame = frame.f_back
        name = str(frame.f_globals.get("__name__", ""))
    return name


def _second_pass_error(name: str) -> LedgerError:
    return LedgerError(
        f"A second backward pass has reached {name} through the same forward pass. Its examples "
        f"cannot be added to the first one's. Pass retain_graph=True to the first backward pass, "
        f"or add the losses and go backward once."
    )
