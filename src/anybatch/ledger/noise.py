"""How noisy a gradient is: the simple noise scale and its interval, from figures of each example.

    B_simple = tr(S) / |G|^2,    G = E g_i,  S = Cov g_i

g_i is the gradient of example i, n_i its count, w_i = n_i / mean n, g = mean w_i g_i that of a
batch of B examples. With p_i = g + w_i (g_i - g), whose mean is g and which is g_i where counts
are equal,

    h_i = (B <p_i, g> - |p_i|^2) / (B - 1)    its inner product with the mean of the others
    |G|^2 ~ mean h_i,    |G|^2 + tr(S) ~ mean |p_i|^2

Both are unbiased where counts are equal. Otherwise S = Cov w_i (g_i - G) is B times the variance
of g for large B, and both are ratio estimators, whose bias is corrected to order 1/B:

    |g_i - g|^2  <-  f_i |g_i - g|^2,    f_i = ((1 + l_i) (1 - L) / ((1 - l_i) (1 + L)))^2
    |G|^2        <-  |G|^2 + 2 Cov(w_i, <p_i, g>) / B - Var(w) tr(S) / B^2

l_i = w_i / B is the share of g that example i holds, which pulls g towards g_i; L = sum l_i^2. Both
figures are sums over examples, so that batches are added up before one division.

Bias remains where few examples hold most of the counts, of order 1/B^2 and of either sign. With
counts of 1 for 80 % of the examples and 12 for the others it is under 2 % of tr(S) at B = 32, and
7 % at B = 16. The correction leaves out 6 |Cov(w_i, p_i)|^2 / B, which the figures of single
examples do not tell: it matters where long examples have another gradient on average.

The interval is that of phi = |G|^2 / (|G|^2 + tr(S)), B_simple = 1 / phi - 1: every phi whose
D = |G|^2_hat - phi (|G|^2 + tr(S))_hat is not too far from 0. Its variance under that phi is

    Var |G|^2_hat = k (4 |G|^2 / B + 2 tr(S) / (B (B - 1))),    k = G'SG / |G|^2 = tr(S^2) / tr(S)

The two are set equal, and estimated by Var h / (|G|^2 + tr(S) / (B - 1)): right where G is far
above the noise or far below it, and in between where G lies in S as noise does. Skewness counts,
that of a chi-square, and so does phi >= 0. Unequal counts leave (sum w^2)^2 / sum w^4 degrees of
freedom instead of B. The interval then holds the truth in 87 to 97 of 100 batches of 32 with the
counts above.
"""

import math
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from anybatch.errors import LedgerError

__all__ = ["NoiseEstimate", "NoiseScale", "noise_estimate"]

_DOUBT = 0.05  # 1 - 0.95
_HALVINGS = 30  # to 1e-9 of phi


@dataclass(frozen=True, slots=True, kw_only=True)
class NoiseScale:
    """Simple noise scale of a gradient, in examples."""

    value: float  # tr(S) / |G|^2; nan where |G|^2 is not resolved
    low: float  # 95 % interval; nan where nothing tells how wide it is
    high: float  # inf where |G|^2 is not resolved
    examples: int  # how many examples it rests on


