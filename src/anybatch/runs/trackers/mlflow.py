"""Write the numbers of a run to MLflow: one SQLite file RUN/mlflow.db with one MLflow run.

A resumed run continues the same MLflow run. MLflow cannot take a number back, so the numbers of
steps that are made again are deleted from its tables. Otherwise each would appear twice.
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

from anybatch.runs.trackers.protocol import import_modules

__all__ = ["MLflow"]

_BATCH = 1000  # maximum of numbers in one call of MLflow
_SECONDS = 10.0  # between writes
_TEXT = 500  # characters of a setting that every version of MLflow accepts


@final
class MLflow:
    """Writes MLflow's own database, some hundred numbers at a time.

    Raises:
        RunError: mlflow, sqlalchemy or alembic is not installed.
    """

    places = ("mlflow.db", "mlflow.db-journal", "mlflow.db-wal", "mlflow.db-shm")

    def __init__(self) -> None:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # read when it is imported
        tracking, self._entities, *_ = import_modules(
            "mlflow", "mlflow.tracking", "mlflow.entities", "sqlalchemy", "alembic"
        )
        self._client_of = tracking.MlflowClient

    def begin(self, folder: Path, step: int, settings: Mapping[str, Any]) -> None:
        """See `Tracker`."""
        file = folder.absolute() / "mlflow.db"
        if file.exists():
            _delete_from(file, step)
        self._client = _open_client(self._client_of, f"sqlite:///{file}")
        self._run = self._find_or_create_run(folder.absolute(), settings)
        self._waiting: list[Any] = []
        self._written = time.monotonic()

    def _find_or_create_run(self, folder: Path, settings: Mapping[str, Any]) -> str:
        """Return the id of the MLflow run: that of an earlier session, if there is one."""
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
            client.log_param(run.info.run_id, _replace_letters(name), json.dumps(value)[:_TEXT])
        return str(run.info.run_id)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """See `Tracker`."""
        milliseconds = time.time_ns() // 1_000_000
        for name, value in values.items():
            metric = self._entities.Metric(_replace_letters(name), value, milliseconds, step)
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


def _replace_letters(name: str) -> str:
    """Replace letters that MLflow refuses in a name."""
    return re.sub(r"[^\w\-./: ]", "_", name)


def _delete_from(file: Path, step: int) -> None:
    """Delete the numbers of a step and all later ones."""
    with closing(sqlite3.connect(file)) as database, database:
        database.execute("delete from metrics where step >= ?", (step,))
        database.execute("delete from latest_metrics")
        columns = "run_uuid, key, value, timestamp, {step}, is_nan"
        database.execute(
            f"insert into latest_metrics ({columns.format(step='step')}) "
            f"select {columns.format(step='max(step)')} from metrics group by run_uuid, key"
        )


def _open_client(client_of: Any, uri: str) -> Any:
    """Open a client of a database, without the log messages about new tables."""
    log = logging.getLogger("mlflow.store.db.utils")
    before = log.level
    log.setLevel(logging.WARNING)
    try:
        return client_of(uri)
    finally:
        log.setLevel(before)
