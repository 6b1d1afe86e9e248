"""Records: one row a step, none lost or doubled, floats bit for bit, always JSON."""

import hashlib
import json
import math
import operator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import anybatch as ab
from anybatch.errors import RunError
from anybatch.runs.records import Records, read_records, smooth_averages
from properties import seeded_examples
from small_training import noting, rows, start, train_small


def test_a_row_says_what_the_step_said(tmp_path):
    steps = []
    train_small(tmp_path, lambda _, step: steps.append(step))
    without_averages = [
        {name: value for name, value in row.items() if name != "averages"} for row in rows(tmp_path)
    ]
    assert without_averages == [
        {
            "kind": "step",
            "step": step.step,
            "epoch": step.epoch,
            "examples": step.examples,
            "loss": step.loss,
            "parts": step.parts,
            "metrics": step.metrics,
            "lr": step.lr,
        }
        for step in steps
    ]
    assert [step.step for step in steps] == list(range(9))


def by_weights(values, smoothing):
    """Compute the oracle: moving averages as sums, each from its first value.

    a_t = s^t x_0 + (1 - s) sum_k s^(t - k) x_k,    k from 1 to t
    """
    weights = [
        [smoothing**t, *((1 - smoothing) * smoothing ** (t - k) for k in range(1, t + 1))]
        for t in range(len(values))
    ]
    return [math.fsum(map(operator.mul, some, values)) for some in weights]


@seeded_examples(100)
@given(
    values=st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=20),
    smoothing=st.floats(0, 0.999),
)
def test_averages_are_weighted_sums_of_what_came_before(values, smoothing):
    averages, result = {}, []
    for value in values:
        averages = smooth_averages(averages, {"loss": value}, smoothing)
        result.append(averages["loss"])
    # Twenty steps round twice each, to 1e-16 of 1e3.
    assert result == pytest.approx(by_weights(values, smoothing), rel=0, abs=1e-11)


def test_averages_that_began_at_zero_would_be_seen():
    """Control: the classic start, which drags the first averages down."""
    began = by_weights([0.0, 3.0, 2.0, 4.0], 0.9)[1:]
    assert began != pytest.approx(by_weights([3.0, 2.0, 4.0], 0.9), rel=0, abs=0.1)


def test_a_row_has_the_averages_of_the_loss_and_of_each_part(tmp_path):
    train_small(ab.Run(tmp_path, smoothing=0.5))
    result = rows(tmp_path)
    for name in ("data", "L2"):
        expected = by_weights([row["parts"][name] for row in result], 0.5)
        assert [row["averages"][name] for row in result] == pytest.approx(expected, rel=1e-14)
    expected = by_weights([row["loss"] for row in result], 0.5)
    assert [row["averages"]["loss"] for row in result] == pytest.approx(expected, rel=1e-14)


def test_averages_go_on_when_the_smoothing_changes_and_begin_where_there_were_none(tmp_path):
    noting(ab.Run(tmp_path, smoothing=0.5), 5)
    file = tmp_path / "records.jsonl"
    before = rows(tmp_path, "step")[2]["averages"]  # of the last update in a checkpoint
    noting(ab.Run(tmp_path, smoothing=0))
    first = rows(tmp_path, "step")[3]
    assert first["averages"] == {**first["parts"], "loss": first["loss"]}
    assert first["averages"] != before
    file.write_text(file.read_text().replace("averages", "former"))
    (tmp_path / "checkpoints" / "step-000000000009").rename(tmp_path / "aside")
    noting(ab.Run(tmp_path))  # from 6 updates, as after a session of a version without averages
    first = rows(tmp_path, "step")[6]
    assert first["averages"] == {**first["parts"], "loss": first["loss"]}


def test_a_row_without_a_loss_or_with_one_that_is_not_finite_leaves_the_averages(tmp_path):
    run = ab.Run(tmp_path)
    for row in ({"loss": 2.0}, {}, {"loss": math.nan, "parts": {"data": math.inf}}, {"loss": 3.0}):
        run.record({"kind": "step", "step": 0, **row})
    run.close()
    result = [row["averages"] for row in rows(tmp_path)]
    assert result == [{"loss": 2.0}] * 3 + [{"loss": pytest.approx(2.1, rel=1e-15)}]


@pytest.mark.slow
@pytest.mark.parametrize("every", [1, 2, None])
def test_no_row_is_lost_or_doubled_by_stops_and_the_users_rows_stay(tmp_path, every):
    noting(ab.Run(tmp_path / "whole"))
    for stop in range(1, 9):
        noting(ab.Run(tmp_path / "cut", checkpoint_every=every), stop)
    noting(ab.Run(tmp_path / "cut"))
    assert rows(tmp_path / "cut") == rows(tmp_path / "whole")
    assert len(rows(tmp_path / "cut", "note")) == 9
    assert len(rows(tmp_path / "cut", "session")) == 9


def test_rows_doubled_or_lost_would_be_seen(tmp_path):
    """Control: what a run would hold that only appended, and one that dropped too much."""
    noting(ab.Run(tmp_path))
    whole, file = rows(tmp_path), tmp_path / "records.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    for wrong in (lines + lines[-1:], lines[:-1], lines[:3] + lines[4:]):
        file.write_text("".join(wrong))
        assert rows(tmp_path) != whole


