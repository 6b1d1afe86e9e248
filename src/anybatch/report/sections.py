"""Describe one update for a page, by section."""

from collections.abc import Mapping, Sequence
from typing import Any

from anybatch.gradient import ClipExamples, ClipNorm
from anybatch.questions import compute_worked_batch
from anybatch.report.evidence import Evidence, format_reduction
from anybatch.report.examples import Labels, describe_examples
from anybatch.report.layers import describe_layers
from anybatch.report.noise import describe_noise
from anybatch.report.pairs import choose_weights, compute_grams, describe_pairs, describe_weights
from anybatch.report.pooling import describe_pooling
from anybatch.report.reductions import describe_reductions
from anybatch.report.stages import describe_stages

__all__ = ["describe_sections"]

NO_RUN = "this page shows one gradient, not a run. For a run: anybatch explain RUN."


def describe_sections(
    evidence: Evidence,
    labels: Labels,
    about: Mapping[str, Any],
    *,
    history: Mapping[str, Any] | None = None,
    noise_over_training: Sequence[Mapping[str, Any]] = (),
    why_no_noise: str = NO_RUN,
) -> dict[str, Any]:
    """Describe one update by section.

    A section that does not apply is None. One without figures holds the reason under "why".

    Args:
        labels: names that belong to the data.
        about: figures of the head of the page.
        history: the whole run; None: there is none.
        noise_over_training: noise scales over the run.
        why_no_noise: reason if there are none.
    """
    chosen_weights, grams = choose_weights(evidence), compute_grams(evidence)
    return {
        "about": dict(about) | _describe_head(evidence),
        "examples": describe_examples(evidence, labels),
        "pairs": describe_pairs(evidence, grams, chosen_weights),
        "weights": describe_weights(evidence, chosen_weights),
        "worked": compute_worked_batch(),
        "reductions": describe_reductions(evidence),
        "layers": describe_layers(evidence),
        "pooling": describe_pooling(evidence),
        "noise": describe_noise(evidence, noise_over_training, why_no_noise),
        "run": history,
        "stages": describe_stages(evidence, grams),
    }


def _describe_head(evidence: Evidence) -> dict[str, Any]:
    gradient, objective, clip = evidence.gradient, evidence.objective, evidence.clip
    figures: dict[str, Any] = {
        "examples": gradient.num_examples,
        "loss": float(gradient.loss),
        "optimizer": None if evidence.optimizer is None else type(evidence.optimizer).__name__,
        "lr": evidence.lr,
        "reduction": None,
        "penalty": [],
        "clip": None,
    }
    if objective is not None:
        figures["reduction"] = ", ".join(
            format_reduction(r)
            if len(objective.reductions) == 1
            else f"{name}: {format_reduction(r)}"
            for name, r in objective.reductions.items()
        )
        figures["penalty"] = [f"{p.part}, strength {p.strength:g}" for p in objective.penalty or ()]
    if isinstance(clip, ClipNorm | ClipExamples):
        figures["clip"] = str(clip)
    return figures
