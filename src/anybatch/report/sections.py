"""All that a page shows of one update, by section."""

from collections.abc import Mapping, Sequence
from typing import Any

from anybatch.gradient import ClipExamples, ClipNorm
from anybatch.questions import compute_worked_batch
from anybatch.report.evidence import Evidence, named
from anybatch.report.examples import Labels, examples
from anybatch.report.layers import layers
from anybatch.report.noise import noise
from anybatch.report.pairs import followed, grams, pairs, weights
from anybatch.report.pooling import pooling
from anybatch.report.reductions import reductions
from anybatch.report.stages import stages

__all__ = ["sections"]

NO_RUN = "this page shows one gradient, not a run. For a run: anybatch explain RUN."


def sections(
    evidence: Evidence,
    labels: Labels,
    about: Mapping[str, Any],
    *,
    history: Mapping[str, Any] | None = None,
    noise_over_training: Sequence[Mapping[str, Any]] = (),
    why_no_noise: str = NO_RUN,
) -> dict[str, Any]:
    """Gather the figures of a page. A section that does not apply is None; one without figures
    holds the reason under "why".

    Args:
        evidence: the update.
        labels: names that belong to the data.
        about: what the head of the page says.
        history: the run as a whole; None: there is none.
        noise_over_training: noise scales over the run, or why_no_noise.
    """
    shown, inner = followed(evidence), grams(evidence)
    return {
        "about": dict(about) | _about(evidence),
        "examples": examples(evidence, labels),
        "pairs": pairs(evidence, inner, shown),
        "weights": weights(evidence, shown),
        "worked": compute_worked_batch(),
        "reductions": reductions(evidence),
        "layers": layers(evidence),
        "pooling": pooling(evidence),
        "noise": noise(evidence, noise_over_training, why_no_noise),
        "run": history,
        "stages": stages(evidence, inner),
    }


def _about(evidence: Evidence) -> dict[str, Any]:
    gradient, objective, clip = evidence.gradient, evidence.objective, evidence.clip
    found: dict[str, Any] = {
        "examples": gradient.num_examples,
        "loss": float(gradient.loss),
        "optimizer": None if evidence.optimizer is None else type(evidence.optimizer).__name__,
        "lr": evidence.lr,
        "reduction": None,
        "penalty": [],
        "clip": None,
    }
    if objective is not None:
        found["reduction"] = ", ".join(
            named(r) if len(objective.reductions) == 1 else f"{name}: {named(r)}"
            for name, r in objective.reductions.items()
        )
        found["penalty"] = [f"{p.part}, strength {p.strength:g}" for p in objective.penalty or ()]
    if isinstance(clip, ClipNorm | ClipExamples):
        found["clip"] = str(clip)
    return found
