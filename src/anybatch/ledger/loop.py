"""A loop of one's own under the ledger's eyes: which examples a forward pass belongs to.

    forward calls  ->  micro-batches  ->  backward passes  ->  figures of each example, in order

A module that is called with inputs of its own begins a micro-batch; one that takes in what others
have made goes on with theirs (`micro_batches`). Its plan is found when it is first called in this
way (`call_plans`), and confirmed on the real graph where a plan may not hold (`confirmation`).
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any, NamedTuple, final
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from anybatch._torch import DisableTorchFunction, preserve_version_counter
from anybatch.errors import LedgerError
from anybatch.ledger.active_modes import active_modes
from anybatch.ledger.call_plans import Call, count_rows, plan_call, tensors_of
from anybatch.ledger.contractions.base import Contraction
from anybatch.ledger.hints import hinted
from anybatch.ledger.intercept import Intercept, Meeting, Plan, Receive
from anybatch.ledger.micro_batches import (
    MicroBatch,
    Output,
    Trail,
    find_sources,
    join,
    mark,
    own_rows,
    refuse_unknown,
    trainable,
)
from anybatch.ledger.module_calls import ModuleCalls
from anybatch.ledger.placement import Placement
from anybatch.ledger.plans import CHECKED

__all__ = ["Arrival", "Arrived", "History", "Loop"]

_FIRST, _EVERY = 16, 256
"""Passes whose placements are confirmed though nothing speaks for it: the first ones of each way
through a model, then one in 256, which costs some 4 % of the time."""
Target = tuple[MicroBatch, ...]


class Arrived(NamedTuple):
    """A gradient that a backward pass has brought to the ledger."""

    target: Target
    is_outside: bool  # of an operation outside of any module
    meeting: Meeting
    placement: Placement
    make: Callable[[], Contraction]
    d: Tensor  # of the output, or of the copies of a parameter


Arrival = Callable[[Arrived], None]


@final
class History:
    """What the loops over a model have shown so far."""

    def __init__(self) -> None:
        self.plan = Plan()
        """Of operations outside of any module."""
        self.rows: dict[str, set[int]] = {}
        """Which outputs of a module have a row for each example, apart from the others."""
        self.num_passes = 0
        self.ways: Counter[frozenset[Any]] = Counter()
        """How often a micro-batch has passed through these modules, with these operations of
        autograd between them."""


_histories: WeakKeyDictionary[nn.Module, dict[int, History]] = WeakKeyDictionary()
"""By the dimension of examples."""


class Loop:
    """The forward half: follows micro-batches through calls of a model.

    Args:
        model: what is observed.
        examples: B of each forward pass; None: read off its first tensor.
        dim: the dimension of inputs along which examples lie; None: the first.
    """

    def __init__(
        self,
        model: nn.Module,
        examples: int | None,
        dim: int | None,
    ) -> None:
        self.parameters = parameters = trainable(model)
        self._model = model
        self.history = _histories.setdefault(model, {}).setdefault(dim or 0, History())
        self.calls = ModuleCalls(model, self._begin, self._end)
        self.open: list[MicroBatch] = []
        """Micro-batches that have not gone backward for the last time."""
        self.arrival: Arrival | None = None
        """Takes gradients as they arrive; None: no backward pass is under way."""
        self.plans: dict[int, Plan] = {}
        """Those of the open micro-batches."""
        self.mode = Intercept(parameters, 0, self.history.plan, self._receiver((), is_outside=True))
        self._examples = examples
        self.dim = dim or 0
        """Of inputs and outputs, along which examples lie."""
        self.is_dim_given = dim is not None
        self.key = object()
        """Under which outputs are marked on the graph."""
        self._count = 0
        self.num_steps = 0
        self._known_versions = self._versions()
        self._target: Target = ()
        self._is_due = False
        self._turns: dict[nn.Module | None, list[tuple[Target, Plan]]] = {}
        """What was called with which micro-batches; None: operations outside of modules."""
        self._without_examples: dict[str, str] = {}
        """Names of modules that were called without examples, and the shapes of their inputs."""

    def met(self, operands: list[Tensor], run: Callable[[], Any]) -> Any:
        """Run an operation that takes parameters, within a module or outside of any."""
        if self.calls.is_inside or not self.mode.is_forward or not torch.is_grad_enabled():
            with self.hint():
                return run()
        self._refresh()
        target, trail = self._find_target(None, operands)
        if sum(m.size for m in target) > 1 and all(t.numel() == 1 for t in operands):
            raise LedgerError(
                "an operation takes a parameter and a loss of the whole batch, such as a penalty "
                "or a weight of the loss. Its gradient belongs to no example. Use weight_decay of "
                "the optimiser for a penalty; give each example its own loss before a parameter "
                "weighs it; or leave the model unobserved."
            )
        self._turn(None, target, trail, self.history.plan)
        with self.hint():
            result = run()
        self._note(tensors_of(result), None, is_outside=True)
        return result

    def _begin(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """A module is called from outside of the model."""
        if not self.mode.is_forward:
            self.turn_back(module)
            return
        self.mode.is_paused = not torch.is_grad_enabled()
        if self.mode.is_paused:
            return
        self._refresh()
        inputs = tensors_of((args, kwargs))
        target, trail = self._find_target(module, inputs)
        size, plan = sum(micro_batch.size for micro_batch in target), Plan()
        if size > 1:
            plan = self._plan(Call(module, args, kwargs, size, self.dim))
        if not target:
            shapes = ", ".join(str(tuple(t.shape)) for t in inputs)
            self._without_examples[self.calls.names[module]] = shapes
        for micro_batch in target:
            micro_batch.modules.add(module)
        self._turn(module, target, trail, plan)

    def _check_rows(self, outputs: list[Tensor]) -> None:
        """See that it is not another input than the first one whose rows are the examples."""
        own = self._target[0] if len(self._target) == 1 else None
        if own is None or self.is_dim_given or self._examples or len(own.calls) != 1:
            return
        rows = {t.shape[0] for t in outputs if t.grad_fn is not None and t.ndim}
        others = rows & {shape[0] for shape in own.inputs if shape}
        if others and own.size not in rows:
            raise LedgerError(
                f"the first tensor that a module was called with has {own.size} rows, but its "
                f"outputs have {min(others)}, as another input does. The ledger cannot tell which "
                f"of them are examples. Say so: ab.observe(model, examples={min(others)}, dim=0)."
            )

    def _end(self, module: nn.Module, output: Any) -> None:
        if not self.mode.is_forward:
            return
        if not self.mode.is_paused and output is not None:
            self._check_rows(tensors_of(output))
            rows = self.history.rows.get(self.calls.names[module])
            self._note(tensors_of(output), rows, is_outside=False)
        self.mode.is_paused = False

    def _plan(self, call: Call) -> Plan:
        """The plan of a call, which the module is called for as often as it takes."""
        mode = (*(module.training for module in call.module.modules()), self.dim)
        own = {id(p) for p in call.module.parameters()}
        parameters = {name: p for name, p in self.parameters.items() if id(p) in own}
        if not parameters:
            return self.history.plan
        with hinted(call.size, self.is_dim_given, {}), self._unobserved():
            plan, rows = plan_call(call, mode, parameters)
        if rows is not None:
            self.history.rows[self.calls.names[call.module]] = rows
        return plan

    @contextmanager
    def _unobserved(self) -> Iterator[None]:
        """Let the library call modules and go backward by itself."""
        modes = [mode for mode in active_modes() if not mode.is_paused]
        for mode in modes:
            mode.is_paused = True
        self.calls.is_ignored = True
        moved = tuple(self.parameters.values())  # and put back: graphs that hold them stay valid
        try:
            with preserve_version_counter(moved):
                yield
        finally:
            for mode in modes:
                mode.is_paused = False
            self.calls.is_ignored = False

    def _find_target(self, module: nn.Module | None, inputs: list[Tensor]) -> tuple[Target, Trail]:
        """The micro-batches that a call belongs to, and how its inputs were made from theirs."""
        sizes = [count_rows(t, self.dim) for t in inputs]
        rows = next((size for size in sizes if size is not None), None)
        sources, trail = find_sources(inputs, self.key) if self.open else ([], frozenset())
        if len(sources) > 1:
            return join(sources, rows), trail
        if sources:
            self._check_first(sources[0].size, inputs)
        return tuple(sources) or self._begin_or_go_on(module, inputs, sizes, rows), trail

    def _check_first(self, size: int, inputs: list[Tensor]) -> None:
        """See that examples are the first dimension of what other calls have made, or its rows."""
        lengths = [len(t) for t in inputs if t.ndim]
        if self.is_dim_given or self._examples or size in (1, *lengths) or not lengths:
            return
        is_elsewhere = any(size in t.shape[1:-1] for t in inputs)
        if is_elsewhere or all(length % size for length in lengths):
            shapes = ", ".join(str(tuple(t.shape)) for t in inputs)
            raise LedgerError(
                f"a call takes in what was made of {size} rows by an earlier call, as tensors of "
                f"shapes {shapes}. The ledger cannot tell whether those {size} rows are the "
                f"examples. Say how many examples there are: ab.observe(model, examples=B); or "
                f"along which dimension: ab.observe(model, dim=1)."
            )

    def _begin_or_go_on(
        self,
        module: nn.Module | None,
        inputs: list[Tensor],
        sizes: list[int | None],
        rows: int | None,
    ) -> Target:
        """The micro-batch of inputs that no other call has made; none: they hold no examples."""
        last = self.open[-1].root if self.open else None
        if last is not None and not last.squares and module not in last.modules:
            return (last,) if last.size in sizes else ()
        if self._examples and rows and all(n is None or n % self._examples for n in sizes):
            return ()
        size = self._examples or rows
        if size is None:
            raise LedgerError(
                f"a call was given no tensor with a dimension {self.dim}, along which the "
                f"examples are expected. Give the model its examples as tensors, or say how many "
                f"there are and along which dimension: ab.observe(model, examples=B, dim=1)."
            )
        self._count += 1
        self.open.append(MicroBatch(self._count, size, [t.shape for t in inputs]))
        return (self.open[-1],)

    def _turn(self, module: nn.Module | None, target: Target, trail: Trail, plan: Plan) -> None:
        """Let what follows belong to a target: an operation, or a call of a module."""
        self._target = target
        self._turns.setdefault(module, []).append((target, plan))
        self._set(target, plan, self._receiver(target, module is None))
        self.plans[id(plan)] = plan
        name = "an operation" if module is None else self.calls.names[module]
        for micro_batch in target or self.open[-1:]:
            micro_batch.root.calls.append(name if target else f"{name}, without examples")
        if target:
            # What was stacked may be so in any order.
            self._is_due = self._is_new_way(target[0], (name, trail)) or len(target) > 1

    def _is_new_way(self, micro_batch: MicroBatch, step: tuple[str, Trail]) -> bool:
        """Whether a micro-batch goes a way through several calls that is to be confirmed."""
        way = frozenset({*micro_batch.way, step})
        if way not in micro_batch.checks:
            self.history.ways[way] += 1
            count = self.history.ways[way]
            micro_batch.checks[way] = count <= _FIRST or count % _EVERY == 0
        micro_batch.way = way
        return micro_batch.checks[way]

    def _set(self, target: Target, plan: Plan, receive: Receive) -> None:
        uses = target[0].uses if len(target) == 1 else {}
        self.mode.turn_to(sum(m.size for m in target), plan, receive, uses)

    def turn_back(self, module: nn.Module | None) -> None:
        """Checkpointing runs forward again, of a module, or of something else: which examples?"""
        everything = [turn for turns in self._turns.values() for turn in turns]
        turns = everything if module is None else self._turns.get(module, everything)
        if turns:
            target, plan = turns[-1]
            receive = self._receiver(target, module is None)
            self._set(target, plan, receive if len(turns) == 1 else refuse_unknown)
        elif module is not None and torch.is_grad_enabled():
            raise LedgerError(
                "a module was called in the backward pass alone, since its forward pass ran "
                "without gradients (checkpointing with use_reentrant=True). The ledger has not "
                "seen its examples. Use checkpointing with use_reentrant=False."
            )

    def hint(self) -> AbstractContextManager[None]:
        """Let a refusal say how to name the examples."""
        size = sum(m.size for m in self._target)
        return hinted(size, self.is_dim_given, self._without_examples)

    def _receiver(self, target: Target, is_outside: bool) -> Receive:
        def receive(
            meeting: Meeting, placement: Placement, make: Callable[[Placement], Any], d: Tensor
        ) -> None:
            if not target:
                refuse_unknown(meeting)
            if self.arrival is None:
                raise LedgerError(
                    f"a backward pass has reached {meeting.parameter} without the ledger. Call "
                    f"loss.backward() within 'with ab.observe(model):', in which the forward pass "
                    f"was made. ab.batch_gradient has a ledger of its own: observe=ab.Observe()."
                )
            with DisableTorchFunction():  # what is made of gradients meets no parameter
                place = own_rows(meeting, placement, sum(m.size for m in target), d)
                self.arrival(Arrived(target, is_outside, meeting, place, partial(make, place), d))

        return receive

    def _note(self, outputs: list[Tensor], rows: set[int] | None, *, is_outside: bool) -> None:
        """Mark the outputs of a call, and keep those from which placements are confirmed."""
        target = self._target
        for number, output in enumerate(outputs):
            if output.grad_fn is None or not target:
                continue
            mark(output, target, self.key)
            if (self._is_due or self.is_unsure) and (rows is None or number in rows):
                target[0].outputs.append(Output.of(output, target, is_outside))

    @property
    def is_unsure(self) -> bool:
        """Whether placements may not hold."""
        return self.mode.may_mix or any(p.unsure for p in self.plans.values())

    def close(self, reached: Iterable[MicroBatch]) -> None:
        """Forget forward passes that have gone backward for the last time."""
        closed = set(reached)
        for micro_batch in closed:
            micro_batch.outputs.clear()
        self.open = [m for m in self.open if m.root not in closed]
        if not self.open:
            self.plans.clear()
            self._turns.clear()
            self._without_examples.clear()
            self.mode.begin(0, self.history.plan)

    def forget(self) -> None:
        """Drop all open micro-batches, and the graphs that they hold."""
        for micro_batch in self.open:
            micro_batch.outputs.clear()
        self.open.clear()

    def _refresh(self) -> None:
        """Forget forward passes that were made with other weights."""
        before = self.num_steps
        if self.count_steps() > before:
            self.forget()
        if not self.open:
            self._check_parameters()
            self.history.num_passes += 1
            is_checked = self.history.num_passes in CHECKED
            self.mode.constants = {} if is_checked else None

    def _check_parameters(self) -> None:
        """See that the trainable parameters are those with which the context began."""
        now = {id(p): name for name, p in trainable(self._model).items()}
        known = {id(p): name for name, p in self.parameters.items()}
        changed = sorted({*now.values()} ^ {*known.values()}) or sorted(now.values())
        if now.keys() != known.keys():
            raise LedgerError(
                f"the parameters that require gradients have changed within ab.observe: "
                f"{', '.join(changed[:3])}. The ledger watches those with which it began. Begin a "
                f"new 'with ab.observe(model):' after a parameter is frozen, unfrozen or replaced."
            )

    def count_steps(self) -> int:
        """How often weights have changed: how many steps an optimiser has taken."""
        versions = self._versions()
        self.num_steps += versions != self._known_versions
        self._known_versions = versions
        return self.num_steps

    def _versions(self) -> list[int]:
        return [p._version for p in self.parameters.values()]
