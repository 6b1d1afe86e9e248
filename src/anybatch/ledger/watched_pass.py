"""One forward and backward pass that the ledger watches.

    intercepted forward  ->  backward of sum_i v_i  ->  sums and norms by example and parameter

The ledger adds the sums to `.grad`, where autograd would put them. If autograd itself puts a
gradient there, the ledger has missed a use of a parameter, which is an error. Before, it confirms
at some steps that the loss of each example reaches only its own rows:

    all examples with weight 1          rows d_i
    example i with weight r_i < 1       rows r_i d_i, if no row belongs to another example

Two examples differ in a digit of their number, and r_i = q^digit. One backward pass tests each
digit: 256 digits with q = 2^(-1/32), or 8 digits with q = 1/2 if gradients are narrower than
float32. So one or two more backward passes show whether rows have changed places. A hook on an
activation that is not linear breaks the proportion too, so an exact test follows: it takes some
examples backward alone, half of them for each bit of their number, and the rows of all others must
be 0.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from anybatch._torch import DisableTorchFunction
from anybatch.ledger.contractions.calls import Make, Receive
from anybatch.ledger.contractions.placement import (
    Placement,
    Plan,
    Site,
    is_consistent,
    make_moved_error,
)
from anybatch.ledger.gradient_stats import GradientCollector, GradientStats, Projector
from anybatch.ledger.intercept import Intercept
from anybatch.ledger.row_owners import DoubtError, Owners, Scales, iterate_masks
from anybatch.ledger.trial_run import (
    preserve_grads,
    record_state,
    repeat_backward,
    run_backward,
)
from anybatch.ledger.unplaced import UnplacedError

__all__ = [
    "WatchedPass",
    "add_to_grad",
    "is_confirmed_now",
    "refuse_missed",
]

_FIRST_STEPS, _EVERY = 16, 32
"""Steps that are confirmed even if no call may have moved rows: the first 16, then one in 32, which
costs 2 % of the time."""


def is_confirmed_now(plan: Plan) -> bool:
    """Return whether this step is confirmed even if no call may have moved rows."""
    return plan.has_new_form or plan.num_steps <= _FIRST_STEPS or plan.num_steps % _EVERY == 0


Run = Callable[[Callable[[], object], Receive], None]
"""Run a backward pass, and hand its gradients to a receiver."""


class WatchedPass:
    """A forward pass, made within `mode`, and the backward pass through it.

    Args:
        parameters: the trainable ones, by name.
        num_examples: B.
        plan: placements of the examples.
        roots: objects that the user's hooks can change in a backward pass.
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
        self._receiver: Receive | None = None
        self._rows = RowCheck(num_examples, plan, self._run)
        self.mode = Intercept(parameters, num_examples, plan, self._receive)
        """Context of the forward pass."""

    def backward(
        self, values: Sequence[Tensor], gradients: Sequence[Tensor], **options: Any
    ) -> GradientStats:
        """Go backward from the values, and add sum_i c_i g_i to `.grad`.

        Args:
            values: losses of the model, with a graph.
            gradients: weights of the values in the backward pass, 1 for each example.
            options: of `go_back`.

        Raises:
            LedgerError: a gradient that the ledger has missed, or examples that reach rows of
                others.
        """
        has_rows = self.plan.has_rows
        if self._size > 1 and has_rows and not self.plan.unconfirmed:
            with self._preserve_state(values):
                self._rows.find_scales(values, gradients)
            try:
                return self.go_back(values, gradients, keeps_graph=True, **options)
            except DoubtError:
                self._confirm(values, gradients, is_exact=True)
            finally:
                self._rows.scales = None
        elif self._size > 1:
            is_exact = has_rows or bool(self.plan.unconfirmed)
            self._confirm(values, gradients, is_exact=is_exact)
        return self.go_back(values, gradients, **options)

    def go_back(
        self,
        values: Sequence[Tensor],
        gradients: Sequence[Tensor],
        *,
        keeps_graph: bool = False,
        weights: Tensor | None = None,
        weigh: Callable[[Tensor], Tensor] | None = None,
        keep_uses: bool = False,
        keep_gradients: bool = False,
        projector: Projector | None = None,
    ) -> GradientStats:
        """Do what `backward` does, if the placements are known to be right.

        Args:
            values: losses of the model.
            gradients: their weights in the backward pass.
            keeps_graph: whether another backward pass can follow.
            weights: c [B], the weights of the sums; None: 1 each.
            weigh: computes c from sum |g_i|^2 [B], if c depends on them.
            keep_uses: whether to keep the uses, for inner products.
            keep_gradients: whether to keep each example's gradient.
            projector: projects each example's gradient, if requested.

        Raises:
            LedgerError: a gradient that the ledger has missed.
        """
        collector = GradientCollector(
            weights,
            weigh,
            keep_uses=keep_uses,
            keep_gradients=keep_gradients,
            projector=projector,
        )
        tracker = self.mode.tracker

        def receive(sites: list[Site], placement: Placement, make: Make, d: Tensor) -> None:
            placement = self._rows.resolve(sites[0], placement, d)
            for site, use in zip(sites, make(placement), strict=True):
                name = site.parameter
                num_uses = None if tracker.is_indirect(name) else tracker.uses.get(name)
                collector.add(name, use, num_uses)

        with refuse_missed(self._parameters):
            run = partial(run_backward, values, gradients, keeps_graph=keeps_graph)
            self._run(run, receive)
        collector.move_to_parameters(tracker)
        stats = collector.finish()
        if tracker.derived:  # two parameters can share one gradient, which autograd copies
            add_to_grad(self._parameters, stats.totals)
        else:
            self._add_without_hooks(stats.totals)
        tracker.derived.clear()  # frees their graph
        return stats

    def find_misplaced(
        self, values: Sequence[Tensor], gradients: Sequence[Tensor]
    ) -> set[tuple[Site, Placement]]:
        """Find the sites where losses of some examples reach rows of others."""
        return self._rows.find_misplaced(values, gradients)

    def _add_without_hooks(self, totals: Mapping[str, Tensor]) -> None:
        """Add gradients to `.grad`. The caller of the update runs the hooks of parameters."""
        for name, total in totals.items():
            p = self._parameters[name]
            total = total.to(p.dtype)
            p.grad = total if p.grad is None else p.grad.add_(total)

    def _confirm(
        self, values: Sequence[Tensor], gradients: Sequence[Tensor], *, is_exact: bool
    ) -> None:
        """Check that examples reach only their own rows, if that may have changed."""
        if self.mode.may_mix:
            self.plan.graph = None
        if is_exact or self.mode.may_mix or is_confirmed_now(self.plan):
            with self._preserve_state(values):
                self._rows.confirm(values, gradients, is_exact=is_exact)
            self.plan.has_new_form = False

    @contextmanager
    def _preserve_state(self, values: Sequence[Tensor]) -> Iterator[None]:
        """Restore all that backward passes change."""
        restore = record_state(self._roots, self._parameters.values())
        try:
            with preserve_grads(values):
                yield
        finally:
            restore()

    def _run(self, run: Callable[[], object], receive: Receive) -> None:
        """Run a backward pass, and hand its gradients to a receiver."""
        self._receiver, self.mode.tracker.is_forward = receive, False
        try:
            with self.mode:  # checkpointing runs forward again in the backward pass
                run()
        finally:
            self._receiver, self.mode.tracker.is_forward = None, True

    def _receive(self, sites: list[Site], placement: Placement, make: Make, d: Tensor) -> None:
        if self._receiver is not None:
            with DisableTorchFunction():  # no parameters in what is computed from here on
                self._receiver(sites, placement, make, d)


