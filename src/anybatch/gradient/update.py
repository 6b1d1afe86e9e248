"""Everything that the computation of one update needs."""

import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler

from anybatch._torch import norms_of
from anybatch.distributed import ProcessGroup
from anybatch.errors import LedgerError, ModelError
from anybatch.example_losses import Losses, Outputs
from anybatch.gradient.parameter_hooks import ParameterHooks
from anybatch.gradient.survey import DRAWS, Facts, Survey
from anybatch.layout import ShareRange
from anybatch.ledger import Ledger
from anybatch.ledger.graph_pass import GraphPass
from anybatch.ledger.noise import NoiseEstimate
from anybatch.ledger.plain_autograd import OneByOne
from anybatch.ledger.unplaced import UnplacedError
from anybatch.ledger.watched_pass import WatchedPass
from anybatch.objective import Objective
from anybatch.precision import Precision
from anybatch.pytree import Shared, Uncollated, is_flat, list_leaves
from anybatch.randomness import Key
from anybatch.reduction import Reduced

__all__ = [
    "GrainNorms",
    "Observation",
    "ObservedPass",
    "Outcome",
    "PaddingPasses",
    "Update",
    "Writes",
]

ObservedPass = WatchedPass | GraphPass | OneByOne


class PaddingPasses(NamedTuple):
    """Dummy passes for a rank with fewer micro-batches; FSDP needs equal pass counts."""

    share: Any  # a few examples, which add nothing to the gradient
    size: int
    num_passes: int


class Observation(Protocol):
    """View of an update by the ledger, see `observed`."""

    reads_graph: bool
    """True if the passes are plain ones, and the ledger reads their graph."""

    def begin(self, size: int) -> ObservedPass: ...
    def backward(
        self,
        watched: ObservedPass,
        losses: Losses,
        coefficients: Mapping[str, Tensor],
        scale: float,
    ) -> bool: ...
    def replan(self, error: UnplacedError) -> None: ...
    def ledger(self, sums: Mapping[str, Tensor], factor: float) -> Ledger: ...
    def noise(self) -> NoiseEstimate | None: ...


class GrainNorms:
    """Norms |G_g| of what each grain of a share adds to the gradient, in order.

        G = sum over grains g of G_g,    G_g = sum of c_i grad v_i over the examples of g

    They are all that is defined if examples couple. Each grain has its own backward pass, so G_g
    is what that pass leaves in `.grad`.
    """

    def __init__(self, survey: Survey) -> None:
        self._parameters = list(survey.parameters.values())
        self._norms: list[float] = []

    def append(self, scale: float) -> None:
        """Append the norm of what a backward pass has left in `.grad`, times a factor."""
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        wide = [g if g.dtype.itemsize >= 4 else g.float() for g in gradients]
        self._norms.append(abs(scale) * math.hypot(*map(float, norms_of(wide))))

    def to_tensor(self, reason: str | None, factor: float) -> Tensor:
        """Return |G_g| [grains].

        Args:
            reason: why the model runs grain by grain; None: it does not.
            factor: G_g over the gradient that a backward pass leaves.

        Raises:
            LedgerError: a model without grains.
        """
        if reason is None:
            raise LedgerError(
                "The model neither couples examples nor draws random numbers, so it is not cut "
                "into grains, and has no grain norms. Observe norms, which are each example's."
            )
        return factor * torch.tensor(self._norms, dtype=torch.float64)


@dataclass(slots=True)
class Writes:
    """Record of what the forward passes of one update write into: their batch, and parameters.

    A forward pass may run twice over one batch: for a reduction in two passes, or again after a
    draw of random numbers has been detected. A pass that may be repeated gets a copy of its batch.

    """

    parameters: Mapping[str, Tensor]  # those of the model that must not be written into, by name
    share: Any  # the examples of the update; all micro-batches use its `Shared` leaves
    is_cut: bool = False  # whether more than one forward pass takes part in the update
    has_changed_batch: bool = False  # a pass has written into a batch of which it had no copy
    _shared: list[Tensor] = field(default_factory=list)
    _versions: tuple[int, int] = (0, 0)  # sums over shared leaves and over parameters

    def allow(self, names: Collection[str]) -> None:
        """Allow forward passes to write into parameters of these names, as is exact."""
        self.parameters = {n: p for n, p in self.parameters.items() if n not in names}

    def begin(self) -> None:
        """Note the versions of shared leaves and parameters before one of several passes."""
        self._shared = _list_shared(self.share)
        self._versions = _sum_versions(self._shared), _sum_versions(self.parameters.values())

    def end(self) -> None:
        """Compare the versions after the forward pass.

        Raises:
            ModelError: a write that makes the update depend on how the batch is cut.
        """
        shared, parameters = self._versions
        if _sum_versions(self._shared) != shared:
            raise ModelError(
                "The forward pass writes into an ab.Shared leaf of its batch, and the next "
                "micro-batch would get what it left there. Change a copy: write "
                "mask = mask * 2 in place of mask.mul_(2)."
            )
        if _sum_versions(self.parameters.values()) != parameters:
            names = ", ".join(self.parameters)[:200]
            raise ModelError(
                f"The forward pass changes a parameter of the model (one of {names}). The batch is "
                f"cut into several forward passes, and each would run with other weights. "
                f"Initialise from data, or clip weights, before training or between updates; or "
                f"run the batch uncut."
            )

    def check_repeatable(self) -> None:
        """Refuse to run a forward pass again over a batch that it has changed.

        Raises:
            ModelError: it has changed its batch.
        """
        if self.has_changed_batch:
            raise ModelError(
                "The forward pass writes into its batch in place, and has to run over it a second "
                "time. The second pass would see other data. Change a copy: write x = x * 2 in "
                "place of x.mul_(2), and labels = labels - 1 in place of labels -= 1."
            )