@dataclass(frozen=True, slots=True, kw_only=True)
class NoiseEstimate:
    """What batches tell of |G|^2 and tr(S), as sums: `a + b` is that of both.

    Var and Cov are those of the examples of a batch; sums run over batches of B examples.
    """

    examples: int
    batches: int
    degrees: float  # sum of (sum w^2)^2 / sum w^4, which is B where counts are equal
    signal: float  # sum of B mean h
    second: float  # sum of B mean |p|^2
    var_h: float  # sum of B Var h; nan without inner products
    cov: float  # sum of B Cov(h, |p|^2)
    var_p: float  # sum of B Var |p|^2
    signal_square: float  # sum of (B mean h)^2
    product: float  # sum of (B mean h) (B mean |p|^2)
    second_square: float  # sum of (B mean |p|^2)^2

    def __add__(self, other: "NoiseEstimate") -> "NoiseEstimate":
        names = [field.name for field in fields(self)]
        return NoiseEstimate(**{n: getattr(self, n) + getattr(other, n) for n in names})

    @property
    def gradient_square(self) -> float:
        """|G|^2, without bias; below 0 by chance where G is small against the noise."""
        return self.signal / self.examples

    @property
    def variance(self) -> float:
        """tr(S): a batch of B examples has a gradient of variance tr(S) / B."""
        return (self.second - self.signal) / self.examples

    def scale(self) -> NoiseScale:
        """Divide.

        Returns:
            The noise scale. Its interval rests on the examples where inner products are known,
            else on how the batches differ; with neither, a single batch, low and high are nan,
            and value stands where |G|^2 comes out above 0.

        Source: Fieller 1954 (the test of a ratio); Feldman and Cousins 1998, physics/9711021,
            section IV.B (a quantity that cannot be below 0); Dempster 1958 (chi-square with
            tr(S)^2 / tr(S^2) degrees of freedom for a mean in many dimensions).
        """
        spread = max(self.variance, 0.0)  # below 0 by rounding, where all examples are alike
        ratio = spread / self.gradient_square if self.signal > 0 else math.nan
        low, high = _interval(self) if math.isfinite(self.second) else (math.nan, math.nan)
        value = math.nan if high == math.inf else ratio
        return NoiseScale(value=value, low=low, high=high, examples=self.examples)


@torch.no_grad()
def noise_estimate(
    squares: Tensor, inner: Tensor | None, counts: Tensor | None, square: float
) -> NoiseEstimate:
    """What one batch tells of |G|^2 and tr(S).

    Not defined with batch normalisation, clipping, or any reduction but Mean and Sum: there the
    gradient is no mean of independent ones. Of a finite data set of D examples, from which batches
    are drawn without replacement, tr(S) comes out with the divisor D - 1, and |G|^2 as that of
    the population behind it, |g_D|^2 - tr(S) / D: a batch is off g_D by tr(S) (1/B - 1/D).

    Args:
        squares: |g_i|^2 [B], g_i the gradient of the example's own mean loss.
        inner: <g_i, g> [B]; None: not known, which equal counts allow.
        counts: n_i [B]; None: all equal. Examples of count 0 are left out.
        square: |g|^2 of the mean gradient of the batch, sum n_i g_i / sum n_i, no penalty in it.

    Returns:
        Sums to be added to those of other batches, in float64.

    Raises:
        LedgerError: fewer than 2 examples; shapes that differ; unequal counts without inner
            products; inner products that are not those with g.

    Source: McCandlish et al. 2018, 1812.06162, appendix A.1, from all examples of a batch.
    """
    squares, inner, weights = _checked(squares, inner, counts)
    size = len(squares)
    if inner is not None:
        _check_direction(squares, inner, weights, square)
        freedom = _degrees(weights)
        from_mean = _without_pull(weights / size) * weights**2 * (squares - 2 * inner + square)
        along = square + weights * (inner - square)  # <p_i, g>
        squares = 2 * along - square + from_mean  # |p_i|^2
        h = (size * along - squares) / (size - 1)
        moves = squares - 2 * from_mean.mean() * (weights - 1)  # through mean n, that all share
        deviations = torch.stack([h - h.mean(), moves - moves.mean()])
        sums = freedom / (freedom - 1) * deviations @ deviations.T
        (var_h, cov), (_, var_p) = sums.tolist()
        trace = float(from_mean.sum()) / (size - 1)
        shift = 2 * float(((weights - 1) * along).mean()) - float(weights.var()) * trace / size
    else:
        var_h = cov = var_p = math.nan
        freedom, shift = float(size), 0.0
    second = float(squares.sum()) + shift
    signal = (size * size * square - float(squares.sum())) / (size - 1) + shift
    return NoiseEstimate(
        examples=size,
        batches=1,
        degrees=freedom,
        signal=signal,
        second=second,
        var_h=var_h,
        cov=cov,
        var_p=var_p,
        signal_square=signal**2,
        product=signal * second,
        second_square=second**2,
    )