class RowCheck:
    """Repeated backward passes that show which example each row belongs to.

    Args:
        num_examples: B.
        plan: placements of the forward pass.
        run: runs a backward pass.
    """

    def __init__(self, num_examples: int, plan: Plan, run: Run) -> None:
        self._size, self._plan, self._run = num_examples, plan, run
        self._owners: Owners | None = None
        self.scales: Scales | None = None
        """Gradients with powers of two; None: the owners come from masks."""

    def find_scales(self, values: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
        """Take the examples backward, multiplied by powers of two."""
        scales = Scales(self._size, values[0].device)

        def receive(sites: list[Site], placement: Placement, make: Make, d: Tensor) -> None:
            scales.add_gradient(d)

        for factors in scales.iterate_factors():
            self._go_back(values, gradients, factors, receive)
        self.scales = scales

    def find_misplaced(
        self, values: Sequence[Tensor], gradients: Sequence[Tensor]
    ) -> set[tuple[Site, Placement]]:
        """Find the sites where losses of some examples reach rows of others.

        Some pass separates any two examples. The owners of rows are known afterwards.
        """
        self._owners = owners = Owners(self._size)
        wrong: set[tuple[Site, Placement]] = set()
        for mask in iterate_masks(self._size, values[0].device):
            owners.begin_pass()
            wrong |= self._test_mask(values, gradients, mask, owners)
        return wrong

    def _test_mask(
        self, values: Sequence[Tensor], gradients: Sequence[Tensor], mask: Tensor, owners: Owners
    ) -> set[tuple[Site, Placement]]:
        """Take the examples of a mask backward; return the sites where they reach others."""
        wrong: set[tuple[Site, Placement]] = set()

        def receive(sites: list[Site], placement: Placement, make: Make, d: Tensor) -> None:
            if placement.kind == "rows":
                is_right = owners.add_gradient(placement.flatten_rows(d))
            else:
                is_right = is_consistent(placement, d, mask)
            if not is_right and bool(d.isfinite().all()):  # an overflow mixes all rows
                wrong.update((site, placement.layout or placement) for site in sites)

        self._go_back(values, gradients, mask, receive)
        return wrong

    def confirm(
        self, values: Sequence[Tensor], gradients: Sequence[Tensor], *, is_exact: bool
    ) -> None:
        """Check that the loss of each example reaches only its own rows.

        Args:
            values: losses of the model.
            gradients: their weights in the backward pass.
            is_exact: whether to make the exact test in any case.

        Raises:
            UnplacedError: it reaches others. The plan has another placement then.
        """
        plan = self._plan
        if not is_exact and self._is_in_proportion(values, gradients):
            return
        wrong = self.find_misplaced(values, gradients)
        for site, placement in wrong:
            plan.reject(site, placement)
        for site, placement in wrong:
            raise UnplacedError(
                f"Losses of some examples reach rows of others at the {site}, whose examples "
                f"were taken to be at {placement}. Rows are mixed there (packed, routed, sorted). "
                f"Keep examples along a dimension of their own, or leave the model unobserved.",
                is_replaced=True,
            )
        plan.unconfirmed.clear()

    def resolve(self, site: Site, placement: Placement, d: Tensor) -> Placement:
        """Return a placement with the owners of its rows, if it has any.

        Raises:
            DoubtError: powers of two do not show the owners.
            UnplacedError: no pass has found the owners.
        """
        if self.scales is not None:
            return self.scales.find_owners(placement, d)
        if placement.kind != "rows":
            return placement
        if self._size == 1:
            return placement.with_one_owner(d)
        rows = placement.flatten_rows(d)
        owners = None if self._owners is None else self._owners.pop_owners(rows)
        if owners is None:
            raise make_moved_error(site)
        return placement.with_owners(owners)

    def _is_in_proportion(self, values: Sequence[Tensor], gradients: Sequence[Tensor]) -> bool:
        """Return whether all rows are proportional to the weight of their example."""
        numbers = torch.arange(self._size, device=values[0].device)
        ones = torch.ones_like(numbers, dtype=torch.float32)
        plain = self._row_norms(values, gradients, ones)
        is_narrow = any(norms.dtype.itemsize < 4 for norms in plain)
        base, q, slack = (8, 0.5, 0.2) if is_narrow else (256, 2 ** (-1 / 32), 0.005)
        while bool((numbers > 0).any()):
            weights = q ** (numbers % base).float()
            scaled = self._row_norms(values, gradients, weights)
            for before, after in zip(plain, scaled, strict=True):
                expected = before.float() * weights
                is_near = (after.float() - expected).abs() <= slack * expected  # False for nan
                if not bool(is_near.all()):
                    return False
            numbers = numbers // base
        return True

    def _row_norms(
        self, values: Sequence[Tensor], gradients: Sequence[Tensor], weights: Tensor
    ) -> list[Tensor]:
        """Compute |d_i| [B] at each site, with example i weighed by w_i [B]."""
        norms: list[Tensor] = []

        def receive(sites: list[Site], placement: Placement, make: Make, d: Tensor) -> None:
            rows = placement.move_first(d, self._size).reshape(self._size, -1)
            norms.append(torch.linalg.vector_norm(rows, dim=1))

        self._go_back(values, gradients, weights, receive)
        return norms

    def _go_back(
        self,
        values: Sequence[Tensor],
        gradients: Sequence[Tensor],
        weights: Tensor,
        receive: Receive,
    ) -> None:
        """Go backward with weights [B], and keep the graph."""
        weighed = [g * weights.to(g.dtype).view(-1, *[1] * (g.ndim - 1)) for g in gradients]
        self._run(lambda: repeat_backward(values, weighed), receive)


@contextmanager
def refuse_missed(parameters: Mapping[str, nn.Parameter]) -> Iterator[None]:
    """Check that a backward pass leaves `.grad` alone, since all gradients go to the ledger.

    Raises:
        UnplacedError: autograd has added a gradient to `.grad`.
    """
    before = [(g := p.grad, -1 if g is None else g._version) for p in parameters.values()]
    yield
    for (name, p), (gradient, version) in zip(parameters.items(), before, strict=True):
        if p.grad is not gradient or (gradient is not None and gradient._version != version):
            raise UnplacedError(
                f"A gradient has reached {name} past the ledger. The parameter is used in scripted "
                f"code, in a torch.autograd.Function, under torch.func, for one example at a time, "
                f"or in a way that began in the backward pass. Write that use as operations of "
                f"torch on the batch, or freeze the parameter."
            )


def add_to_grad(parameters: Mapping[str, nn.Parameter], totals: Mapping[str, Tensor]) -> None:
    """Add gradients to `.grad` as a backward pass does, with the hooks of parameters."""
    if totals:
        reached = [parameters[name] for name in totals]
        gradients = [total.to(p.dtype) for total, p in zip(totals.values(), reached, strict=True)]
        run_backward(reached, gradients)
