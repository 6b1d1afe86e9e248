"""Noise of a gradient: the simple noise scale and its interval, from the gradients of examples.

    B_simple = tr(S) / |G|^2,    G = E g_i,  S = Cov g_i

g_i is the gradient of example i, n_i its count, w_i = n_i / mean n, g = mean w_i g_i the gradient
of a batch of B examples. Let p_i = g + w_i (g_i - g). Its mean is g, and p_i = g_i if counts are
equal.

    h_i = (B <p_i, g> - |p_i|^2) / (B - 1)    its inner product with the mean of the others
    |G|^2 ~ mean h_i,    |G|^2 + tr(S) ~ mean |p_i|^2

Both are unbiased if counts are equal. Otherwise S = Cov w_i (g_i - G) is B times the variance of g
for large B, and both are ratio estimators, with a bias that is corrected to order 1/B:

    |g_i - g|^2  <-  f_i |g_i - g|^2,    f_i = ((1 + l_i) (1 - L) / ((1 - l_i) (1 + L)))^2
    |G|^2        <-  |G|^2 + 2 Cov(w_i, <p_i, g>) / B - Var(w) tr(S) / B^2

l_i = w_i / B is the share of example i in g, which pulls g towards g_i; L = sum l_i^2. Both figures
are sums over examples, so batches are added up before one division.

A bias of order 1/B^2 and either sign remains if few examples hold most of the counts. With counts
of 1 for 80 % of the examples and 12 for the others it is under 2 % of tr(S) at B = 32, and 7 % at B
= 16. The correction omits 6 |Cov(w_i, p_i)|^2 / B, which the figures of single examples do not
show. It matters if long examples have another gradient on average.

The interval belongs to phi = |G|^2 / (|G|^2 + tr(S)), B_simple = 1 / phi - 1. It contains every phi
whose D = |G|^2_hat - phi (|G|^2 + tr(S))_hat is not too far from 0. The variance under that phi is

    Var |G|^2_hat = k (4 |G|^2 / B + 2 tr(S) / (B (B - 1))),    k = G'SG / |G|^2 = tr(S^2) / tr(S)

The two k are set equal, and estimated by Var h / (|G|^2 + tr(S) / (B - 1)). This is right if G is
far above or far below the noise, and in between if G lies in S as noise does. The skewness of a
chi-square is taken into account, and phi >= 0. With equal counts Var h may come from some of the
examples: a quarter, and 64 at least, gave as good intervals in batches of 256. Unequal counts leave
(sum w^2)^2 / sum w^4 degrees of freedom and not B. The interval then contains the truth in 87 to 97
of 100 batches of 32 with the counts above.
"""

import math
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from anybatch.errors import LedgerError

__all__ = ["NoiseEstimate", "NoiseScale", "choose_stride", "noise_estimate"]

_DOUBT = 0.05  # 1 - 0.95
_HALVINGS = 30  # to 1e-9 of phi


@dataclass(frozen=True, slots=True, kw_only=True)
class NoiseScale:
    """Simple noise scale of a gradient, in examples.

    Example:
        >>> NoiseScale(value=300.0, low=200.0, high=500.0, examples=4096).value
        300.0
    """

    value: float  # tr(S) / |G|^2; nan if |G|^2 is not resolved
    low: float  # 95 % interval; nan if its width is unknown
    high: float  # inf if |G|^2 is not resolved
    examples: int  # number of examples behind it