def _checked(
    squares: Tensor, inner: Tensor | None, counts: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Squares, inner products and weights of mean 1 of the examples that count, in float64."""
    for name, given in (("inner", inner), ("counts", counts)):
        if given is not None and given.shape != squares.shape:
            raise LedgerError(
                f"noise_estimate got {name} of shape {tuple(given.shape)} with squares of shape "
                f"{tuple(squares.shape)}, expected one figure for each example in both."
            )
    weights = torch.ones_like(squares, dtype=torch.float64) if counts is None else counts.double()
    used = weights > 0
    weights, squares = weights[used], squares.double()[used]
    if len(weights) < 2:
        raise LedgerError(
            f"a noise scale was asked of {len(weights)} example(s) with a count above 0, expected "
            f"2 or more: one says nothing about how gradients differ. Take a larger batch, or "
            f"leave this one out."
        )
    if inner is None and bool((weights != weights[0]).any()):
        raise LedgerError(
            f"a noise scale was asked of counts from {float(weights.min()):g} to "
            f"{float(weights.max()):g} without inner products, expected equal counts: |g_i| alone "
            f"does not tell how far a long example is from the mean. Pass inner, <g_i, g>."
        )
    inner = None if inner is None else inner.double()[used]
    return squares, inner, weights / weights.mean()


def _without_pull(shares: Tensor) -> Tensor:
    """f_i [B], which undoes the bias of |g_i - g|^2 to order 1/B; 1 where the shares are equal.

    Its first order in l_i is that of 1 + 4 (l_i - L). The form is half way between
    ((1 - L) / (1 - l_i))^4, which is too large at small B where |g_i - G|^2 falls as 1 / n_i, and
    ((1 + l_i) / (1 + L))^4, which is too small where it does not depend on n_i.
    """
    total = shares.square().sum()
    return ((1 + shares) * (1 - total) / ((1 - shares) * (1 + total))) ** 2


def _degrees(weights: Tensor) -> float:
    """Number of equal examples whose squares would vary as much as the weighted ones."""
    squares = weights.square()
    # A single example that holds everything leaves 1, of which nothing is known: not divided by 0.
    return max(float(squares.sum() ** 2 / squares.square().sum()), 1.1)


def _check_direction(squares: Tensor, inner: Tensor, weights: Tensor, square: float) -> None:
    """mean w_i <g_i, g> = |g|^2, to the 2 % that bfloat16 leaves."""
    found = float((weights * inner).mean())
    size = math.sqrt(square * float((weights**2 * squares).mean()))
    if abs(found - square) > 0.02 * size:
        raise LedgerError(
            f"the mean inner product of an example's gradient with the batch's is {found:g}, "
            f"expected |g|^2 = {square:g}: the batch's gradient is summed where it should be "
            f"averaged, or holds a penalty. Pass that of sum n_i m_i / sum n_i."
        )


def _interval(estimate: NoiseEstimate) -> tuple[float, float]:
    """All noise scales that the estimates do not refute, from the lowest to the highest."""
    if math.isnan(estimate.var_h) and estimate.batches == 1:
        return math.nan, math.nan
    if not estimate.second:
        return 0.0, math.inf
    best = min(max(estimate.signal / estimate.second, 0.0), 1.0)

    def end(phi: float) -> float:
        """The last phi from the best one towards `phi` that is not refuted."""
        if _p_value(*_distance(estimate, phi)) >= _DOUBT:
            return phi
        inside, outside = best, phi
        for _ in range(_HALVINGS):
            middle = (inside + outside) / 2
            if _p_value(*_distance(estimate, middle)) >= _DOUBT:
                inside = middle
            else:
                outside = middle
        return inside

    smallest, largest = end(0.0), end(1.0)
    return 1 / largest - 1 if largest else math.inf, 1 / smallest - 1 if smallest else math.inf


def _distance(estimate: NoiseEstimate, phi: float) -> tuple[float, float]:
    """D as a normal deviate under phi, and phi's distance from 0 in the same units."""
    difference = estimate.signal - phi * estimate.second
    if math.isnan(estimate.var_h):
        variance, skewness, degrees = _between(estimate, phi), 0.0, estimate.batches - 1.0
    else:
        variance, skewness = _within(estimate, phi)
        degrees = estimate.degrees - estimate.batches
    deviation = math.sqrt(max(variance, (1e-9 * estimate.second) ** 2))  # rounding
    deviate = _unskewed(_as_normal(difference / deviation, degrees), skewness)
    return deviate, phi * estimate.second / deviation


def _within(estimate: NoiseEstimate, phi: float) -> tuple[float, float]:
    """Variance and skewness of D, times the examples, by how examples differ."""
    size = estimate.examples / estimate.batches
    leave_one_out = estimate.signal + (estimate.second - estimate.signal) / (size - 1)
    # tr(S^2) <= tr(S)^2; unequal counts can leave the divisor at or below 0, which tells nothing.
    k = estimate.variance
    if leave_one_out > 0:
        k = min(estimate.var_h / leave_one_out, k)
    gradient_square, trace = phi * estimate.second, (1 - phi) * estimate.second
    var_signal = k * (4 * gradient_square + 2 * trace / (size - 1))
    spread = math.sqrt(estimate.var_h * estimate.var_p)
    correlation = estimate.cov / spread if spread else 0.0
    var_second = phi**2 * estimate.var_p
    variance = var_signal + var_second - 2 * correlation * math.sqrt(var_signal * var_second)
    third = 8 * k**2 * (trace / size + 3 * gradient_square)
    return variance, third / variance**1.5 if variance > 0 else 0.0


def _between(estimate: NoiseEstimate, phi: float) -> float:
    """Variance of D, times the examples, by how batches differ."""
    squares = estimate.signal_square - 2 * phi * estimate.product + phi**2 * estimate.second_square
    mean = (estimate.signal - phi * estimate.second) / estimate.batches
    return (squares - estimate.batches * mean**2) * estimate.batches / (estimate.batches - 1)


def _p_value(deviate: float, boundary: float) -> float:
    """How often D is at least as unlikely, against the likeliest phi >= 0, as it came out.

    With x the estimate and m = boundary the truth, both in standard deviations, ordered by
    R = (x - m)^2 - min(x, 0)^2: R >= r above sqrt(r), and below min(-sqrt(r), -(m^2 + r) / (2 m)).
    """
    r = max(deviate**2 - min(deviate + boundary, 0.0) ** 2, 0.0)
    root = math.sqrt(r)
    if root <= boundary:
        return 2 * _above(root)
    return _above(root) + (_above((boundary**2 + r) / (2 * boundary)) if boundary else 0.0)


def _above(deviate: float) -> float:
    return math.erfc(deviate / math.sqrt(2)) / 2


def _as_normal(t: float, degrees: float) -> float:
    """The normal deviate as likely as Student's t. Source: Wallace 1959, equation 1.2."""
    size = math.sqrt(degrees * math.log1p(t * t / degrees)) * (8 * degrees + 1) / (8 * degrees + 3)
    return math.copysign(size, t)


def _unskewed(deviate: float, skewness: float) -> float:
    """The normal deviate as likely as that of a chi-square. Source: Wilson and Hilferty 1931."""
    degrees = 8 / min(max(skewness, 1e-3), math.sqrt(8)) ** 2
    share = max(1 + deviate * math.sqrt(2 / degrees), 0.0)
    return (math.cbrt(share) - 1 + 2 / (9 * degrees)) * math.sqrt(9 * degrees / 2)
