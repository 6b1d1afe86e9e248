"""Rule that finds a spike, and the choice of the examples behind it.

Oracle: NumPy's quantiles over the last values, written out.
"""

import numpy as np
import pytest

import anybatch as ab
from anybatch.errors import LedgerError
from anybatch.training.spike_examples import choose_examples, describe_example
from anybatch.training.spikes import History, Verdict, find_limit


def lower_median(values):
    return float(np.quantile(np.array(values), 0.5, method="lower"))


def judge_by_hand(values, sizes, window, factor, signal):
    """Say at each place whether the value is a spike."""
    verdicts = []
    for k, x in enumerate(values):
        last, batches = values[max(0, k - window) : k], sizes[max(0, k - window) : k]
        if len(last) < 20:
            verdicts.append(False)
            continue
        m = lower_median(last)
        s = max(1.4826 * lower_median(np.abs(np.array(last) - m)), 0.05 * abs(m))
        noise = max(1.0, np.sqrt(lower_median(batches) / sizes[k]))
        limit = {
            "norm": (m + factor * s) * noise,
            "loss": m + factor * s * noise,
            "example": m + factor * s,
        }[signal]
        verdicts.append(bool(x > limit))
    return verdicts


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("signal", ["loss", "norm", "example"])
@pytest.mark.parametrize(("window", "factor"), [(20, 4.0), (33, 2.0), (100, 3.0)])
def test_a_value_is_judged_by_the_median_and_the_deviation_of_those_before(
    seed, signal, window, factor
):
    random = np.random.default_rng(seed)
    values = (random.gamma(2.0, size=300) + np.linspace(5, 1, 300)).tolist()
    values[150] = 60.0
    sizes = random.choice([32, 32, 32, 7, 64], size=300).tolist()
    history = History(ab.SpikeWatch(window, factor))
    result = [history.judge({signal: x}, size) != [] for x, size in zip(values, sizes, strict=True)]
    assert result == judge_by_hand(values, sizes, window, factor, signal)
    assert result[150]
    assert not all(result[20:])


def test_the_rule_is_not_that_of_the_mean():  # the control of the oracle
    values = [1.0 + 0.01 * (k % 7) for k in range(60)] + [50.0] * 5 + [2.0]
    robust = judge_by_hand(values, [8] * 66, 50, 4.0, "loss")
    last = np.array(values[-51:-1])
    assert robust[-1]
    assert values[-1] < last.mean() + 4 * last.std()


def test_tiny_jitter_is_no_spike():
    history = History(ab.SpikeWatch())
    for k in range(50):
        assert not history.judge({"loss": 1.0 + 1e-9 * (k % 3)}, 8)
    assert not history.judge({"loss": 1.19}, 8)
    (verdict,) = history.judge({"loss": 1.21}, 8)
    assert verdict.limit == pytest.approx(1.2)


def test_losses_below_zero_are_judged_too():
    history = History(ab.SpikeWatch())
    for k in range(40):
        history.judge({"loss": -100.0 + 0.1 * (k % 5)}, 8)
    assert not history.judge({"loss": -95.0}, 8)
    assert history.judge({"loss": -70.0}, 8)


def test_a_new_level_is_no_spike_after_half_a_window():
    history = History(ab.SpikeWatch(window=40))
    for k in range(60):
        history.judge({"norm": 1.0 + 0.01 * (k % 4)}, 8)
    result = [history.judge({"norm": 5.0 + 0.01 * (k % 4)}, 8) != [] for k in range(60)]
    assert result[:20] == [True] * 20
    assert not any(result[21:])


def test_of_two_spikes_the_worse_one_comes_first():
    history = History(ab.SpikeWatch())
    for _ in range(30):
        history.judge({"loss": 1.0, "norm": 1.0}, 8)
    verdicts = history.judge({"loss": 2.0, "norm": 9.0}, 8)
    assert [verdict.signal for verdict in verdicts] == ["norm", "loss"]


def test_a_history_that_was_saved_judges_the_same():
    watch, random = ab.SpikeWatch(window=25, factor=2.0), np.random.default_rng(3)
    values = random.gamma(2.0, size=200).tolist()
    whole = History(watch)
    first = [whole.judge({"loss": x, "norm": x * x}, 8) for x in values[:90]]
    other = History(watch)
    other.load_state_dict(whole.state_dict())
    rest = [whole.judge({"loss": x, "norm": x * x}, 8) for x in values[90:]]
    again = [other.judge({"loss": x, "norm": x * x}, 8) for x in values[90:]]
    assert rest == again
    assert any(first)
    fresh = History(watch)  # the control
    assert rest != [fresh.judge({"loss": x, "norm": x * x}, 8) for x in values[90:]]


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_a_history_that_is_not_finite_is_refused(number):
    history = History(ab.SpikeWatch())
    with pytest.raises(ValueError, match="not finite"):
        history.load_state_dict({"loss": [1.0, number], "norm": [], "example": [], "size": []})


