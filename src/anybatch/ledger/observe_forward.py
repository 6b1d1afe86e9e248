"""Forward passes in the user's own loop: which examples each call processes.

    calls  ->  micro-batches  ->  backward passes  ->  results of each example, in order

A module that is called with new inputs begins a micro-batch. A module that takes the output of
others continues theirs (`observe_micro_batches`). The plan of a call is found when a module is
first called like this (`observe_modules`), and confirmed on the real graph where it may be wrong
(`observe_checks`).
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from anybatch._torch import DisableTorchFunction, preserve_version_counter
from anybatch.errors import LedgerError
from anybatch.ledger.calibration import CHECKED_STEPS
from anybatch.ledger.contractions.calls import Make, Receive
from anybatch.ledger.contractions.placement import Placement, Plan, Site
from anybatch.ledger.intercept import Intercept, list_active_modes
from anybatch.ledger.observe_micro_batches import (
    MicroBatch,
    MicroBatchTracker,
    Output,
    Path,
    Target,
    Trail,
    add_hints,
    assign_rows,
    format_shapes,
    mark_output,
    refuse_unknown,
    trainable,
)
from anybatch.ledger.observe_modules import ModuleCall, ModuleHooks, list_tensors, plan_call
from anybatch.model_facts import find_record

__all__ = ["Arrival", "ForwardObserver", "OnArrival"]

_FIRST, _EVERY = 16, 256
"""Passes whose placements are confirmed without a reason: the first 16 on each path through a
model, then one in 256, which costs some 4 % of the time."""


class Arrival(NamedTuple):
    """A gradient that arrives at the ledger in a backward pass."""

    target: Target
    is_outside: bool  # of an operation outside of any module
    sites: list[Site]
    placement: Placement
    make: Make
    d: Tensor  # gradient of the output, or of the copies of a parameter


OnArrival = Callable[[Arrival], None]


@dataclass(slots=True)
class _History:
    """Facts that the loops over a model have found, for one dimension of the examples."""

    plan: Plan = field(default_factory=Plan)  # of operations outside of any module
    rows: dict[str, set[int]] = field(default_factory=dict)  # outputs with rows, by module
    num_passes: int = 0
    paths: Counter[Path] = field(default_factory=Counter)  # micro-batches on each path


class _Histories(dict[int, _History]):
    """Histories of a model, by the dimension of the examples."""


class ForwardObserver:
    """Follows micro-batches through calls of a model.

    Args:
        examples: B of each forward pass; None: the size of its first tensor.
        dim: the dimension of inputs along which examples lie; None: the first.
    """

    def __init__(self, model: nn.Module, examples: int | None, dim: int | None) -> None:
        self.parameters = trainable(model)
        self.micro_batches = MicroBatchTracker(examples, dim)
        self.dim = dim or 0
        self.history = find_record(model, _Histories).setdefault(self.dim, _History())
        self.hooks = ModuleHooks(model, self._begin, self._end)
        self.plans: dict[int, Plan] = {}
        """Plans of the open micro-batches, by id."""
        self.on_arrival: OnArrival | None = None
        """Takes the gradients of the backward pass that runs; None: there is none."""
        receive = self._make_receiver((), is_outside=True)
        self.mode = Intercept(self.parameters, 0, self.history.plan, receive)
        self.num_steps = 0
        self._model = model
        self._versions = self._read_versions()
        self._target: Target = ()
        self._is_due = False
        self._calls: dict[nn.Module | None, list[tuple[Target, Plan]]] = {}
        """Targets and plans of the calls of each module; None: operations outside of modules."""
        self._without_examples: dict[str, str] = {}
        """Modules that were called without examples, with the shapes of their inputs."""

    @property
    def is_unsure(self) -> bool:
        """True if placements may be wrong."""
        return self.mode.may_mix or any(plan.unconfirmed for plan in self.plans.values())

    def run_operation(self, operands: list[Tensor], run: Callable[[], Any]) -> Any:
        """Run an operation that takes parameters, inside or outside of modules."""
        is_recomputed = not self.mode.tracker.is_forward
        if self.hooks.is_inside or is_recomputed or not torch.is_grad_enabled():
            with self.add_hints():
                return run()
        self._refresh()
        target, trail = self.micro_batches.find_target(None, operands)
        if sum(m.size for m in target) > 1 and all(t.numel() == 1 for t in operands):
            raise LedgerError(
                "An operation takes a parameter and a loss of the whole batch, such as a penalty "
                "or a weight of the loss. Its gradient belongs to no example. Use weight_decay of "
                "the optimiser for a penalty; give each example its own loss before a parameter "
                "weighs it; or leave the model unobserved."
            )
        self._switch_to(None, target, trail, self.history.plan)
        with self.add_hints():
            result = run()
        self._add_outputs(list_tensors(result), None, is_outside=True)
        return result

    def resume_recomputation(self, module: nn.Module | None) -> None:
        """Switch to the examples of a forward pass that checkpointing repeats.

        Args:
            module: the module that is called again; None: an operation outside of modules.
        """
        every = [call for calls in self._calls.values() for call in calls]
        calls = every if module is None else self._calls.get(module, every)
        if calls:
            target, plan = calls[-1]
            receive: Receive = refuse_unknown
            if len(calls) == 1:
                receive = self._make_receiver(target, is_outside=module is None)
            self._set_target(target, plan, receive)
        elif module is not None and torch.is_grad_enabled():
            raise LedgerError(
                "A module was called in the backward pass alone, since its forward pass ran "
                "without gradients (checkpointing with use_reentrant=True). The ledger has not "
                "seen its examples. Use checkpointing with use_reentrant=False."
            )

    def add_hints(self) -> AbstractContextManager[None]:
        """Return a context that adds to errors how to name the examples."""
        size = sum(m.size for m in self._target)
        return add_hints(size, self.micro_batches.has_dim, self._without_examples)

    def close(self, micro_batches: Iterable[MicroBatch]) -> None:
        """Close micro-batches that have gone backward for the last time."""
        self.micro_batches.close(micro_batches)
        if not self.micro_batches.open:
            self.plans.clear()
            self._calls.clear()
            self._without_examples.clear()
            self.mode.reset(self.history.plan)

    def count_steps(self) -> int:
        """Return how often weights have changed: the number of steps of an optimizer."""
        versions = self._read_versions()
        self.num_steps += versions != self._versions
        self._versions = versions
        return self.num_steps

    def _begin(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Begin a call of a module from outside of the model."""
        if not self.mode.tracker.is_forward:
            self.resume_recomputation(module)
            return
        self.mode.is_paused = not torch.is_grad_enabled()
        if self.mode.is_paused:
            return
        self._refresh()
        inputs = list_tensors((args, kwargs))
        target, trail = self.micro_batches.find_target(module, inputs)
        size, plan = sum(micro_batch.size for micro_batch in target), Plan()
        if size > 1:
            plan = self._find_plan(ModuleCall(module, args, kwargs, size, self.dim))
        if not target:
            self._without_examples[self.hooks.names[module]] = format_shapes(inputs)
        for micro_batch in target:
            micro_batch.modules.add(module)
        self._switch_to(module, target, trail, plan)

    def _end(self, module: nn.Module, output: Any) -> None:
        """End a call of a module from outside of the model."""
        if not self.mode.tracker.is_forward:
            return
        if not self.mode.is_paused and output is not None:
            self.micro_batches.check_rows(self._target, list_tensors(output))
            rows = self.history.rows.get(self.hooks.names[module])
            self._add_outputs(list_tensors(output), rows, is_outside=False)
        self.mode.is_paused = False

    def _find_plan(self, call: ModuleCall) -> Plan:
        """Find the plan of a call, for which the library calls the module again."""
        mode = (*(module.training for module in call.module.modules()), self.dim)
        ids = {id(p) for p in call.module.parameters()}
        parameters = {name: p for name, p in self.parameters.items() if id(p) in ids}
        if not parameters:
            return self.history.plan
        with add_hints(call.size, self.micro_batches.has_dim, {}), self._pause():
            plan, rows = plan_call(call, mode, parameters)
        if rows is not None:
            self.history.rows[self.hooks.names[call.module]] = rows
        return plan

    @contextmanager
    def _pause(self) -> Iterator[None]:
        """Let the library call modules and go backward unobserved."""
        modes = [mode for mode in list_active_modes() if not mode.is_paused]
        for mode in modes:
            mode.is_paused = True
        self.hooks.is_paused = True
        # Calibration perturbs and restores the parameters: graphs that hold them stay valid.
        try:
            with preserve_version_counter(tuple(self.parameters.values())):
                yield
        finally:
            for mode in modes:
                mode.is_paused = False
            self.hooks.is_paused = False

    def _switch_to(
        self, module: nn.Module | None, target: Target, trail: Trail, plan: Plan
    ) -> None:
        """Process the examples of a target next, in an operation or a call of a module."""
        self._target = target
        self._calls.setdefault(module, []).append((target, plan))
        self._set_target(target, plan, self._make_receiver(target, is_outside=module is None))
        self.plans[id(plan)] = plan
        name = "an operation" if module is None else self.hooks.names[module]
        for micro_batch in target or self.micro_batches.open[-1:]:
            micro_batch.root.calls.append(name if target else f"{name}, without examples")
        if target:
            # Micro-batches that were stacked can be in any order.
            self._is_due = self._must_confirm(target[0], (name, trail)) or len(target) > 1

    def _must_confirm(self, micro_batch: MicroBatch, step: tuple[str, Trail]) -> bool:
        """Return whether to confirm placements on the path that a micro-batch takes by a step."""
        path = frozenset({*micro_batch.path, step})
        if path not in micro_batch.checks:
            self.history.paths[path] += 1
            count = self.history.paths[path]
            micro_batch.checks[path] = count <= _FIRST or count % _EVERY == 0
        micro_batch.path = path
        return micro_batch.checks[path]

    def _set_target(self, target: Target, plan: Plan, receive: Receive) -> None:
        uses = target[0].uses if len(target) == 1 else {}
        self.mode.switch_to(sum(m.size for m in target), plan, receive, uses)

    def _make_receiver(self, target: Target, *, is_outside: bool) -> Receive:
        """Return a function that takes the gradients of a target."""

        def receive(sites: list[Site], placement: Placement, make: Make, d: Tensor) -> None:
            site = sites[0]
            if not target:
                refuse_unknown(sites)
            if self.on_arrival is None:
                raise LedgerError(
                    f"A backward pass has reached {site.parameter} without the ledger. Call "
                    f"loss.backward() within 'with ab.observe(model):', where the forward pass "
                    f"was made. ab.batch_gradient has a ledger of its own: observe=ab.Observe()."
                )
            with DisableTorchFunction():  # no parameters in what follows
                placement = assign_rows(site, placement, sum(m.size for m in target), d)
                self.on_arrival(Arrival(target, is_outside, sites, placement, make, d))

        return receive

    def _add_outputs(
        self, outputs: list[Tensor], rows: set[int] | None, *, is_outside: bool
    ) -> None:
        """Mark the outputs of a call, and store those from which placements are confirmed."""
        target = self._target
        for number, output in enumerate(outputs):
            if output.grad_fn is None or not target:
                continue
            mark_output(output, target, self.micro_batches.key)
            if (self._is_due or self.is_unsure) and (rows is None or number in rows):
                target[0].outputs.append(Output.from_tensor(output, target, is_outside))

    def _refresh(self) -> None:
        """Close forward passes that used other weights."""
        before = self.num_steps
        if self.count_steps() > before:
            self.micro_batches.close_all()
        if not self.micro_batches.open:
            self._check_parameters()
            self.history.num_passes += 1
            is_checked = self.history.num_passes in CHECKED_STEPS
            self.mode.tracker.constants = {} if is_checked else None

    def _check_parameters(self) -> None:
        """Check that the trainable parameters are the same as at the beginning."""
        now = {id(p): name for name, p in trainable(self._model).items()}
        before = {id(p): name for name, p in self.parameters.items()}
        if now.keys() != before.keys():
            names = sorted({*now.values()} ^ {*before.values()}) or sorted(now.values())
            raise LedgerError(
                f"The parameters that require gradients have changed within ab.observe: "
                f"{', '.join(names[:3])}. The ledger watches those with which it began. Begin a "
                f"new 'with ab.observe(model):' after a parameter is frozen, unfrozen or replaced."
            )

    def _read_versions(self) -> list[int]:
        return [p._version for p in self.parameters.values()]