def test_a_session_row_written_before_the_loop_stays(tmp_path):
    noting(ab.Run(tmp_path), 5)
    run = ab.Run(tmp_path)
    run.record({"kind": "session", "step": 0, "changes": ["epochs=4"]})
    noting(run)
    sessions = rows(tmp_path, "session")
    assert [row["step"] for row in sessions] == [0, 0, 3]
    assert sessions[1]["changes"] == ["epochs=4"]
    assert {"torch", "numpy", "threads", "instructions", "cores", "git"} <= sessions[2].keys()


@pytest.mark.parametrize("torn", ['{"kind": "st', '{"kind": "step", "step": 3}', "\0\0\0", "\xff"])
def test_a_torn_last_line_survives(tmp_path, torn):
    noting(ab.Run(tmp_path / "whole"))
    noting(ab.Run(tmp_path / "cut"), 4)
    with (tmp_path / "cut" / "records.jsonl").open("ab") as file:
        file.write(torn.encode("latin1"))
    assert len(rows(tmp_path / "cut")) == 8
    run = ab.Run(tmp_path / "cut")
    run.record({"kind": "session", "step": 0, "changes": []})  # does not join the torn line
    noting(run)
    assert len(rows(tmp_path / "cut", "session")) == 3
    assert rows(tmp_path / "cut") == rows(tmp_path / "whole")


@pytest.mark.parametrize("line", ["no JSON", "[1, 2]", '{"kind": "step"}', "\xff"])
def test_a_damaged_line_in_the_middle_is_named_and_left(tmp_path, line):
    noting(ab.Run(tmp_path), 4)
    file = tmp_path / "records.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    lines[2] = line + "\n"
    file.write_bytes("".join(lines).encode("latin1"))
    before = file.read_bytes()
    with pytest.raises(RunError, match=r"records.jsonl, line 3: .* is no JSON object with 'kind'"):
        noting(ab.Run(tmp_path))
    assert file.read_bytes() == before


@seeded_examples(200)
@given(value=st.floats())
def test_floats_come_back_bit_for_bit_and_those_not_finite_as_null(tmp_path_factory, value):
    path = tmp_path_factory.mktemp("records") / "records.jsonl"
    records = Records(path)
    records.append({"kind": "note", "step": 0, "x": value, "in": {"list": [value, 1], "t": True}})
    records.close()
    json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    (row,) = read_records(path)
    expected = value if math.isfinite(value) else None
    assert [row["x"], row["in"]["list"][0]] == [expected] * 2
    assert str(row["x"]) == str(expected)  # -0.0 is not 0.0
    assert row["in"]["t"] is True


@pytest.mark.parametrize("how", ["flush", "close", "another row", "many rows"])
def test_rows_that_wait_are_written_in_their_order_by(how, tmp_path):
    records = Records(tmp_path / "records.jsonl")
    rows = [
        {"kind": "step", "step": k, "loss": k / 7} for k in range(64 if how == "many rows" else 3)
    ]
    for row in rows:
        records.append_later(row)
    if how == "another row":
        rows.append({"kind": "evaluation", "step": 2})
        records.append(rows[-1])
    if how == "close":
        records.close()
        with pytest.raises(RunError, match="is closed"):
            records.append_later(rows[0])
    else:
        records.flush()
    content = (tmp_path / "records.jsonl").read_bytes()
    assert read_records(tmp_path / "records.jsonl") == rows
    assert records.state == (len(content), hashlib.sha256(content).hexdigest())
    records.close()


def test_a_waiting_row_that_is_no_json_loses_no_row_before_it(tmp_path):
    records = Records(tmp_path / "records.jsonl")
    rows = [{"kind": "step", "step": k} for k in range(3)]
    for row in (*rows, {"kind": "step", "step": 3, "loss": object()}):
        records.append_later(row)
    with pytest.raises(RunError, match="is no plain JSON"):
        records.flush()
    records.close()
    assert read_records(tmp_path / "records.jsonl") == rows


def test_json_alone_would_write_what_is_no_json():
    """Control: the check of the test above fails on what `json.dumps` writes."""
    with pytest.raises(pytest.fail.Exception, match="NaN is no JSON"):
        json.loads(
            json.dumps([math.nan]),
            parse_constant=lambda name: pytest.fail(f"{name} is no JSON"),
        )


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"step": 0}, r"no 'kind' \(str\) or no 'step'"),
        ({"kind": "note"}, r"no 'kind' \(str\) or no 'step'"),
        ({"kind": "note", "step": "0"}, r"no 'kind' \(str\) or no 'step'"),
        ({"kind": "note", "step": 0, "x": torch.ones(2)}, "plain JSON.*Tensor is not JSON"),
    ],
)
def test_a_row_that_could_not_be_read_again_is_refused(tmp_path, row, message):
    run = ab.Run(tmp_path)
    with pytest.raises(RunError, match=message):
        run.record(row)
    run.close()
    assert rows(tmp_path) == []


def test_a_closed_run_says_so(tmp_path):
    run = ab.Run(tmp_path)
    last = None
    for step in start().loop(run):
        last = step
    for late in (lambda: run.record({"kind": "note", "step": 8}), last.save):
        with pytest.raises(RunError, match="is closed, because its loop has ended"):
            late()