@pytest.mark.parametrize(
    "arguments", [{"window": 5}, {"window": 20.5}, {"factor": 0}, {"factor": float("inf")}]
)
def test_arguments_out_of_range_are_refused(arguments):
    with pytest.raises(LedgerError, match=f"SpikeWatch has {next(iter(arguments))}="):
        ab.SpikeWatch(**arguments)


def test_of_two_values_the_larger_can_stand_out():
    median, limit = find_limit([1.0, 10.0], 4.0)
    assert (median, limit) == (1.0, 1.2)


def make_rows(shares, heights, losses=None):
    losses = [1.0] * len(shares) if losses is None else losses
    return {
        "id": [100 + i for i in range(len(shares))],
        "loss": losses,
        "part": [loss / len(losses) for loss in losses],
        "norm": heights,
        "height": heights,
        "share": shares,
    }


NORM = Verdict("norm", 10.0, 1.0, 2.0)


def test_the_fewest_examples_without_which_the_value_is_back_at_its_median():
    shares = [0.02, 0.5, 0.02, 0.42, 0.02, 0.02]
    assert choose_examples(make_rows(shares, [1, 40, 1.1, 30, 0.9, 1]), NORM, 4.0) == [1, 3]
    shares = [0.02, 0.84, 0.05, 0.05, 0.02, 0.02]
    assert choose_examples(make_rows(shares, [1, 40, 1.1, 1, 0.9, 1]), NORM, 4.0) == [1]


def test_examples_that_do_not_explain_the_spike_are_not_named():
    shares = [0.1, 0.2, 0.18, 0.18, 0.17, 0.17]
    assert choose_examples(make_rows(shares, [1, 9, 1.1, 1, 0.9, 1]), NORM, 4.0) == []
    mild = Verdict("norm", 2.1, 1.0, 2.0)  # the control: without it there is no spike
    assert choose_examples(make_rows(shares, [1, 9, 1.1, 1, 0.9, 1]), mild, 4.0) == [1]


def test_behind_a_spike_of_the_largest_loss_are_those_above_its_limit():
    rows = make_rows([1 / 4] * 4, [1.0] * 4, losses=[0.5, 7.0, 2.0, 9.0])
    assert choose_examples(rows, Verdict("example", 9.0, 1.0, 3.0), 4.0) == [3, 1]


def test_a_batch_that_is_high_as_a_whole_names_nobody():
    shares = [0.16, 0.17, 0.18, 0.16, 0.17, 0.16]
    assert choose_examples(make_rows(shares, [9, 10, 10.5, 9, 10, 9.5]), NORM, 4.0) == []


def test_an_example_against_the_update_is_not_behind_its_size():
    shares = [-2.0, 2.9, 0.03, 0.03, 0.02, 0.02]
    assert choose_examples(make_rows(shares, [30, 40, 1, 1, 1, 1]), NORM, 4.0) == [1]


def test_behind_a_spike_of_the_loss_are_the_largest_losses():
    rows = make_rows([1 / 6] * 6, [1.0] * 6, losses=[0.1, 0.2, 9.0, 0.1, 0.2, 0.1])
    assert choose_examples(rows, Verdict("loss", 1.6, 0.15, 0.2), 4.0) == [2]


def test_an_only_example_is_behind_its_spike():
    assert choose_examples(make_rows([1.0], [5.0]), NORM, 4.0) == [0]


def test_what_is_odd_is_said_in_words():
    rows = make_rows([0.9, 0.05, 0.05], [60.0, 2.0, 3.0], losses=[8.0, 1.0, 2.0]) | {
        "length": [90, 30, 31],
        "content": ["a", "b", "a"],
        "label": [1, 0, 0],
    }
    example = describe_example(rows, 0, [2.0, 4.0, 4.0])
    assert example.findings == (
        "its gradient is 20 times as long as the median of the batch",
        "its gradient is 15 times as long as at its 3 earlier visits",
        "its loss is 4 times the median of the batch",
        "its length is 2.9 times the median of the batch",
        "the same inputs as example 102 with another label",
        "its label is 1, as in 0 of 2 others",
    )
    assert str(example).startswith("example 100: share 0.9, norm 60, loss 8; its gradient")
    plain = describe_example(rows, 1, [])  # the control
    assert plain.findings == ("its label is 0, as in 1 of 2 others",)
