"""Trade-off between steps and examples to the same loss, over batch sizes.

    (S / Smin - 1) (E / Emin - 1) = 1,    E = B S
    S(B) = Smin (1 + Bcrit / B),    E(B) = Emin (1 + B / Bcrit),    Bcrit = Emin / Smin

S steps and E examples at batch size B; no batch size needs fewer than Smin steps or fewer than
Emin examples; at Bcrit both are twice that. Bcrit is about the noise scale B_simple = tr(S)/|G|^2.

A run that takes S0 steps at B0 fixes both: Smin = S0 / (1 + Bcrit / B0), Emin = Bcrit Smin. Where
the noise scale changes as training goes on, a stretch of s_i steps with noise scale b_i has a
hyperbola of its own, and the sum of these is one again, since S is a straight line in 1/B:

    Smin = sum_i s_i / (1 + b_i / B0),    Emin = sum_i b_i s_i / (1 + b_i / B0)

With D examples, drawn without replacement, a batch differs from the gradient g_D of them all by
tr(S) (1/B - 1/D). The steps then go with |g_D|^2 + tr(S) (1/B - 1/D) = |G|^2 + tr(S)/B, where |G|^2
= |g_D|^2 - tr(S)/D belongs to the population of the examples. This is the same hyperbola, which
ends at B = D.

Sources: McCandlish et al. 2018, 1812.06162, section 2.2 (a step's progress against B) and 2.3 (the
hyperbola, Bcrit); the sum over stretches and the end at D follow from these. That Bcrit is B_simple
holds to an order of magnitude: over the tasks of the source B_simple / Bcrit went from 0.05 to 8.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

__all__ = ["SIMPLE_OVER_CRITICAL", "Tradeoff", "fit_hyperbola"]

SIMPLE_OVER_CRITICAL = (0.05, 8.0)
"""Range of B_simple / Bcrit in the experiments of the source."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tradeoff:
    """Hyperbola of steps and examples."""

    least_steps: float  # Smin; 0 if the noise scale has no upper end: steps fall as 1/B
    least_examples: float  # Emin; 0 if there is no noise: steps do not depend on B

    @property
    def critical(self) -> float:
        """Bcrit, in examples."""
        return self.least_examples / self.least_steps if self.least_steps else math.inf

    def steps(self, batch: float) -> float:
        """Return S(B)."""
        return self.least_steps + self.least_examples / batch

    def examples(self, batch: float) -> float:
        """Return E(B)."""
        return self.least_examples + self.least_steps * batch


def fit_hyperbola(stretches: Iterable[tuple[float, float]], batch: float) -> Tradeoff:
    """Fit the hyperbola through a run.

    Example:
        >>> fit_hyperbola([(1000, 64.0)], batch=64)
        Tradeoff(least_steps=500.0, least_examples=32000.0)

    Args:
        stretches: for each stretch of the run its number of steps, and the noise scale there in
            examples, from 0 to inf.
        batch: B0, examples of the run's batches.
    """
    least_steps = least_examples = 0.0
    for steps, noise in stretches:
        if noise == math.inf:
            least_examples += steps * batch
        else:
            least_steps += steps / (1 + noise / batch)
            least_examples += steps * noise / (1 + noise / batch)
    return Tradeoff(least_steps=least_steps, least_examples=least_examples)
