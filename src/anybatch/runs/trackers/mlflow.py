"""MLflow: its embedded store, one SQLite file RUN/mlflow.db with one MLflow run.

A resumed run goes on as the same MLflow run. MLflow has no way to take a number back, so what is
made again is deleted from its tables; otherwise it would keep both.
"""

import json
import logging
import os
import re
import sqlite3
import time
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any, final

from anybatch.runs.trackers.protocol import imported

__all__ = ["MLflow"]

_BATCH = 1000  # numbers that MLflow takes at once
_SECONDS = 10.0  # after which what waits is written
_TEXT = 500  # characters of a setting, as many as every version takes


@final
class MLflow:
    """Writes MLflow's own database, some hundred numbers at a time.

    Raises:
        RunError: mlflow, sqlalchemy or alembic is not installed.
    """

    places = ("mlflow.db", "mlflow.db-journal", "mlflow.db-wal", "mlflow.db-shm")

    def __init__(self) -> None:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # read when it is imported
        tracking, self._entities, *_ = imported(
            "mlflow", "mlflow.tracking", "mlflow.entities", "sqlalchemy", "alembic"
        )
        self._client_of = tracking.MlflowClient

    def begin(self, folder: Path, step: int, settings: Mapping[str, Any]) -> None:
        """See `Tracker`."""
        file = folder.absolute() / "mlflow.db"
        if file.exists():
            _take_back(file, step)
        self._client = _opened(self._client_of, f"sqlite:///{file}")
        self._run = self._begun(folder.absolute(), settings)
        self._waiting: list[Any] = []
        self._written = time.monotonic()

    def _begun(self, folder: Path, settings: Mapping[str, Any]) -> str:
        """The id of the MLflow run: that of an earlier session, if there is one."""
        client = self._client
        experiment = client.get_experiment_by_name("anybatch")
        if experiment is None:
            artifacts = (folder / "mlflow").as_uri()
            number = client.create_experiment("anybatch", artifact_location=artifacts)
        else:
            number = experiment.experiment_id
        for run in client.search_runs([number]):
            client.update_run(run.info.run_id, status="RUNNING")
            return str(run.info.run_id)
        run = client.create_run(number, run_name=folder.name)
        for name, value in settings.items():
            client.log_param(run.info.run_id, _allowed(name), json.dumps(value)[:_TEXT])
        return str(run.info.run_id)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """See `Tracker`."""
        milliseconds = time.time_ns() // 1_000_000
        for name, value in values.items():
            metric = self._entities.Metric(_allowed(name), value, milliseconds, step)
            self._waiting.append(metric)
        if len(self._waiting) >= _BATCH or time.monotonic() - self._written > _SECONDS:
            self.flush()

    def flush(self) -> None:
        """See `Tracker`."""
        while self._waiting:
            self._client.log_batch(self._run, metrics=self._waiting[:_BATCH])
            del self._waiting[:_BATCH]
        self._written = time.monotonic()

    def close(self) -> None:
        """See `Tracker`."""
        self.flush()
        self._client.set_terminated(self._run)


def _allowed(name: str) -> str:
    """A name with nothing in it that MLflow refuses."""
    return re.sub(r"[^\w\-./: ]", "_", name)


def _take_back(file: Path, step: int) -> None:
    """Delete the numbers of a step and all later ones."""
    with closing(sqlite3.connect(file)) as database, database:
        database.execute("delete from metrics where step >= ?", (step,))
        database.execute("delete from latest_metrics")
        columns = "run_uuid, key, value, timestamp, {step}, is_nan"
        database.execute(
            f"insert into latest_metrics ({columns.format(step='step')}) "
            f"select {columns.format(step='max(step)')} from metrics group by run_uuid, key"
        )


def _opened(client_of: Any, uri: str) -> Any:
    """A client of a database; that its tables are made need not be told."""
    log = logging.getLogger("mlflow.store.db.utils")
    before = log.level
    log.setLevel(logging.WARNING)
    try:
        return client_of(uri)
    finally:
        log.setLevel(before)
