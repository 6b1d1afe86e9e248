"""`ab.explain`: one update as a page, in a notebook or a file."""

import copy
import html
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

import anybatch
from anybatch.errors import BatchError, ModelError
from anybatch.gradient import Gradient
from anybatch.objective import Objective

__all__ = ["Explanation", "explain"]


@dataclass(frozen=True)
class Explanation:
    """The page of one update, before it is written."""

    sections: Mapping[str, Any]  # its figures, by section

    @cached_property
    def html(self) -> str:
        """Make the page as one HTML text. It needs no network.

        Raises:
            ModelError: jinja2 or plotly is not installed.
        """
        from anybatch.report.page import page

        return page(self.sections)

    def save(self, path: str | Path) -> Path:
        """Write the page to a file, over what is there."""
        found = Path(path)
        found.write_text(self.html, encoding="utf8")
        return found

    def _repr_html_(self) -> str:
        """Show the page in a notebook, in a frame that cannot reach the notebook."""
        return (
            f'<iframe sandbox="allow-scripts" title="How this batch became an update" '
            f'style="width:100%;height:760px;border:0" srcdoc="{html.escape(self.html)}"></iframe>'
        )


def explain(
    gradient: Gradient,
    *,
    model: nn.Module | None = None,
    objective: Objective | None = None,
    batch: Any = None,
    optimizer: Optimizer | None = None,
    **how: Any,
) -> Explanation:
    """Show how a batch becomes an update: `anybatch explain` for a loop of one's own.

    From the gradient alone, what it holds: with `observe=ab.Observe(share=True, alignment=True,
    parameter_norms=True)` the part of each example. With model, objective and batch, everything:
    the update is then made once more, on copies, so call it before `optimizer.step()`.

    Args:
        gradient: of `ab.batch_gradient` or `step.gradient`.
        model, objective, batch: what it was computed from; all three or none.
        optimizer: over the model's parameters, before its step.
        how: further arguments of `batch_gradient`: key, clip, precision, layout.

    Returns:
        The page, which a notebook displays; `.save(path)` writes it.

    Raises:
        BatchError: some of the three; ModelError: a model whose weights have moved since.
    """
    from anybatch.report.evidence import Evidence, evidence_of, with_whole
    from anybatch.report.examples import Labels
    from anybatch.report.sections import sections

    about = {"title": "One batch", "anybatch": anybatch.__version__, "torch": torch.__version__}
    given = {"model": model, "objective": objective, "batch": batch}
    missing = [name for name, value in given.items() if value is None]
    if len(missing) == 3:
        alone = with_whole(Evidence(gradient=gradient, how=how))
        return Explanation(sections(alone, Labels(), about))
    if model is None or objective is None or batch is None:
        raise BatchError(
            f"ab.explain got some of model, objective and batch: {' and '.join(missing)} missing. "
            f"It takes all three or none. Pass what the gradient was computed from."
        )
    own, stepping = _copied(model, optimizer)
    evidence = evidence_of(own, objective, batch, stepping, ids=gradient.ids, **how)
    _check_same(gradient, evidence.gradient)
    return Explanation(sections(evidence, Labels(classes=_classes(batch)), about))


def _copied(model: nn.Module, optimizer: Optimizer | None) -> tuple[nn.Module, Optimizer | None]:
    """Copy both; the optimiser then holds the parameters of the copy."""
    own, stepping = copy.deepcopy((model, optimizer))
    return own, stepping


def _check_same(given: Gradient, made: Gradient) -> None:
    a, b = float(given.loss), float(made.loss)
    if abs(a - b) > 1e-4 * max(abs(a), abs(b), 1e-6):
        raise ModelError(
            f"The loss of the gradient is {a:.6g}, but the model now gives {b:.6g} for this batch: "
            f"have the weights moved since? Call ab.explain before optimizer.step(), with the key, "
            f"clip and precision that the gradient had."
        )


def _classes(batch: Any) -> torch.Tensor | None:
    """Return the targets of (inputs, targets) if they are one integer per example."""
    if not isinstance(batch, tuple | list) or len(batch) < 2:
        return None
    targets = batch[1]
    is_class = isinstance(targets, torch.Tensor) and targets.ndim == 1
    return targets if is_class and not targets.is_floating_point() else None
