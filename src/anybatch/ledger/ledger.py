"""What the ledger tells of each example of an update.

    norms        |grad m_i|,    m_i = v_i / n_i the example's own mean loss
    alignment    <grad m_i, G>,    G = sum_i c_i grad v_i the gradient of the data term
    share        c_i n_i <grad m_i, G> / |G|^2, which sum to 1
    noise scale  tr(S) / |G|^2, in examples

    grain norm   |G_g|,    G_g = sum of c_i grad v_i over the examples of a grain

Of several terms, or values [B, k], grad v_i is what the example adds to the gradient, c_i included.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields

from torch import Tensor

from anybatch.errors import LedgerError
from anybatch.ledger.noise import NoiseEstimate, NoiseScale

__all__ = ["Ledger", "Observe"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Observe:
    """What to look at; each costs what it says over the same step unobserved.

    Args:
        norms: of each example's gradient: a few per cent.
        parameter_norms: the same by parameter: nothing more.
        alignment, share: with the gradient of the whole batch: what the gradients are made of is
            kept until all of it is there.
        noise_scale: of a plain mean or sum.
        gradients: of each example whole: memory for B models.
        grain_norms: what each grain adds, of a model that goes grain by grain. It is all that there
            is where examples couple: `Observe(norms=False, grain_norms=True)`.
    """

    norms: bool = True
    parameter_norms: bool = False
    alignment: bool = False
    share: bool = False
    noise_scale: bool = False
    gradients: bool = False
    grain_norms: bool = False

    def __post_init__(self) -> None:
        for field in fields(self):
            if not isinstance(asked := getattr(self, field.name), bool):
                raise LedgerError(
                    f"Observe expects {field.name} to be True or False, got {asked!r}."
                )

    @property
    def is_per_example(self) -> bool:
        """Whether anything is asked of single examples."""
        return self.norms or self.parameter_norms or self.gradients or self.keeps

    @property
    def keeps(self) -> bool:
        """Whether uses are needed once the batch's gradient is known."""
        return self.alignment or self.share or self.noise_scale


@dataclass(frozen=True, slots=True, kw_only=True)
class Ledger:
    """The per-example quantities of one step, of this rank's share; None: not asked for."""

    norms: Tensor | None = None
    """[B], |grad m_i|; 0 for examples with a count of 0."""
    parameter_norms: Mapping[str, Tensor] | None = None
    """[B] by parameter."""
    alignment: Tensor | None = None
    """[B], <grad m_i, G>."""
    share: Tensor | None = None
    """[B], c_i n_i <grad m_i, G> / |G|^2; they sum to 1 over all ranks."""
    noise: NoiseEstimate | None = None
    """What the noise scale is the ratio of: `+` puts it together with that of other steps."""
    gradients: Mapping[str, Tensor] | None = None
    """grad m_i [B, ...] by parameter."""
    grain_norms: Tensor | None = None
    """[grains], |G_g|, what each grain of the share adds to the gradient of the data term."""

    @property
    def noise_scale(self) -> NoiseScale | None:
        """Of the whole batch; its interval is worked out when it is asked for."""
        return None if self.noise is None else self.noise.scale()
