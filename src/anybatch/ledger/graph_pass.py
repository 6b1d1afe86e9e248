"""One forward and backward pass whose uses of parameters are read from autograd's graph.

    plain forward  ->  hooks on the nodes that use parameters  ->  plain backward

Autograd computes the sums, as without the ledger, so observing changes no bit of them. The ledger
computes norms alone, when a hook gets the gradient d of a node's output.

It serves graphs in which row i of each product belongs to example i, and each use of a parameter
has a rule (`graph_form`). A calibration compares the norms with plain autograd, one example at a
time, and stores the form of the graph. A pass with a graph of another form raises an error, and is
made again by a `WatchedPass`. The first steps and one step in 32 are made by one in any case.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

from torch import Tensor, nn

from anybatch.ledger.contractions.placement import Plan
from anybatch.ledger.gradient_stats import GradientCollector, GradientStats
from anybatch.ledger.graph_form import GraphForm, find_uses, list_nodes, make_uses
from anybatch.ledger.trial_run import run_backward
from anybatch.ledger.unplaced import UnplacedError

__all__ = ["GraphPass", "find_form"]


class GraphPass:
    """A plain forward pass, and the backward pass through its graph.

    Args:
        parameters: the trainable ones, by name.
        plan: holds the form of the graph.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], plan: Plan) -> None:
        self._names = {id(p): name for name, p in parameters.items()}
        self._plan = plan
        self.mode: AbstractContextManager[object] = nullcontext()
        """Context of the forward pass."""

    def backward(
        self,
        values: Sequence[Tensor],
        gradients: Sequence[Tensor],
        *,
        weights: Tensor | None = None,
        weigh: Callable[[Tensor], Tensor] | None = None,
        **options: Any,
    ) -> GradientStats:
        """Go backward from the values, and let autograd add its gradients to `.grad`.

        Args:
            values: [B], with a graph.
            gradients: weights of the values in the backward pass, shaped like them.
            weights, weigh: None; with other weights in the sums, the pass must be watched.
            options: further ones of `GradientCollector`.

        Raises:
            UnplacedError: the graph has another form than the plan knows.
        """
        form, (value, *others) = self._plan.graph, values
        nodes, shape = list_nodes(value, self._names)
        try:
            if form is None or form.shape != shape or others or weights is not None or weigh:
                raise UnplacedError("The graph of this pass has another form than before.", True)
            collector = GradientCollector(None, has_sums=False, **options)
            _go_back(nodes, form, collector, values, gradients)
        except UnplacedError:  # the next pass is watched
            self._plan.graph, self._plan.has_new_form = None, True
            raise
        return collector.finish()


def find_form(
    parameters: Mapping[str, nn.Parameter], value: Tensor, weights: Tensor
) -> tuple[GraphForm, GradientStats] | None:
    """Find the form of a graph, go backward through it, and return its norms too.

    Args:
        parameters: the trainable ones, by name.
        value: losses [B] of a few examples.
        weights: [B], theirs in the backward pass.

    Returns:
        None: the graph does not show all uses, or not as rows of one example each.
    """
    names = {id(p): name for name, p in parameters.items()}
    nodes, shape = list_nodes(value, names)
    uses = find_uses(nodes, names, len(value))
    if not uses or any(p.is_complex() for p in parameters.values()):
        return None
    counts = Counter(name for of_node in uses.values() for name, _ in of_node)
    form = GraphForm(shape, uses, counts)
    collector = GradientCollector(None, has_sums=False, keep_uses=False, keep_gradients=False)
    try:
        _go_back(nodes, form, collector, [value], [weights])
    except (RuntimeError, UnplacedError):
        return None
    return form, collector.finish()


def _go_back(
    nodes: list[Any],
    form: GraphForm,
    collector: GradientCollector,
    values: Sequence[Tensor],
    gradients: Sequence[Tensor],
) -> None:
    """Go backward, and let the collector take the gradients of nodes that use parameters."""
    size = len(values[0])

    def receive(place: int, arrived: tuple[Tensor | None, ...]) -> None:
        d = arrived[0]
        if d is not None:
            uses = make_uses(nodes[place], form.uses[place], d, size)
            for name, use in uses:  # autograd has disabled gradients
                collector.add(name, use, form.counts[name])

    for place in form.uses:
        nodes[place].register_prehook(partial(receive, place))
    run_backward(values, gradients)
    nodes.clear()  # hooks would hold their own nodes
