"""Default step of a page, on records written by hand."""

from typing import Any

import pytest

from anybatch.report.replay import choose_step, estimate_seconds, sum_data_loss


def records(losses: list[float | None], seconds: float = 0.01, **others: Any) -> list[Any]:
    """Rows of a run with these data losses and a penalty that grows by 1 a step."""
    return [
        {"kind": "step", "step": k, "parts": {"data": x, "L2": float(k)}, "seconds": seconds}
        | others
        for k, x in enumerate(losses)
    ]


FALLING = [4.0] * 20 + [2.0 - 0.1 * k for k in range(20)] + [0.0] * 160


def test_the_first_step_at_which_the_loss_has_fallen_half_of_its_way() -> None:
    figures = choose_step(records(FALLING), ["L2"], [200])
    assert figures is not None
    step, reason = figures
    assert FALLING[step] <= 2 < FALLING[step - 5]  # means of 5 steps
    assert 20 <= step <= 26
    assert "begins at 4," in reason
    assert reason.endswith("and 0 at its lowest. So some examples are learned and others are not.")


def test_a_penalty_is_no_part_of_the_loss_that_falls() -> None:
    with_it = choose_step(records(FALLING), [], [200])  # the control: the total grows
    assert with_it is not None
    assert with_it[0] != choose_step(records(FALLING), ["L2"], [200])[0]  # type: ignore[index]
    assert sum_data_loss({"data": 1.5, "router": 0.25, "L2": 9.0}, ["L2"]) == 1.75
    assert sum_data_loss({"data": None, "L2": 9.0}, ["L2"]) is None


@pytest.mark.parametrize(
    ("losses", "first", "last"),
    [
        ([1.0] * 100, 0, 20),  # nothing falls
        ([float(k) for k in range(100)], 0, 20),  # it rises
        ([-1.0 - k / 100 for k in range(100)], 45, 60),  # below 0 all along
        ([3.0], 0, 0),
        ([None, None, 2.0, 1.0, 0.0, 0.0], 3, 5),  # two of them were not finite
    ],
)
def test_runs_of_other_shapes_have_a_step_as_well(
    losses: list[float | None], first: int, last: int
) -> None:
    figures = choose_step(records(losses), ["L2"], [])
    assert figures is not None
    assert first <= figures[0] <= last


def test_a_skipped_update_moves_nothing_and_is_not_shown() -> None:
    rows = records(FALLING)
    wins = choose_step(rows, ["L2"], [])
    assert wins is not None
    rows[wins[0]]["skipped"] = True
    again = choose_step(rows, ["L2"], [])
    assert again is not None
    assert again[0] != wins[0]
    assert choose_step([row | {"skipped": True} for row in rows], ["L2"], []) is None
    assert choose_step([], ["L2"], []) is None


def test_nobody_waits_for_a_step_that_nobody_named() -> None:
    slow = records(FALLING, seconds=10.0)
    figures = choose_step(slow, ["L2"], [18, 199])
    assert figures is not None
    assert figures[0] == 19  # one update after a checkpoint, as near as 15 seconds get
    assert "closest to half of the way that is quick to make again" in figures[1]
    assert "learned" not in figures[1]
    alone = choose_step(slow, ["L2"], [])
    assert alone is not None
    assert alone[0] <= 1


def test_the_wait_counts_from_the_checkpoint_before() -> None:
    rows = records([1.0] * 10)
    for row in rows:
        row["seconds"] = 1.0 + row["step"]
    wait = estimate_seconds(rows, [4])
    assert [wait(step) for step in (0, 1, 3, 4, 6)] == [0, 1, 6, 0, 11]
    assert wait(12) == pytest.approx(sum(range(5, 11)) + 2 * 5.5)  # unknown steps: the mean
    assert estimate_seconds([], [])(7) == 0
