"""Backward passes in a loop of one's own: figures of each example, and `.grad` as ever.

    .grad += sum_i g_i,      |g_i| of all examples since `.grad` was cleared or a weight changed

At the 1st, 10th, 100th, ... forward pass plain autograd computes the gradients as well, and each
parameter's must agree with the ledger's sum.
"""

import inspect
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any, NamedTuple, final

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointError

from anybatch._torch import tree_leaves
from anybatch.errors import LedgerError
from anybatch.ledger.active_modes import active_modes
from anybatch.ledger.collect import Collector
from anybatch.ledger.composites import WAYS_BACK, body
from anybatch.ledger.contractions.base import Contraction
from anybatch.ledger.contractions.made import Made
from anybatch.ledger.loop import Arrival, Arrived, Loop
from anybatch.ledger.loop_confirmation import confirm
from anybatch.ledger.loss_rows import refuse_other_dimension
from anybatch.ledger.micro_batches import MicroBatch, find_sources
from anybatch.ledger.observer import add_to_grad, missed_refused

__all__ = ["BackwardPasses"]

Run = Callable[[], Any]
_SCALE = "anybatch loss scale"
_NEAR = 32
"""Nodes of the graph behind a loss among which one that a GradScaler has made is looked for."""


class _Request(NamedTuple):
    """A backward pass that the user has begun."""

    roots: list[Any]
    retains: bool  # the graph
    is_partial: bool  # it leads to chosen tensors, and leaves parameters alone
    is_librarys: bool  # begun by ab.batch_gradient


