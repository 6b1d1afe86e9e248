"""One forward and backward pass under the ledger's eyes.

    forward, watched  ->  backward of sum_i v_i  ->  sums and figures of each example, by parameter

The sums are put where autograd would have put them, in `.grad`; what autograd itself has put there
has gone past the ledger, and is refused by name.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from anybatch._torch import DisableTorchFunction, run_backward
from anybatch.errors import LedgerError
from anybatch.ledger.collect import Collected, Collector
from anybatch.ledger.confirmation import gradients_kept, rows_are_in_place
from anybatch.ledger.contractions.base import Contraction
from anybatch.ledger.contractions.made import Made
from anybatch.ledger.intercept import Intercept, Meeting, Plan
from anybatch.ledger.placement import Placement, agrees
from anybatch.ledger.rows import Owners, halves
from anybatch.ledger.scales import DoubtError, Scales
from anybatch.ledger.traces import remember
from anybatch.ledger.unplaced import UnplacedError

__all__ = ["Pass", "add_to_grad", "go_back_and_keep", "misplaced", "missed_refused"]

_FIRST_STEPS, _EVERY = 16, 32
"""Steps that are confirmed though no call may have moved rows: all of the first, then one in 32,
which costs 2 % of the time."""

Make = Callable[[Placement], Contraction]


class Pass:
    """A forward pass to be watched, `with one.mode:`, and the backward pass through it.

    Args:
        parameters: the trainable ones, by name.
        num_examples: B.
        plan: where examples lie.
        roots: objects that hooks of the user's may change in a backward pass.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        num_examples: int,
        plan: Plan,
        roots: Iterable[object] = (),
    ) -> None:
        self._parameters, self._roots = parameters, roots
        self._size, self.plan = num_examples, plan
        self._deliver: Callable[..., None] | None = None
        self._owners: Owners | None = None
        self._scales: Scales | None = None
        self.mode = Intercept(parameters, num_examples, plan, self._receive)

    def backward(
        self,
        values: Sequence[Tensor],
        gradients: Sequence[Tensor],
        **others: Any,
    ) -> Collected:
        """Go back from the values, and add sum_i c_i g_i to what is in `.grad`.

        Args:
            values: what the model yields, with a graph.
            gradients: what they are weighed with on the way back, 1 for each example.
            others: see `collected`.
        """
        if self._size > 1 and self.plan.has_rows and not self.plan.unsure:
            self._scales = self._scaled(values, gradients)
            try:
                return self.go_back(values, gradients, keeps_graph=True, **others)
            except DoubtError:
                self._confirm(values, gradients)
            finally:
                self._scales = None
        elif self._size > 1:
            self._confirm(values, gradients)
        return self.go_back(values, gradients, **others)

    def go_back(
        self,
        values: Sequence[Tensor],
        gradients: Sequence[Tensor],
        *,
        keeps_graph: bool = False,
        **others: Any,
    ) -> Collected:
        """Do the same, the placements being known to be right."""
        return self.collected(
            lambda: run_backward(
                tuple(values), tuple(gradients), keeps_graph, False, (), True, True
            ),
            **others,
        )

    def collected(
        self,
        run: Callable[[], object],
        *,
        weights: Tensor | None = None,
        weigh: Callable[[Tensor], Tensor] | None = None,
        keep: bool = False,
        whole: bool = False,
    ) -> Collected:
        """Let a backward pass run, and add sum_i c_i g_i to what is in `.grad`.

        Args:
            run: the backward pass.
            weights: c [B], with which gradients are added up; None: 1 each.
            weigh: c from sum |g_i|^2 [B], where they are not known before.
            keep: whether uses are kept, for a second look.
            whole: whether each example's gradient is kept.

        Raises:
            LedgerError: a gradient that has gone past the ledger.
        """
        collector, mode = Collector(weights, weigh, keep=keep, whole=whole), self.mode

        def deliver(meeting: Meeting, placement: Placement, make: Make, d: Tensor) -> None:
            name = meeting.parameter
            is_late = name in mode.derived or name in mode.made_into
            place = self._owned(meeting, placement, d)
            collector.arrive(name, partial(make, place), None if is_late else mode.uses.get(name))

        before = _gradients_of(self._parameters)
        self._run(run, deliver)
        _check_missed(self._parameters, before)
        for name, made in mode.derived.items():
            for use in collector.take(name):
                for root in mode.roots[name]:
                    collector.arrive(root, partial(Made, self._parameters[root], made, use), None)
        found = collector.finish()
        if mode.derived:  # two parameters may share one gradient, which the engine would copy
            add_to_grad(self._parameters, found.totals)
        else:
            self._leave(found.totals)
        mode.derived.clear()  # their graph is not needed any more
        return found

    def _leave(self, totals: Mapping[str, Tensor]) -> None:
        """Add gradients to `.grad`; hooks of parameters are called by whoever runs the update."""
        for name, total in totals.items():
            p = self._parameters[name]
            own = total.to(p.dtype)
            p.grad = own if p.grad is None else p.grad.add_(own)

    def probe(
        self, values: Sequence[Tensor], gradients: Sequence[Tensor], chosen: Tensor
    ) -> set[tuple[Meeting, Placement]]:
        """Go back from the values of chosen examples [B] alone; the meetings not placed so."""
        wrong: set[tuple[Meeting, Placement]] = set()

        def deliver(meeting: Meeting, placement: Placement, make: Make, d: Tensor) -> None:
            if placement.kind == "rows" and self._owners is not None:
                is_right = self._owners.note(placement.rows(d))
            else:
                is_right = agrees(placement, d, chosen)
            if not is_right and bool(d.isfinite().all()):  # after an overflow all rows are mixed
                wrong.add((meeting, placement.layout or placement))

        self._go_back_again(values, gradients, chosen, deliver)
        return wrong

    def _scaled(self, values: Sequence[Tensor], gradients: Sequence[Tensor]) -> Scales:
        """Go back from the values times powers of two, which tell the examples of rows."""
        scales = Scales(self._size, values[0].device)

        def deliver(meeting: Meeting, placement: Placement, make: Make, d: Tensor) -> None:
            scales.note(d)

        with self._without_traces(values):
            for factors in scales.passes():
                self._go_back_again(values, gradients, factors, deliver)
        return scales

    def misplaced(
        self, values: Sequence[Tensor], gradients: Sequence[Tensor]
    ) -> set[tuple[Meeting, Placement]]:
        """Find the meetings where losses of some examples reach rows of others.

        Any two examples go back apart in one of the passes. Owners of rows are known afterwards.
        """
        owners, wrong = Owners(self._size), set[tuple[Meeting, Placement]]()
        self._owners = owners
        for chosen in halves(self._size, values[0].device):
            owners.begin()
            wrong |= self.probe(values, gradients, chosen)
        return wrong

    def _row_norms(
        self, values: Sequence[Tensor], gradients: Sequence[Tensor], weights: Tensor
    ) -> list[Tensor]:
        """|d_i| [B] of all that arrives once example i is weighed with w_i [B]."""
        norms: list[Tensor] = []

        def deliver(
            meeting: Meeting, placement: Placement, make: Callable[[], Contraction], d: Tensor
        ) -> None:
            rows = placement.first(d, self._size).reshape(self._size, -1)
            norms.append(torch.linalg.vector_norm(rows, dim=1))

        self._go_back_again(values, gradients, weights, deliver)
        return norms

    def _go_back_again(
        self,
        values: Sequence[Tensor],
        gradients: Sequence[Tensor],
        weights: Tensor,
        deliver: Callable[..., None],
    ) -> None:
        """Go back with weights [B], and keep the graph."""
        own = [g * weights.to(g.dtype).view(-1, *[1] * (g.ndim - 1)) for g in gradients]
        try:
            self._run(
                lambda: run_backward(tuple(values), tuple(own), True, False, (), True, True),
                deliver,
            )
        except RuntimeError as error:
            raise LedgerError(
                f"The ledger has to go back through the graph of the losses several times, and "
                f"torch does not allow it: {error} Leave the model unobserved."
            ) from error

    def _confirm(self, values: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
        """See that examples reach their own rows alone, where that may have changed.

        Raises:
            UnplacedError: they do not.
        """
        plan = self.plan
        if not plan.unsure and not plan.has_rows:
            is_due = plan.num_steps <= _FIRST_STEPS or plan.num_steps % _EVERY == 0
            if not self.mode.may_mix and not is_due:
                return
        with self._without_traces(values):
            self._compare_rows(values, gradients)

    @contextmanager
    def _without_traces(self, values: Sequence[Tensor]) -> Iterator[None]:
        """Put back whatever passes leave behind."""
        restore = remember(self._roots, self._parameters.values())
        try:
            with gradients_kept(values):
                yield
        finally:
            restore()

    def _compare_rows(self, values: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
        plan, size, device = self.plan, self._size, values[0].device
        row_norms = partial(self._row_norms, values, gradients)
        if not plan.unsure and not plan.has_rows and rows_are_in_place(row_norms, size, device):
            return
        wrong = self.misplaced(values, gradients)
        for meeting, placement in wrong:
            plan.reject(meeting, placement)
        for meeting, placement in wrong:
            raise UnplacedError(
                f"losses of some examples reach rows of others at the {meeting}, whose examples "
                f"were taken to be at {placement}. Rows are mixed there (packed, routed, sorted). "
                f"Keep examples along a dimension of their own, or leave the model unobserved.",
                is_replaced=True,
            )
        plan.unsure.clear()

    def _owned(self, meeting: Meeting, placement: Placement, d: Tensor) -> Placement:
        """The placement with the owners of its rows, where it has any."""
        if self._scales is not None:
            return self._scales.place(placement, d)
        if placement.kind != "rows":
            return placement
        if self._size == 1:
            rows = placement.rows(d)
            return placement.owned(torch.zeros(len(rows), dtype=torch.long, device=d.device))
        owners = None if self._owners is None else self._owners.take(placement.rows(d))
        if owners is None:
            raise UnplacedError(
                f"the rows of the {meeting} are moved by what they hold (packed, routed, sorted), "
                f"and nothing tells which example each belongs to. Use ab.batch_gradient with "
                f"observe=..., which knows the loss of each example, or leave the model unobserved."
            )
        return placement.owned(owners)

    def _run(self, run: Callable[[], object], deliver: Callable[..., None]) -> None:
        self._deliver, self.mode.is_forward = deliver, False
        try:
            with self.mode:  # checkpointing runs forward again in here
                run()
        finally:
            self._deliver, self.mode.is_forward = None, True

    def _receive(self, *arguments: Any) -> None:
        if self._deliver is not None:
            with DisableTorchFunction():  # what is made of gradients meets no parameter
                self._deliver(*arguments)


@contextmanager
def missed_refused(parameters: Mapping[str, nn.Parameter]) -> Iterator[None]:
    """See that a backward pass leaves `.grad` alone, since all gradients go to the ledger.

    Raises:
        LedgerError: a gradient that has gone past the ledger.
    """
    before = _gradients_of(parameters)
    yield
    _check_missed(parameters, before)


def _gradients_of(parameters: Mapping[str, nn.Parameter]) -> list[tuple[Tensor | None, int]]:
    return [(g := p.grad, -1 if g is None else g._version) for p in parameters.values()]


def _check_missed(
    parameters: Mapping[str, nn.Parameter], before: list[tuple[Tensor | None, int]]
) -> None:
    for (name, p), (gradient, version) in zip(parameters.items(), before, strict=True):
        now = p.grad
        if now is not gradient or (now is not None and now._version != version):
            raise _missed(name)


def add_to_grad(parameters: Mapping[str, nn.Parameter], totals: Mapping[str, Tensor]) -> None:
    """Add gradients to `.grad` as a backward pass does: hooks of parameters run once on each."""
    reached = [(parameters[name], total) for name, total in totals.items()]
    if reached:
        run_backward(
            tuple(p for p, _ in reached),
            tuple(total.to(p.dtype) for p, total in reached),
            False,
            False,
            (),
            True,
            True,
        )


def misplaced(meeting: Meeting, placement: Placement) -> LedgerError:
    """The refusal of a meeting whose examples lie elsewhere."""
    return LedgerError(
        f"losses of some examples reach rows of others at the {meeting}, whose examples are taken "
        f"to be at {placement}, expected their own rows alone. If it is met in this way for the "
        f"first time, take the step again, which looks for them elsewhere; if not, rows are mixed "
        f"there (packed, routed, sorted): keep examples along a dimension of their own, or leave "
        f"the model unobserved."
    )


def go_back_and_keep(values: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
    """Run a backward pass that others are to follow.

    Raises:
        LedgerError: there can be only one, since something has been changed in place.
    """
    try:
        run_backward(tuple(values), tuple(gradients), True, False, (), True, True)
    except RuntimeError as error:
        raise LedgerError(
            f"The ledger has to go back through the graph of the losses several times, and torch "
            f"does not allow it: {error} Leave the model unobserved."
        ) from error


def _missed(name: str) -> UnplacedError:
    return UnplacedError(
        f"a gradient has reached {name} past the ledger. It is used in scripted code, in a "
        f"torch.autograd.Function, under torch.func, for one example at a time, or in a way that "
        f"began in the backward pass. Write that use as operations of torch on the batch, or "
        f"freeze the parameter."
    )