@dataclass(frozen=True, slots=True, kw_only=True)
class NoiseEstimate:
    """Sums over batches that estimate |G|^2 and tr(S); `a + b` estimates from both.

    Var and Cov run over the examples of a batch, sums over batches of B examples.

    Example:
        >>> g = torch.randn(64, 10)
        >>> mean = g.mean(0)
        >>> estimate = noise_estimate(g.square().sum(1), g @ mean, None, float(mean @ mean))
        >>> (estimate + estimate).scale().examples
        128
    """

    examples: int
    batches: int
    degrees: float  # sum of (sum w^2)^2 / sum w^4, which is B if counts are equal
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
        """|G|^2, without bias; it can fall below 0 if G is small against the noise."""
        return self.signal / self.examples

    @property
    def variance(self) -> float:
        """tr(S): the gradient of a batch of B examples has the variance tr(S) / B."""
        return (self.second - self.signal) / self.examples

    def scale(self) -> NoiseScale:
        """Compute the noise scale and its interval.

        Returns:
            The noise scale. Its interval follows from the examples if inner products are known,
            otherwise from the differences between batches. A single batch without inner products
            has an interval of nan, and a value if |G|^2 is estimated above 0.

        Source: Fieller 1954 (the test of a ratio); Feldman and Cousins 1998, physics/9711021,
            section IV.B (a quantity that cannot be below 0); Dempster 1958 (chi-square with
            tr(S)^2 / tr(S^2) degrees of freedom for a mean in many dimensions).
        """
        variance = max(self.variance, 0.0)  # rounding can make it negative if all g_i are equal
        ratio = variance / self.gradient_square if self.signal > 0 else math.nan
        low, high = _find_interval(self) if math.isfinite(self.second) else (math.nan, math.nan)
        value = math.nan if high == math.inf else ratio
        return NoiseScale(value=value, low=low, high=high, examples=self.examples)


@torch.no_grad()
def noise_estimate(
    squares: Tensor, inner: Tensor | None, counts: Tensor | None, square: float
) -> NoiseEstimate:
    """Estimate |G|^2 and tr(S) from one batch.

    It is not defined with batch normalisation, with clipping, or with a reduction other than Mean
    and Sum: the gradient is then no mean of independent ones. If batches are drawn without
    replacement from a finite data set of D examples, tr(S) has the divisor D - 1, and |G|^2 belongs
    to the population behind the data, |g_D|^2 - tr(S) / D: a batch differs from g_D by
    tr(S) (1/B - 1/D).

    Args:
        squares: |g_i|^2 [B], g_i the gradient of the example's own mean loss.
        inner: <g_i, g> [B], only needed for the interval if counts are equal: then it may be nan
            for some examples, taken at random, or None, unknown for all.
        counts: n_i [B]; None: all equal. Examples of count 0 are left out.
        square: |g|^2 of the mean gradient of the batch, sum n_i g_i / sum n_i, without penalty.

    Returns:
        Sums in float64, to be added to those of other batches.

    Raises:
        LedgerError: fewer than 2 examples; shapes that differ; unequal counts without inner
            products; inner products with another vector than g.

    Source: McCandlish et al. 2018, 1812.06162, appendix A.1, from all examples of a batch.

    Example:
        >>> g = torch.tensor([[1.0, 1.0], [1.0, -1.0]])
        >>> mean = g.mean(0)
        >>> estimate = noise_estimate(g.square().sum(1), g @ mean, None, float(mean @ mean))
        >>> estimate.gradient_square, estimate.variance
        (0.0, 2.0)
    """
    squares, inner, weights = _select_examples(squares, inner, counts)
    size, shift = len(squares), 0.0
    has_inner = slice(None) if inner is None or _differ(weights) else ~inner.isnan()
    if inner is None or len(inner[has_inner]) < 2:
        h, moves, has_inner = squares * math.nan, squares, slice(None)
    elif len(inner[has_inner]) < size:
        h, moves = (size * inner - squares)[has_inner] / (size - 1), squares[has_inner]
    else:
        _check_direction(squares, inner, weights, square)
        from_mean = _correct_pull(weights / size) * weights**2 * (squares - 2 * inner + square)
        along = square + weights * (inner - square)  # <p_i, g>
        squares = 2 * along - square + from_mean  # |p_i|^2
        h = (size * along - squares) / (size - 1)
        moves = squares - 2 * from_mean.mean() * (weights - 1)  # all examples share mean n
        trace = float(from_mean.sum()) / (size - 1)
        shift = 2 * float(((weights - 1) * along).mean()) - float(weights.var()) * trace / size
    degrees = _count_degrees(weights[has_inner])
    deviations = torch.stack([h - h.mean(), moves - moves.mean()])
    sums = size / len(h) * degrees / (degrees - 1) * deviations @ deviations.T
    (var_h, cov), (_, var_p) = sums.tolist()
    second = float(squares.sum()) + shift
    signal = (size * size * square - float(squares.sum())) / (size - 1) + shift
    return NoiseEstimate(
        examples=size,
        batches=1,
        degrees=degrees,
        signal=signal,
        second=second,
        var_h=var_h,
        cov=cov,
        var_p=var_p,
        signal_square=signal**2,
        product=signal * second,
        second_square=second**2,
    )


