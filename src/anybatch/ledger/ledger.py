"""Quantities of each example of an update.

    norms        |grad m_i|,    m_i = v_i / n_i the example's own mean loss
    alignment    <grad m_i, G>,    G = sum_i c_i grad v_i the gradient of the data term
    share        c_i n_i <grad m_i, G> / |G|^2, which sum to 1
    noise scale  tr(S) / |G|^2, in examples

    grain norm   |G_g|,    G_g = sum of c_i grad v_i over the examples of a grain

With several terms, or values [B, k], grad v_i includes c_i: it is what the example adds to the
gradient.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields

from torch import Tensor

from anybatch.displays import format_number, make_table
from anybatch.errors import LedgerError
from anybatch.ledger.noise import NoiseEstimate, NoiseScale

__all__ = ["Ledger", "Observe"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Observe:
    """Quantities to observe, with their cost over the same step unobserved.

    Args:
        norms: of each example's gradient: a few per cent.
        parameter_norms: the same by parameter: nothing more.
        alignment, share: with the gradient of the whole batch: memory for the inputs of each layer
            until that gradient is complete.
        noise_scale: of a plain mean or sum.
        gradients: the whole gradient of each example: memory for B models.
        projections: to how many numbers each example's gradient is projected; 0: none. Inner
            products of projections are about those of the gradients: see `Ledger.projections`.
        grain_norms: of the gradient that each grain adds, for a model that runs grain by grain. If
            examples couple, only this is possible: `Observe(norms=False, grain_norms=True)`.

    Example:
        >>> import torch, anybatch as ab
        >>> objective = ab.Objective(lambda model, x: model(x).square().sum(1))
        >>> model, x = torch.nn.Linear(4, 2), torch.ones(8, 4)
        >>> gradient = ab.batch_gradient(model, objective, x, observe=Observe(share=True))
        >>> gradient.ledger.norms.shape, round(float(gradient.ledger.share.sum()), 3)
        (torch.Size([8]), 1.0)
    """

    norms: bool = True
    parameter_norms: bool = False
    alignment: bool = False
    share: bool = False
    noise_scale: bool = False
    gradients: bool = False
    projections: int = 0
    grain_norms: bool = False

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name == "projections":
                if type(value) is not int or value < 0:
                    raise LedgerError(
                        f"Observe expects projections to be a number of at least 0, such as 512. "
                        f"It is {value!r}."
                    )
            elif not isinstance(value, bool):
                raise LedgerError(
                    f"Observe expects {field.name} to be True or False. It is {value!r}."
                )

    def __repr__(self) -> str:
        """Name each quantity; but projections only if requested.

        A run compares this text on resume, also one that was begun before there were projections.
        """
        values = ((f.name, getattr(self, f.name)) for f in fields(self))
        stated = [f"{name}={value}" for name, value in values if name != "projections" or value]
        return f"Observe({', '.join(stated)})"

    @property
    def is_per_example(self) -> bool:
        """True if some quantity belongs to single examples."""
        quantities = (self.norms, self.parameter_norms, self.gradients, self.projections)
        return any(quantities) or self.keeps

    @property
    def keeps(self) -> bool:
        """True if some quantity needs the uses of parameters after the batch's gradient."""
        return self.alignment or self.share or self.noise_scale


@dataclass(frozen=True, slots=True, kw_only=True)
class Ledger:
    """Quantities of each example of one step, for this rank's share; None: not requested.

    Example:
        >>> import torch
        >>> Ledger(norms=torch.ones(8)).norms.shape
        torch.Size([8])
    """

    norms: Tensor | None = None
    """[B], |grad m_i|; 0 for examples with a count of 0."""
    parameter_norms: Mapping[str, Tensor] | None = None
    """[B] by parameter."""
    alignment: Tensor | None = None
    """[B], <grad m_i, G>."""
    share: Tensor | None = None
    """[B], c_i n_i <grad m_i, G> / |G|^2; they sum to 1 over all ranks."""
    noise: NoiseEstimate | None = None
    """Estimate behind the noise scale; `+` combines it with those of other steps."""
    gradients: Mapping[str, Tensor] | None = None
    """grad m_i [B, ...] by parameter."""
    projections: Tensor | None = None
    """[B, k], random projections S of grad m_i, in at least float32. <S(x), S(y)> is <x, y> on
    average, with an error of about |x| |y| / sqrt(k). S depends on the names and shapes of the
    parameters alone, so projections of different batches, updates and runs can be compared."""
    grain_norms: Tensor | None = None
    """[grains], |G_g|, of the gradient that each grain of the share adds to the data term."""

    @property
    def noise_scale(self) -> NoiseScale | None:
        """Noise scale of the whole batch, with its interval."""
        return None if self.noise is None else self.noise.scale()

    def _repr_html_(self) -> str:
        """Show mean, least and greatest of each quantity as a table in a notebook."""
        head = ("quantity", "mean", "smallest", "largest", "largest at")
        rows = [_summarize(*row) for row in self._list_quantities() if row[1].numel()]
        table = make_table("Ledger: each example's part in the gradient", head, rows)
        scale = self.noise_scale
        if scale is None:
            return table
        low, high = format_number(scale.low), format_number(scale.high)
        noise = (f"{format_number(scale.value)} examples", f"{low} to {high}")
        return f"{table}\n{make_table('Noise scale', ('value', '95 % interval'), [noise])}"

    def _list_quantities(self) -> Iterator[tuple[str, Tensor, str]]:
        """Yield name, values and "example" or "grain" of each quantity that is there."""
        quantities = {
            "norm of the example's gradient": self.norms,
            "alignment with the batch's gradient": self.alignment,
            "share of the update": self.share,
        }
        for name, values in quantities.items():
            if values is not None:
                yield name, values, "example"
        for name, values in (self.parameter_norms or {}).items():
            yield f"norm in {name}", values, "example"
        if self.grain_norms is not None:
            yield "norm of the grain's gradient", self.grain_norms, "grain"


def _summarize(name: str, values: Tensor, holder: str) -> tuple[str, ...]:
    """Return the cells of a row: name, mean, smallest, largest and where the largest is."""
    figures = (values.mean(), values.min(), values.max())
    place = f"{holder} {int(values.argmax())}"
    return (name, *(format_number(figure.item()) for figure in figures), place)
