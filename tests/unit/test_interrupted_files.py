"""A signal during a read or write of tensors stays a signal: it is no damage and no full disk.

torch reads and writes through C++, which turns an exception of the file's methods into an error of
its own. Each call of a method raises once, at its turn, as a signal's handler does.
"""

import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import typer

from anybatch.cli.mistakes import guard_command
from anybatch.errors import CheckpointError
from anybatch.runs.tensor_files import store, unpickle


class Interrupted:
    """File of which one call of one method raises an exception."""

    def __init__(self, file: Any, method: str, call: int, error: BaseException) -> None:
        self._file, self._method, self._call, self._error = file, method, call, error
        self.num_calls = 0

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._file, name)
        if name != self._method:
            return value

        def call(*arguments: Any) -> Any:
            self.num_calls += 1
            if self.num_calls == self._call:
                raise self._error
            return value(*arguments)

        return call


def catch(action: Callable[[], object]) -> BaseException | None:
    """Return what an action raises, a signal's exception included."""
    try:
        action()
    except BaseException as error:
        return error
    return None


def get_exit_code(command: Callable[[], None]) -> int:
    """Return the exit code of a command."""
    end = catch(guard_command(command, needs_torch=False))
    assert isinstance(end, typer.Exit)
    return end.exit_code


@pytest.fixture
def tensors(tmp_path: Path) -> Path:
    """Save a state of several tensors to a file."""
    path = tmp_path / "state.pt"
    torch.save({str(i): torch.full((50,), float(i)) for i in range(5)}, path)
    return path


@pytest.mark.parametrize("method", ["read", "readinto"])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(5, "input/output error")])
def test_an_error_in_any_read_is_raised_as_it_came(
    tensors: Path, method: str, error: BaseException
) -> None:
    with tensors.open("rb") as plain:
        whole: Any = Interrupted(plain, method, 0, error)
        assert unpickle(whole, "cpu", tensors)["3"].tolist() == [3.0] * 50
    if method == "read":
        assert whole.num_calls > 3
    for turn in range(1, whole.num_calls + 1):
        with tensors.open("rb") as plain:
            file: Any = Interrupted(plain, method, turn, error)
            assert catch(partial(unpickle, file, "cpu", tensors)) is error


def test_damage_is_still_damage(tensors: Path) -> None:  # the control
    content = tensors.read_bytes()
    tensors.write_bytes(content[: len(content) // 2])
    with tensors.open("rb") as file, pytest.raises(CheckpointError, match=r"state\.pt"):
        unpickle(file, "cpu", tensors)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "no space left on device")])
def test_an_error_in_any_write_is_raised_as_it_came(tmp_path: Path, error: BaseException) -> None:
    value = [torch.full((50,), float(i)) for i in range(3)]

    files: list[Interrupted] = []

    def save(turn: int) -> BaseException | None:
        def write(out: Any) -> None:
            out.file = Interrupted(out.file, "write", turn, error)
            files.append(out.file)
            torch.save(value, out)

        return catch(lambda: store(tmp_path / f"{turn}.pt", write))

    assert save(0) is None
    num_calls = files[0].num_calls
    assert num_calls > 3
    assert all(save(turn) is error for turn in range(1, num_calls + 1))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("hides", [True, False])
def test_a_command_that_takes_a_signal_for_something_else_ends_with_its_code(
    number: signal.Signals, code: int, hides: bool
) -> None:
    def command() -> None:
        try:
            signal.raise_signal(number)
        except KeyboardInterrupt:
            if not hides:
                raise
        raise typer.Exit(2)  # as `verify` does once it has taken the signal for damage

    assert get_exit_code(command) == code


def test_without_a_signal_the_command_chooses_its_code() -> None:  # the control
    def command() -> None:
        raise typer.Exit(2)

    assert get_exit_code(command) == 2
