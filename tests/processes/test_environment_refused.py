"""A bitwise run goes on where its bits can be the same, or where that is said and recorded.

Environments differ here as far as one process can change: threads and switches of torch really do,
versions and processor are told to be others.
"""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import anybatch as ab
import training_by_hand as by_hand
from anybatch.errors import ModelError, RunError
from anybatch.runs import checkpoints
from anybatch.runs import environment as module
from anybatch.runs.environment import describe_arithmetic, use_deterministic_kernels
from command_line import refuse, run_command, write_recipe
from nested_states import same
from parted_training import Unpool
from small_training import rows, start, train_small

KEPT = ("mkldnn", "fp32_precision", "processor")


@pytest.fixture(autouse=True)
def _as_before():
    threads, mkldnn = torch.get_num_threads(), torch.backends.mkldnn.enabled
    yield
    torch.set_num_threads(threads)
    torch.backends.mkldnn.enabled = mkldnn
    torch.set_float32_matmul_precision("highest")
    torch.set_flush_denormal(False)


def left(folder, **options):
    """A bitwise run with one checkpoint, not at its end."""
    for step in start().loop(folder, bitwise=True, **options):
        step.save()
        break


def resume_run(folder, training=None, **options):
    """Resume the training, and go to its end."""
    training = training or start()
    list(training.loop(ab.Run(folder, **options), bitwise=True))
    return training


def environment_in(folder):
    """Read the environment in the newest checkpoint."""
    return checkpoints.find_newest(folder / "checkpoints").checkpoint.settings["environment"]