@final
class BackwardPasses:
    """The backward half of a loop: takes the calls that begin a backward pass.

    Args:
        loop: the forward half.
    """

    def __init__(self, loop: Loop) -> None:
        self.entries: list[MicroBatch] = []
        """The micro-batches whose gradients are in `.grad`, in the order of forward passes."""
        self._loop = loop
        self._num_passes = 0
        self._has_failed = False
        """Whether an error was raised, which says more than that nothing was observed."""
        self._left: tuple[int, dict[str, tuple[Tensor, int]]] | None = None
        self._eps = 0.0
        loop.mode.watcher = self

    def met(self, operands: list[Tensor], run: Run) -> Any:
        """Run an operation that takes parameters."""
        return self._loop.met(operands, run)

    def is_watched(self, func: Any) -> bool:
        """Whether calls of a function are handed over."""
        if func is torch.Tensor.mul:
            return _caller() == "torch.amp.grad_scaler"
        return func is torch.autograd.grad or func in WAYS_BACK

    def called(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run a call that begins a backward pass, or that scales the loss of one."""
        if func is torch.Tensor.mul:
            result = func(*args, **kwargs)
            node: Any = result.grad_fn
            if node is not None:
                node.metadata[_SCALE] = args[1]
            return result
        mode = self._loop.mode
        if not mode.is_forward:  # a backward pass calls another one
            with mode:
                return body(func)(*args, **kwargs)
        request = self._request(func, args, kwargs)
        everyone = [self, *_outer_passes()]
        run: Run = partial(body(func), *args, **kwargs)
        if request.is_partial:
            for passes in everyone:
                run = partial(passes.go_past, run, request)
            return run()
        with ExitStack() as stack:
            for passes in everyone:
                stack.enter_context(passes.arriving(_ignore))
            for passes in everyone:
                passes.prepare(request)
        for passes in everyone:
            run = partial(passes.go_back, run, request)
        return run()

    def prepare(self, request: _Request) -> None:
        """Confirm where examples lie, before any gradient is added to `.grad`."""
        self._num_passes += 1
        with self._failures():
            roots = [root for root in request.roots if isinstance(root, Tensor)]
            reached, _ = find_sources(roots, self._loop.key)
            confirm(self._loop, reached, self.arriving)
            if not self._loop.is_dim_given:
                for root in roots:
                    refuse_other_dimension(root, self._loop.key)

    def go_past(self, run: Run, request: _Request) -> Any:
        """Let a pass run that leaves parameters alone; its graph is gone then."""
        reached: set[MicroBatch] = set()
        with self.arriving(lambda arrived: reached.update(m.root for m in arrived.target)):
            result = run()
        for micro_batch in () if request.retains else reached:
            micro_batch.outputs.clear()
        return result

    def go_back(self, run: Run, request: _Request) -> Any:
        """Let a backward pass run, and take what it brings."""
        with self._failures():
            return self._collect(run, request)

    @contextmanager
    def _failures(self) -> Iterator[None]:
        try:
            yield
        except CheckpointError as error:
            self._has_failed = True
            raise LedgerError(
                f"activation checkpointing could not repeat a forward pass: {error}. The ledger "
                f"follows it in one forward pass before each backward pass. Go backward after each "
                f"forward pass."
            ) from error
        except LedgerError:
            self._has_failed = True
            raise

    def finish(self) -> None:
        """See that something was observed.

        Raises:
            LedgerError: nothing was, though a backward pass was made.
        """
        if self._num_passes and self._left is None and not self._has_failed:
            raise LedgerError(
                "nothing was observed: no backward pass has reached a parameter of the model. The "
                "forward pass must be made within 'with ab.observe(model):', with the model that "
                "is observed and not with a copy of it."
            )

    def _request(self, func: Any, args: Any, kwargs: Any) -> _Request:
        given = inspect.signature(func).bind(*args, **kwargs).arguments
        inputs = tree_leaves(given.get("inputs"))
        if any(id(x) in self._loop.mode.names for x in inputs):
            raise LedgerError(
                f"{func.__name__}(..., inputs=...) names parameters of the observed model. The "
                f"ledger sees passes that reach all parameters. Call loss.backward(), and read "
                f"their .grad, or leave the model unobserved."
            )
        roots = next(iter(given.values()))
        retains = bool(given.get("retain_graph") or given.get("create_graph"))
        is_partial = func is torch.autograd.grad or given.get("inputs") is not None
        is_librarys = _caller().startswith("anybatch.gradient")
        return _Request(tree_leaves(roots), retains, is_partial, is_librarys)

    def _collect(self, run: Run, request: _Request) -> Any:
        loop = self._loop
        self._eps = 0.0
        self._start_anew()
        loop.turn_back(None)
        for constant in (loop.mode.constants or {}).values():
            constant.grad = None
        active: dict[MicroBatch, Collector] = {}
        with (
            loop.hint(),
            missed_refused(loop.parameters),
            self.arriving(partial(self._arrive, active, request)),
        ):
            result = run()
        scale = _loss_scale(request.roots)
        totals = self._settle(active, scale)
        if loop.mode.constants is not None:
            self._compare(totals, active, scale)
        add_to_grad(loop.parameters, totals)
        if active:
            self.entries = sorted({*self.entries, *active}, key=lambda m: m.number)
            grads = {n: p.grad for n, p in loop.parameters.items() if p.grad is not None}
            self._left = loop.count_steps(), {n: (g, g._version) for n, g in grads.items()}
        if not request.retains:
            loop.close(active)
        return result

    @contextmanager
    def arriving(self, arrival: Arrival) -> Iterator[None]:
        """Hand gradients that arrive to a receiver; checkpointing is seen to run forward again."""
        loop, mode = self._loop, self._loop.mode
        before = loop.arrival, mode.is_forward
        loop.arrival, mode.is_forward = arrival, False
        try:
            with nullcontext() if mode in active_modes() else mode:
                yield
        finally:
            loop.arrival, mode.is_forward = before

    def _arrive(
        self, active: dict[MicroBatch, Collector], request: _Request, arrived: Arrived
    ) -> None:
        if request.is_librarys:
            raise LedgerError(
                "ab.batch_gradient was called within ab.observe(model), which is for loops that "
                "call loss.backward() themselves. Leave ab.observe away, and ask for "
                "ab.batch_gradient(..., observe=ab.Observe())."
            )
        self._eps = max(self._eps, torch.finfo(arrived.d.dtype).eps)
        target, name, mode = arrived.target, arrived.meeting.parameter, self._loop.mode
        is_late = request.retains or name in mode.derived or name in mode.made_into
        for micro_batch in {m.root for m in target}:
            if micro_batch not in active:
                active[micro_batch] = Collector(
                    None, keep=request.retains, whole=False, earlier=micro_batch.kept
                )
        if len(target) == 1:
            own = target[0].root
            is_known = own.is_counted and not is_late
            active[own].arrive(name, arrived.make, own.uses.get(name) if is_known else None)
            return
        whole, start = arrived.make(), 0
        for micro_batch in target:
            part = whole.take(start, start + micro_batch.size)
            active[micro_batch.root].arrive(name, partial(_itself, part), None)
            start += micro_batch.size

    def _settle(
        self, active: Mapping[MicroBatch, Collector], scale: Tensor | float
    ) -> dict[str, Tensor]:
        """Figures of the micro-batches, and sum_i g_i of each parameter."""
        loop = self._loop
        totals: dict[str, Tensor] = {}
        for micro_batch, collector in active.items():
            self._trace_to_parameters(collector)
            collector.keep |= collector.expects_more(micro_batch.uses)
            found = collector.finish()
            for name, square in found.squares.items():
                if name in micro_batch.squares and name not in micro_batch.kept:
                    raise _gone_through_twice(name)
                micro_batch.squares[name] = square / scale**2
            for name, uses in found.uses.items():
                micro_batch.kept[name] = [*micro_batch.kept.get(name, []), *uses]
            for name, total in found.totals.items():
                if name not in loop.parameters:
                    raise _gone_through_twice(name)
                totals[name] = totals[name] + total if name in totals else total
        return totals

    def _trace_to_parameters(self, collector: Collector) -> None:
        """Turn gradients of what was made of parameters into gradients of those."""
        mode, parameters = self._loop.mode, self._loop.parameters
        for name, made in mode.derived.items():
            for use in collector.take(name):
                for root in mode.roots[name]:
                    collector.arrive(root, partial(Made, parameters[root], made, use), None)

    def _compare(
        self,
        totals: Mapping[str, Tensor],
        active: Mapping[MicroBatch, Collector],
        scale: Tensor | float,
    ) -> None:
        """See that the sums are plain autograd's own gradients.

        Raises:
            LedgerError: a parameter whose gradients differ.
        """
        plain = self._plain_gradients()
        zero = torch.zeros(())
        parts = dict.fromkeys(plain.keys() | totals.keys(), 0.0)
        for name in parts:
            own = [m.squares[name].sqrt() * scale for m in active if name in m.squares]
            parts[name] = float(torch.cat(own).sum()) if own else 0.0
        bound = max(1e-10, min(0.2, 1000 * self._eps))  # sums are taken in another order
        for name, part in parts.items():
            whole = part + 1e-3 * max(parts.values())
            difference = totals.get(name, zero) - plain.get(name, zero)
            distance = float(difference.norm())
            if math.isfinite(whole) and not distance <= bound * whole:
                norm = float(plain.get(name, zero).norm())
                raise LedgerError(
                    f"the gradient that the ledger has found for {name} differs from plain "
                    f"autograd's by {distance:.3g}; the norm of that is {norm:.3g}. They should "
                    f"agree. An operation that uses {name} cannot be taken apart by example: "
                    f"freeze the parameter, or leave the model unobserved."
                )

    def _plain_gradients(self) -> dict[str, Tensor]:
        """Those that autograd has computed itself, by parameter."""
        mode, parameters = self._loop.mode, self._loop.parameters
        constants = mode.constants or {}
        plain = {name: c.grad for name, c in constants.items() if c.grad is not None}
        for constant in constants.values():
            constant.grad = None
        for name in plain.keys() & mode.derived.keys():
            d, made, roots = plain.pop(name), mode.derived[name], sorted(mode.roots[name])
            found = torch.autograd.grad(made, [parameters[r] for r in roots], d, retain_graph=True)
            for root, own in zip(roots, found, strict=True):
                plain[root] = plain[root] + own if root in plain else own
        return plain

    def _start_anew(self) -> None:
        """Forget figures whose gradients are not in `.grad` any more."""
        if self._left is None:
            return
        num_steps, left = self._left
        parameters = self._loop.parameters
        is_cleared = any(_is_cleared(parameters[name].grad, *state) for name, state in left.items())
        if is_cleared or num_steps != self._loop.count_steps():
            for micro_batch in self.entries:
                micro_batch.forget()
            self.entries = []


def _loss_scale(roots: list[Any]) -> Tensor | float:
    """The factor by which a GradScaler has multiplied a loss, or the terms of it."""
    todo = [root.grad_fn for root in roots if isinstance(root, Tensor)]
    for _ in range(_NEAR):
        node: Any = todo.pop(0) if todo else None
        if node is None:
            continue
        if _SCALE in node.metadata:
            scale: Tensor = node.metadata[_SCALE]
            return scale
        todo += [parent for parent, _ in node.next_functions]
    return 1.0


def _is_cleared(grad: Tensor | None, left: Tensor, version: int) -> bool:
    """Whether a gradient was taken away or set to 0 since the last backward pass."""
    if grad is left and grad._version == version:
        return False
    return grad is None or not bool(grad.any())


def _ignore(*_: Any) -> None:
    """Take no notice of a gradient."""


def _itself(part: Contraction) -> Contraction:
    return part


def _outer_passes() -> list[BackwardPasses]:
    """Those of other models that are observed at the same time, the nearest first."""
    watchers = [m.watcher for m in active_modes()[::-1]]
    return [w for w in watchers if isinstance(w, BackwardPasses)]


def _caller() -> str:
    """The module whose code has made the present call, other than the ledger's and autograd's."""
    passed_on = "anybatch.ledger.", "torch.overrides", "torch.autograd", "torch._tensor"
    frame, name = sys._getframe(1), ""
    while frame.f_back is not None and (not name or name.startswith(passed_on)):
        frame = frame.f_back
        name = str(frame.f_globals.get("__name__", ""))
    return name


def _gone_through_twice(name: str) -> LedgerError:
    return LedgerError(
        f"a second backward pass has reached {name} through the same forward pass. Its examples "
        f"cannot be added to the first one's. Pass retain_graph=True to the first backward pass, "
        f"or add the losses and go backward once."
    )
