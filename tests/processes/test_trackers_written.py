"""Files of each tracker are read back by its own reader, after a crash and a resume.

The oracle is the file of the records, flattened here by hand. Numbers must be the same: bit for
bit in MLflow and W&B, which keep doubles; to float32 in TensorBoard, which keeps those.
"""

import os
import shutil
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import contextmanager
from pathlib import Path
from socket import create_server
from subprocess import PIPE, STDOUT
from tempfile import TemporaryDirectory

import numpy as np
import pytest

import anybatch as ab
import tracked_training
import wandb_files
from anybatch.runs.records import read_records
from anybatch.runs.trackers import tracker_named
from small_training import start

pytestmark = pytest.mark.filterwarnings(
    "ignore:The ``noload`` loader strategy is deprecated:DeprecationWarning"  # MLflow's models
)
STEPS = list(range(9))


@contextmanager
def proxy():
    """Requests that programs make while it is there; none is let out."""
    requests = []
    with create_server(("127.0.0.1", 0)) as server:

        def listen():
            while True:
                try:
                    with server.accept()[0] as connection:
                        requests.append(connection.recv(99))
                except OSError:
                    return

        threading.Thread(target=listen, daemon=True).start()
        address = f"http://127.0.0.1:{server.getsockname()[1]}"
        names = ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy")
        yield requests, dict.fromkeys(names, address)


def start_script(*program, **more):
    """Python as outside of tests, where packages feel free to report home."""
    silent = ("CI", "PYTEST_CURRENT_TEST", "NO_PROXY", "no_proxy")
    outside = {name: value for name, value in os.environ.items() if name not in silent}
    return subprocess.Popen(
        [sys.executable, *program], env=outside | more, stdin=PIPE, stdout=PIPE, stderr=STDOUT
    )


@pytest.fixture(scope="module")
def memory():
    """A folder in memory where there is one: making MLflow's database waits long for a disk."""
    place = Path("/dev/shm")
    with TemporaryDirectory(dir=place if os.access(place, os.W_OK) else None) as folder:
        yield Path(folder)


@pytest.fixture(scope="module")
def tracking_run(memory):
    """A run of three sessions, the second of which has crashed; what was asked of the net; and
    the id that W&B had given it."""
    folder = memory / "mine"
    with proxy() as (requests, address):
        process = start_script(tracked_training.__file__, folder, WANDB_MODE="online", **address)
        results, _ = process.communicate(timeout=120)
        assert (process.returncode, results) == (9, b"")
    (before,) = {file.stem for file in folder.glob("wandb/offline-run-*/*.wandb")}
    trackers = [tracker_named(name) for name in tracked_training.NAMES]
    for _ in start().loop(ab.Run(folder, trackers=trackers)):
        pass
    return folder, requests, before


def expect_numbers(folder: Path) -> dict[int, dict[str, float]]:
    """Compute the numbers of each step."""
    return {
        row["step"]: {name: row[name] for name in ("loss", "lr", "epoch", "examples", "seconds")}
        | {
            f"{group}/{name}": value
            for group in ("parts", "averages", "metrics")
            for name, value in row[group].items()
        }
        for row in read_records(folder / "records.jsonl")
        if row["kind"] == "step"
    }


@pytest.mark.smoke
def test_tensorboard_shows_each_step_once(tracking_run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder, truth = tracking_run[0], expect_numbers(tracking_run[0])
    accumulator = EventAccumulator(str(folder / "tensorboard")).Reload()
    assert set(accumulator.Tags()["scalars"]) == set(truth[0])
    for name in truth[0]:
        events = accumulator.Scalars(name)
        assert [event.step for event in events] == STEPS
        assert [event.value for event in events] == [np.float32(truth[t][name]) for t in STEPS]
    (settings,) = accumulator.Tensors("settings/text_summary")
    assert b'"order": "Order(' in settings.tensor_proto.string_val[0]


def test_without_taking_back_steps_would_show_twice(tracking_run):
    """Control: the same events without TensorBoard's heed of where a session begins."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(
        str(tracking_run[0] / "tensorboard"), purge_orphaned_data=False
    ).Reload()
    steps = Counter(event.step for event in accumulator.Scalars("loss"))
    assert (steps[2], steps[3]) == (2, 2)  # made after the last checkpoint of the first session


def test_mlflow_shows_each_step_once(tracking_run):
    from mlflow.tracking import MlflowClient

    folder, truth = tracking_run[0], expect_numbers(tracking_run[0])
    client = MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    (run,) = client.search_runs([client.get_experiment_by_name("anybatch").experiment_id])
    assert (run.info.status, run.info.run_name) == ("FINISHED", "mine")
    assert run.data.params["grain"] == "4"
    assert run.data.metrics == truth[8]
    for name in truth[0]:
        history = client.get_metric_history(run.info.run_id, name)
        assert [m.step for m in history] == STEPS
        assert [m.value for m in history] == [truth[t][name] for t in STEPS]


def test_wandb_holds_each_step_once_in_one_run(tracking_run):
    folder, _, before = tracking_run
    (run,) = folder.glob("wandb/offline-run-*")
    (file,) = run.glob("*.wandb")
    assert file.stem == before  # the id stays, so that an upload goes to the same run
    assert wandb_files.read_log(file) == sorted(expect_numbers(folder).items())


def test_nothing_is_written_elsewhere_and_nothing_asked_of_the_net(tracking_run):
    folder, requests, _ = tracking_run
    names = {path.name for path in folder.iterdir()}
    ours = {"run.json", "lock", "records.jsonl", "checkpoints"}
    assert names == ours | {"tensorboard", "mlflow.db", "wandb"}
    assert requests == []


def test_a_request_would_be_seen(tracking_run, tmp_path):
    """Control: MLflow with its reports home."""
    shutil.copy(tracking_run[0] / "mlflow.db", tmp_path)
    program = (
        f"from mlflow.tracking import MlflowClient\n"
        f"MlflowClient('sqlite:///{tmp_path}/mlflow.db').create_run('1')\n"
        f"input()"
    )
    with proxy() as (requests, address):
        process = start_script("-c", program, MLFLOW_DISABLE_TELEMETRY="false", **address)
        deadline = time.monotonic() + 60
        while not requests and time.monotonic() < deadline:
            time.sleep(0.05)
        process.kill()
        process.communicate()
    assert b"mlflow" in requests[0]
