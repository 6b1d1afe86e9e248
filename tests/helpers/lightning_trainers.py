"""A Trainer of Lightning in float64 on the CPU that writes and shows nothing."""

import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl


def make_trainer(folder: Path | str, **how: Any) -> pl.Trainer:
    """Make the Trainer; `how` adds or replaces arguments."""
    defaults = {
        "max_epochs": 1,
        "accelerator": "cpu",
        "devices": 1,
        "precision": "64-true",
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "default_root_dir": folder,
    }
    return pl.Trainer(**{**defaults, **how})


def fit(trainer: pl.Trainer, *args: Any, **how: Any) -> None:
    """Fit without Lightning's advice on workers and devices."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(*args, **how)