def _list_shared(share: Any) -> list[Tensor]:
    """List the tensors in the `Shared` leaves of a batch."""
    if is_flat(share) or isinstance(share, Uncollated):
        return []
    shared = [leaf.leaf for leaf in list_leaves(share) if isinstance(leaf, Shared)]
    tensors = [leaf for leaf in list_leaves(shared) if isinstance(leaf, Tensor)]
    return [tensor for tensor in tensors if not tensor.is_inference()]


def _sum_versions(tensors: Iterable[Tensor]) -> int:
    return sum([tensor._version for tensor in tensors])


@dataclass(frozen=True, slots=True)
class Outcome:
    """Losses of the whole batch, and the result of each reduction."""

    losses: Losses
    reduced: Mapping[str, Reduced]
    factor: float = 1.0  # factor between the sum over micro-batches and G

    def coefficients(self, start: int, stop: int) -> dict[str, Tensor]:
        """Return c of examples start .. stop-1 of the batch, by term."""
        return {name: result.coefficients[start:stop] for name, result in self.reduced.items()}

    def select(self, examples: slice | Tensor) -> "Outcome":
        """Return the losses and coefficients of some examples, a range or indices [k]."""

        def take(rows: Tensor) -> Tensor:
            return rows[examples if isinstance(examples, slice) else examples.to(rows.device)]

        return replace(
            self,
            losses={name: term.map(take) for name, term in self.losses.items()},
            reduced={
                name: result._replace(coefficients=take(result.coefficients))
                for name, result in self.reduced.items()
            },
        )


@dataclass(slots=True, kw_only=True)
class Update:
    """Everything that one update needs."""

    model: nn.Module
    survey: Survey  # of the model
    facts: Facts  # about the model under this objective
    device: torch.device  # of the parameters
    objective: Objective
    share: Any
    share_range: ShareRange
    key: Key | None  # origin of the draws of a grain; None: nothing may be drawn
    ids: Tensor | None
    reduction_states: Mapping[str, Tensor | None]
    group: ProcessGroup | None
    writes: Writes  # of the forward passes
    precision: Precision = "float32"
    loss_scale: float = 1.0
    observation: Observation | None = None  # of each example, if requested
    grain_norms: GrainNorms | None = None  # if requested
    padding: PaddingPasses | None = None  # only if the model is sharded
    is_bitwise: bool = False  # grain by grain, summed pairwise
    has_kernels: bool = False  # whether kernels are chosen by measurement
    scaler: GradScaler | None = None  # the caller's, which divides by its scale
    self_check: bool | Literal["run"] = True  # see `self_check`
    hooks: ParameterHooks | None = None  # the user's hooks on parameters
    outputs: list[Outputs] = field(default_factory=list)  # of the micro-batches so far

    @contextmanager
    def preserve_outside_gradients(self) -> Iterator[None]:
        """Leave `.grad` of the modules outside of the model unchanged."""
        outside = self.facts.list_outside()
        gradients = [(p, p.grad) for module in outside for p in module.parameters()]
        for p, _ in gradients:
            p.grad = None
        try:
            yield
        finally:
            for p, gradient in gradients:
                p.grad = gradient

    def find_grain_reason(self) -> str | None:
        """Return why the share is processed grain by grain; None: it need not be."""
        if self.is_bitwise:
            return "bitwise=True adds up grains in a fixed order"
        return self.survey.layer or (DRAWS if self.facts.draws else None)