OTHER = torch.cpu.get_capabilities() | {"avx512_f": "unheard of"}
CHANGES = {
    "threads": (
        lambda patch: torch.set_num_threads(torch.get_num_threads() + 1),
        r"threads = \d+, and here it is \d+\. .* Call torch.set_num_threads\(\d+\) before, or set ",
    ),
    "torch": (
        lambda patch: patch.setattr(torch, "__version__", "9.9"),
        r"torch = '2\..*', and here it is '9.9'.* Install torch==2\.",
    ),
    "numpy": (
        lambda patch: patch.setattr(np, "__version__", "9.9"),
        r"numpy = '.*', and here it is '9.9'.* Install numpy==",
    ),
    "anybatch": (
        lambda patch: patch.setattr(ab, "__version__", "9.9"),
        r"anybatch = '.*', and here it is '9.9'.* Install anybatch==",
    ),
    "processor": (
        lambda patch: patch.setattr(torch.cpu, "get_capabilities", lambda: OTHER),
        r"processor.avx512_f = .*, and here it is 'unheard of'.* Go on where it is as it was;",
    ),
    "instructions": (
        lambda patch: patch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT"),
        r"instructions = '.*', and here it is 'DEFAULT'",
    ),
    "oneDNN": (
        lambda patch: setattr(torch.backends.mkldnn, "enabled", False),
        "mkldnn = True, and here it is False",
    ),
    "precision": (
        lambda patch: torch.set_float32_matmul_precision("medium"),
        r"fp32_precision\[0\] = 'ieee', and here it is 'bf16'",
    ),
    "denormals": (
        lambda patch: torch.set_flush_denormal(True),
        "flushes_denormals = False, and here it is True",
    ),
    "variable": (
        lambda patch: patch.setenv("MKL_CBWR", "COMPATIBLE"),
        "variables.MKL_CBWR = None, and here it is 'COMPATIBLE'.* Set MKL_CBWR as it was before",
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_another_environment_is_refused_by_name_or_accepted_and_recorded(
    tmp_path, monkeypatch, change
):
    changes, named = CHANGES[change]
    left(tmp_path)
    before = environment_in(tmp_path)
    changes(monkeypatch)
    with pytest.raises(RunError, match=rf"was made with environment\.{named}.*accept_environment"):
        resume_run(tmp_path)
    with pytest.raises(RunError, match="was made with environment"):  # again: nothing has changed
        resume_run(tmp_path)
    assert environment_in(tmp_path) == before
    resume_run(tmp_path, accept_environment=True)
    *_, session = rows(tmp_path, "session")
    (place,) = session["accepted"]
    assert place.startswith("environment.")
    assert session["accepted"][place]["old"] != session["accepted"][place]["new"]
    assert (
        environment_in(tmp_path)
        == json.loads(json.dumps(describe_arithmetic(start().model)))
        != before
    )
    list(start().loop(tmp_path, bitwise=True, epochs=4))  # the new one is its own now


def test_the_same_environment_goes_on_in_the_same_bits(tmp_path):
    """Control, and the end of it: an acceptance with nothing to accept leaves no word."""
    expected = start()
    list(expected.loop(bitwise=True))
    left(tmp_path)
    ended = resume_run(tmp_path, accept_environment=True)
    assert same(ended.state, expected.state)
    assert not any("accepted" in row for row in rows(tmp_path, "session"))


def test_a_run_that_is_not_bitwise_goes_on_anywhere(tmp_path):
    for step in start().loop(tmp_path):
        step.save()
        break
    torch.set_num_threads(torch.get_num_threads() + 1)
    train_small(tmp_path)
    assert (
        "environment" not in checkpoints.find_newest(tmp_path / "checkpoints").checkpoint.settings
    )


def test_another_setting_is_refused_whatever_environment_is_accepted(tmp_path):
    left(tmp_path)
    with pytest.raises(RunError, match="was begun with bitwise = True, and cannot go on with Fal"):
        train_small(ab.Run(tmp_path, accept_environment=True))
    with pytest.raises(RunError, match=r"\['environment'\], names that the loop itself compares"):
        train_small(ab.Run(tmp_path / "new", settings={"environment": 1}))


@pytest.mark.parametrize("switch", [{"fused": True}, {"foreach": True}, {"foreach": False}])
def test_another_way_to_make_the_update_is_refused(tmp_path, switch):
    left(tmp_path)
    training = start()
    (key, value), *_ = switch.items()
    for group in training.optimizer.param_groups:
        group[key] = value
    with pytest.raises(RunError, match=rf"optimizer.groups\[0\].{key} = None, .* with {value}"):
        resume_run(tmp_path, training, accept_environment=True)
    resume_run(tmp_path)  # control: as it was


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # torch.compile's own
@pytest.mark.parametrize("which", ["", "0"])
def test_a_model_compiled_only_now_or_no_more_is_refused_or_accepted(tmp_path, which):
    def compile_model():
        training = start()
        training.model.get_submodule(which).compile(backend="eager")
        return training

    left(tmp_path)
    now = rf"compiled = \[\], and here it is \['{which}'\].* Compile the same modules"
    with pytest.raises(RunError, match=now):
        resume_run(tmp_path, compile_model())
    resume_run(tmp_path, compile_model(), accept_environment=True)
    *_, session = rows(tmp_path, "session")
    assert session["accepted"] == {"environment.compiled": {"old": [], "new": [which]}}
    with pytest.raises(RunError, match=rf"compiled = \['{which}'\], and here it is \[\]"):
        resume_run(tmp_path)
    assert describe_arithmetic(nn.Sequential(torch.compile(nn.Linear(2, 2))))["compiled"] == ["0"]


def test_the_instruction_set_of_another_process_is_seen(tmp_path):
    """Run a process that really computes with other instructions."""
    if torch.backends.cpu.get_cpu_capability() == "DEFAULT":
        pytest.skip("there is no other")
    left(tmp_path)
    script = (
        "import sys, small_training, torch; from anybatch.errors import RunError\n"
        f"torch.set_num_threads({torch.get_num_threads()})\n"
        "try: list(small_training.start().loop(sys.argv[1], bitwise=True))\n"
        "except RunError as error: print(error)"
    )
    results = subprocess.run(
        [sys.executable, "-c", script, tmp_path],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[1] / "helpers",
        env=os.environ | {"ATEN_CPU_CAPABILITY": "default"},
    )
    assert "was made with environment.instructions = 'AVX" in results.stdout
    assert "and here it is 'DEFAULT'" in results.stdout


def switches():
    memory = torch.utils.deterministic.fill_uninitialized_memory
    return torch.get_deterministic_debug_mode(), memory, torch.backends.cudnn.benchmark


def test_torch_is_deterministic_in_updates_and_as_before_in_the_body():
    before, batches_seen, inside = switches(), [], []

    def losses(model, batch):
        inside.append(switches())
        return by_hand.example_losses(model, batch)

    model = by_hand.network()
    options = {"bitwise": True, "objective": ab.Objective(losses, grain=4)}
    optimizer = by_hand.sgd(model)
    by_hand.run(model, optimizer, body=lambda step: batches_seen.append(switches()), **options)
    assert set(batches_seen) == {before}
    assert set(inside) == {(2, False, False)}
    inside.clear()
    by_hand.run(model, optimizer, objective=ab.Objective(losses, grain=4), epochs=1)
    assert set(inside) == {before}  # control


class Put(nn.Module):
    """An operation of which torch says, on a CPU too, that its order is not defined."""

    def forward(self, x):
        return x + torch.zeros(3, dtype=x.dtype).put_(torch.tensor([1]), x.detach().sum()[None])


@pytest.mark.parametrize(
    ("layer", "operation"), [(Put(), "put_"), (Unpool(), "max_unpooling2d_forward_out")]
)
def test_an_operation_that_does_not_repeat_its_bits_is_refused_by_name(layer, operation):
    model = nn.Sequential(by_hand.network(), layer)
    before, weights = switches(), by_hand.weights(model)
    options = {"objective": ab.Objective(by_hand.example_losses, grain=4)}
    with pytest.raises(ModelError, match=f"the operation {operation} has no kernel that repeats"):
        by_hand.run(model, by_hand.sgd(model), bitwise=True, **options)
    assert switches() == before
    assert torch.equal(by_hand.weights(model), weights)
    by_hand.run(model, by_hand.sgd(model), epochs=1, **options)  # control


def test_an_optimiser_that_does_not_repeat_its_bits_is_refused_too():
    class Putting(torch.optim.SGD):
        def step(self, closure=None):
            torch.zeros(3).put_(torch.tensor([1]), torch.ones(1))

    model = by_hand.network()
    options = {"objective": ab.Objective(by_hand.example_losses, grain=4), "bitwise": True}
    with pytest.raises(ModelError, match="the operation put_ has no kernel"):
        by_hand.run(model, Putting(model.parameters(), lr=0.1), **options)


def test_other_errors_are_told_as_they_are():
    with pytest.raises(RuntimeError, match=r"^my own$"), use_deterministic_kernels():
        raise RuntimeError("my own")


def test_a_gpu_whose_products_do_not_repeat_their_bits_is_refused(monkeypatch):
    """Only the environment variable can be tested without a GPU."""
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: None)
    for config in (None, ":0:0"):
        monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
        if config is not None:
            monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", config)
        with pytest.raises(RunError, match=f"CUBLAS_WORKSPACE_CONFIG = {config!r}. It must be one"):
            module._describe_cuda()
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    assert module._describe_cuda()["cuda"] == torch.version.cuda


def bitwise_recipe(**run):
    return write_recipe(
        Path(), objective={"grain": 64}, run={"epochs": 2, "bitwise": True, "threads": 1, **run}
    )


def test_the_command_line_refuses_or_accepts_and_its_records_stay_readable(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_command("train", bitwise_recipe(epochs=1), "--out", "run")
    monkeypatch.setenv("MKL_CBWR", "COMPATIBLE")
    more = ("--set", "run.epochs=2")
    message = refuse("resume", "run", *more)
    assert "environment.variables.MKL_CBWR = None, and here it is 'COMPATIBLE'" in message
    assert "anybatch resume --accept-environment" in message
    run_command("resume", "run", *more, "--accept-environment")
    accepted = [row["accepted"] for row in rows(Path("run"), "session") if "accepted" in row]
    changed = {"environment.variables.MKL_CBWR": {"old": None, "new": "COMPATIBLE"}}
    assert accepted == [changed]
    for command in (("verify",), ("evaluate",), ("explain",)):
        name, *options = command
        run_command(name, "run", *options)
    run_command("resume", "run", "--set", "run.epochs=3", "--set", "run.compare_every=1")


def test_all_that_is_kept_is_plain_and_says_what_bits_depend_on():
    result = describe_arithmetic(copy.deepcopy(start().model))
    assert json.loads(json.dumps(result)) == result
    assert result["threads"] == torch.get_num_threads()
    assert result["devices"] == ["cpu"]
    assert set(KEPT) <= result.keys()
    assert not any(name.startswith("num_") for name in result["processor"])