def _select_examples(
    squares: Tensor, inner: Tensor | None, counts: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Return squares, inner products and weights (mean 1) of examples with a count, in float64."""
    for name, tensor in (("inner", inner), ("counts", counts)):
        if tensor is not None and tensor.shape != squares.shape:
            raise LedgerError(
                f"noise_estimate got {name} of shape {tuple(tensor.shape)} and squares of shape "
                f"{tuple(squares.shape)}. Both need one number for each example."
            )
    weights = torch.ones_like(squares, dtype=torch.float64) if counts is None else counts.double()
    mask = weights > 0
    weights, squares = weights[mask], squares.double()[mask]
    if len(weights) < 2:
        raise LedgerError(
            f"A batch with {len(weights)} example(s) of a count above 0 has no noise scale. It "
            f"needs 2 or more, whose gradients differ. Take a larger batch, or leave this one out."
        )
    if inner is None and _differ(weights):
        raise LedgerError(
            f"The counts lie between {float(weights.min()):g} and {float(weights.max()):g}, and "
            f"inner products are missing. |g_i| alone does not show how far a long example is "
            f"from the mean. Pass inner, <g_i, g>, or equal counts."
        )
    inner = None if inner is None else inner.double()[mask]
    return squares, inner, weights / weights.mean()


def choose_stride(counts: Tensor) -> int:
    """Choose k for a batch of these counts: every k-th example needs its inner product.

    With equal counts only the interval takes them, and 64 examples or a quarter are enough.
    """
    return 1 if not len(counts) or _differ(counts) else min(4, max(1, len(counts) // 64))


def _differ(weights: Tensor) -> bool:
    return bool((weights != weights[0]).any())


def _correct_pull(shares: Tensor) -> Tensor:
    """Compute f_i [B], which corrects the bias of |g_i - g|^2 to order 1/B; 1 for equal shares.

    Its first order in l_i is 1 + 4 (l_i - L). The form is half way between
    ((1 - L) / (1 - l_i))^4, too large at small B if |g_i - G|^2 falls as 1 / n_i, and
    ((1 + l_i) / (1 + L))^4, too small if it does not depend on n_i.
    """
    total = shares.square().sum()
    return ((1 + shares) * (1 - total) / ((1 - shares) * (1 + total))) ** 2


def _count_degrees(weights: Tensor) -> float:
    """Return the number of equal examples whose squares would vary as much as the weighted ones."""
    squares = weights.square()
    # If one example holds everything the number is 1. The caller divides by one less.
    return max(float(squares.sum() ** 2 / squares.square().sum()), 1.1)


def _check_direction(squares: Tensor, inner: Tensor, weights: Tensor, square: float) -> None:
    """Check that mean w_i <g_i, g> = |g|^2, up to the 2 % that bfloat16 leaves."""
    mean = float((weights * inner).mean())
    size = math.sqrt(square * float((weights**2 * squares).mean()))
    if abs(mean - square) > 0.02 * size:
        raise LedgerError(
            f"The mean inner product of an example's gradient with the batch's is {mean:g}. It "
            f"should be |g|^2 = {square:g}. Pass the gradient of sum n_i m_i / sum n_i, which is "
            f"averaged and not summed, and contains no penalty."
        )


def _find_interval(estimate: NoiseEstimate) -> tuple[float, float]:
    """Return the lowest and the highest noise scale that the estimates do not refute."""
    if math.isnan(estimate.var_h) and estimate.batches == 1:
        return math.nan, math.nan
    if not estimate.second:
        return 0.0, math.inf
    best = min(max(estimate.signal / estimate.second, 0.0), 1.0)

    def find_end(phi: float) -> float:
        """Find the last phi that is not refuted, from the best one towards `phi`."""
        if _compute_p_value(*_measure_distance(estimate, phi)) >= _DOUBT:
            return phi
        inside, outside = best, phi
        for _ in range(_HALVINGS):
            middle = (inside + outside) / 2
            if _compute_p_value(*_measure_distance(estimate, middle)) >= _DOUBT:
                inside = middle
            else:
                outside = middle
        return inside

    smallest, largest = find_end(0.0), find_end(1.0)
    return 1 / largest - 1 if largest else math.inf, 1 / smallest - 1 if smallest else math.inf


def _measure_distance(estimate: NoiseEstimate, phi: float) -> tuple[float, float]:
    """Return D as a normal deviate under phi, and the distance of phi from 0 in the same units."""
    difference = estimate.signal - phi * estimate.second
    if math.isnan(estimate.var_h):
        variance, skewness = _estimate_between_batches(estimate, phi), 0.0
        degrees = estimate.batches - 1.0
    else:
        variance, skewness = _estimate_within_batches(estimate, phi)
        degrees = estimate.degrees - estimate.batches
    deviation = math.sqrt(max(variance, (1e-9 * estimate.second) ** 2))  # rounding
    deviate = _remove_skewness(_convert_t(difference / deviation, degrees), skewness)
    return deviate, phi * estimate.second / deviation


def _estimate_within_batches(estimate: NoiseEstimate, phi: float) -> tuple[float, float]:
    """Estimate variance and skewness of D, times the examples, from how examples differ."""
    size = estimate.examples / estimate.batches
    leave_one_out = estimate.signal + (estimate.second - estimate.signal) / (size - 1)
    # tr(S^2) <= tr(S)^2. Unequal counts can make the divisor 0 or negative, and so useless.
    k = estimate.variance
    if leave_one_out > 0:
        k = min(estimate.var_h / leave_one_out, k)
    gradient_square, trace = phi * estimate.second, (1 - phi) * estimate.second
    var_signal = k * (4 * gradient_square + 2 * trace / (size - 1))
    deviations = math.sqrt(estimate.var_h * estimate.var_p)
    correlation = estimate.cov / deviations if deviations else 0.0
    var_second = phi**2 * estimate.var_p
    variance = var_signal + var_second - 2 * correlation * math.sqrt(var_signal * var_second)
    third = 8 * k**2 * (trace / size + 3 * gradient_square)
    return variance, third / variance**1.5 if variance > 0 else 0.0


def _estimate_between_batches(estimate: NoiseEstimate, phi: float) -> float:
    """Estimate the variance of D, times the examples, from how batches differ."""
    squares = estimate.signal_square - 2 * phi * estimate.product + phi**2 * estimate.second_square
    mean = (estimate.signal - phi * estimate.second) / estimate.batches
    return (squares - estimate.batches * mean**2) * estimate.batches / (estimate.batches - 1)


def _compute_p_value(deviate: float, boundary: float) -> float:
    """Return how often D is at least as unlikely, against the likeliest phi >= 0, as it is here.

    Let x be the estimate and m = boundary the truth, both in standard deviations, sorted by
    R = (x - m)^2 - min(x, 0)^2. R >= r above sqrt(r), and below min(-sqrt(r), -(m^2 + r) / (2 m)).
    """
    r = max(deviate**2 - min(deviate + boundary, 0.0) ** 2, 0.0)
    root = math.sqrt(r)
    if root <= boundary:
        return 2 * _compute_tail(root)
    lower = _compute_tail((boundary**2 + r) / (2 * boundary)) if boundary else 0.0
    return _compute_tail(root) + lower


def _compute_tail(deviate: float) -> float:
    """Return the probability that a normal deviate is larger."""
    return math.erfc(deviate / math.sqrt(2)) / 2


def _convert_t(t: float, degrees: float) -> float:
    """Convert Student's t to a normal deviate. Source: Wallace 1959, equation 1.2."""
    size = math.sqrt(degrees * math.log1p(t * t / degrees)) * (8 * degrees + 1) / (8 * degrees + 3)
    return math.copysign(size, t)


def _remove_skewness(deviate: float, skewness: float) -> float:
    """Convert a chi-square deviate to a normal one. Source: Wilson and Hilferty 1931."""
    degrees = 8 / min(max(skewness, 1e-3), math.sqrt(8)) ** 2
    share = max(1 + deviate * math.sqrt(2 / degrees), 0.0)
    return (math.cbrt(share) - 1 + 2 / (9 * degrees)) * math.sqrt(9 * degrees / 2)
