"""Judge each update of a training, and name the examples behind a spike.

    begin(share)      before the gradient is computed: note the buffers
    inspect(...)      after it: judge loss and |G|; at a spike compute the step again, observed

The second computation has the key, the weights and the buffers of the first. It leaves no trace:
see `anybatch.gradient.recompute`. Where a model has no norms and shares, examples are chosen by
their loss, and the spike says why.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, final

import torch
from torch import Tensor, nn

from anybatch import distributed
from anybatch.distributed import ProcessGroup, fsdp
from anybatch.errors import AnybatchError, LedgerError
from anybatch.gradient import Gradient
from anybatch.gradient.clip import compute_norm
from anybatch.gradient.recompute import StateBefore
from anybatch.ledger import Ledger, Observe
from anybatch.objective import Objective
from anybatch.runs.state import TrainingState
from anybatch.training.spike_examples import Past, choose_examples, describe_example
from anybatch.training.spike_rows import gather_rows
from anybatch.training.spikes import History, Signal, Spike, SpikeWatch

__all__ = ["SpikeFinder", "prepare_finder"]

_OBSERVED = Observe(norms=True, share=True)


@final
class SpikeFinder:
    """Finds the spikes of one training.

    Args:
        watch: the rule.

    Raises:
        LedgerError: it is no `SpikeWatch`.
    """

    def __init__(self, watch: SpikeWatch) -> None:
        if not isinstance(watch, SpikeWatch):
            raise LedgerError(f"spikes is {watch!r}. It must be ab.SpikeWatch(...) or None.")
        self.history = History(watch)
        self._before: StateBefore | None = None

    def compute_and_inspect(
        self,
        step: int,
        compute: Callable[..., Gradient],
        model: nn.Module,
        objective: Objective,
        share: Any,
        *,
        observe: Observe | None = None,
        scale: float = 1.0,
    ) -> tuple[Gradient, Spike | None]:
        """Compute the gradient of an update, and find out whether it is a spike.

        Args:
            compute: computes the gradient; it takes `observe` and `self_check`.
        """
        self.begin(model, objective, share)
        gradient = compute(observe=observe)
        again = partial(compute, self_check=False)
        return gradient, self.inspect(step, gradient, again, scale=scale)

    def begin(self, model: nn.Module, objective: Objective, share: Any) -> None:
        """Note the state before an update; for arguments see `batch_gradient`."""
        self._model, self._share = model, share
        self._before = StateBefore(model, objective, share)

    def inspect(
        self,
        step: int,
        gradient: Gradient,
        compute: Callable[..., Gradient],
        *,
        past: Past | None = None,
        scale: float = 1.0,
    ) -> Spike | None:
        """Judge an update before it changes the weights; return its spike, if it is one.

        Args:
            step: number of the update.
            gradient: its gradient, which is in `.grad`.
            compute: computes the gradient of this step again; it takes `observe`.
            past: reads norms of examples at their earlier visits, on the first rank.
            scale: factor of `.grad`, of an outer `GradScaler`.
        """
        before, self._before = self._before, None
        assert before is not None  # `begin` comes first
        loss = float(gradient.loss)
        norm = _measure_norm(gradient, list(self._model.parameters())) / scale
        if not (gradient.is_finite and math.isfinite(loss) and math.isfinite(norm)):
            return None
        values: dict[Signal, float] = {"loss": loss, "norm": norm}
        worst = _find_largest_loss(gradient)
        if worst is not None:
            values["example"] = worst
        verdicts = self.history.judge(values, gradient.num_examples)
        if not verdicts:
            return None
        ledger, why = _observe(gradient, before, compute)
        rows = gather_rows(gradient, ledger, self._share)
        factor = self.history.watch.factor
        places = list(dict.fromkeys(i for v in verdicts for i in choose_examples(rows, v, factor)))
        visits = _read_visits(past, [rows["id"][i] for i in places], gradient.group)
        examples = (describe_example(rows, i, visits.get(rows["id"][i], ())) for i in places)
        return Spike(step=step, **verdicts[0]._asdict(), examples=tuple(examples), why=why)


def prepare_finder(watch: SpikeWatch | None, training: TrainingState) -> SpikeFinder | None:
    """Make the finder of a training, whose history is saved in checkpoints."""
    if watch is None:
        return None
    finder = SpikeFinder(watch)
    training.watch = finder.history
    return finder


def _observe(
    gradient: Gradient, before: StateBefore, compute: Callable[..., Gradient]
) -> tuple[Ledger | None, str | None]:
    """Return the ledger of an update, and why it is missing if it is."""
    ledger = gradient.ledger
    if ledger is not None and ledger.norms is not None and ledger.share is not None:
        return ledger, None
    why = before.find_obstacle()
    reasons = distributed.all_gather_object(lambda: why, gradient.group)
    why = next((reason for reason in reasons if reason is not None), None)
    if why is None:
        try:
            with before.rewind():
                return compute(observe=_OBSERVED).ledger, None
        except (AnybatchError, torch.OutOfMemoryError) as error:
            why = " ".join(str(error).split())
    return ledger, why


def _find_largest_loss(gradient: Gradient) -> float | None:
    """Find the largest loss of one example over all ranks; None: examples have several values."""
    (term,) = gradient.terms.values() if len(gradient.terms) == 1 else (None,)
    if term is None or term.values.ndim > 1:
        return None
    largest = float(term.means.max()) if len(term.values) else -math.inf
    return max(distributed.all_gather_object(lambda: largest, gradient.group))


def _read_visits(
    past: Past | None, ids: Sequence[int], group: ProcessGroup | None
) -> dict[int, Sequence[float]]:
    """Read the norms of examples at their earlier visits; only the first rank has them."""
    if past is None or not ids:
        return {}
    return distributed.broadcast_from_first(lambda: dict(past(ids)), group)


@torch.no_grad()
def _measure_norm(gradient: Gradient, parameters: Sequence[nn.Parameter]) -> float:
    """Measure |G|, before `ClipNorm`."""
    if gradient.norm is not None:
        return float(gradient.norm)
    gradients: list[Tensor] = [p.grad for p in parameters if p.grad is not None]
    if not any(map(fsdp.is_sharded, gradients)):
        return float(compute_norm(gradients))
    slices: list[Any] = [g for g in gradients if fsdp.is_sharded(g)]
    square = compute_norm([g.to_local() for g in slices]).double().square().reshape(1)
    distributed.all_reduce_sum([square], gradient.group)
    whole = compute_norm([g for g in gradients if not fsdp.is_sharded(g)])
    return math.hypot(math.sqrt(float(square)), float(whole))
