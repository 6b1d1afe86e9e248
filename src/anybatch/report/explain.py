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
    """Page of one update."""

    sections: Mapping[str, Any]  # the figures, by section

    @cached_property
    def html(self) -> str:
        """Make the page as one HTML text. It needs no network.

        Raises:
            ModelError: jinja2 or plotly is not installed.
        """
        from anybatch.report.page import render_page

        return render_page(self.sections)

    def save(self, path: str | Path) -> Path:
        """Write the page to a file, and overwrite the file if it exists."""
        file = Path(path)
        file.write_text(self.html, encoding="utf8")
        return file

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
    **arguments: Any,
) -> Explanation:
    """Show how a batch becomes an update: `anybatch explain` for a loop of your own.

    From the gradient alone the page shows what it holds; with `observe=ab.Observe(share=True,
    alignment=True, parameter_norms=True)` also the share of each example. With model, objective and
    batch it shows everything. The update is then made once more, on copies, so call this before
    `optimizer.step()`.

    >>> import torch
    >>> import anybatch as ab
    >>> model = torch.nn.Linear(3, 1)
    >>> objective = ab.Objective(lambda model, batch: (model(batch[0]) - batch[1]).square()[:, 0])
    >>> batch = (torch.randn(8, 3), torch.randn(8, 1))
    >>> gradient = ab.batch_gradient(model, objective, batch)
    >>> page = ab.explain(gradient, model=model, objective=objective, batch=batch)
    >>> sorted(page.sections)[:3]
    ['about', 'examples', 'layers']

    Args:
        gradient: of `ab.batch_gradient` or `step.gradient`.
        model, objective, batch: those of the gradient; all three or none.
        optimizer: over the model's parameters, before its step.
        arguments: further ones of `batch_gradient`: key, clip, precision, layout.

    Returns:
        A page, which a notebook displays; `.save(path)` writes it.

    Raises:
        BatchError: one or two of the three; ModelError: the weights of the model have changed.
    """
    from anybatch.report.evidence import Evidence, add_example_gradients, collect_evidence
    from anybatch.report.examples import Labels
    from anybatch.report.sections import describe_sections

    about = {"title": "One batch", "anybatch": anybatch.__version__, "torch": torch.__version__}
    parts = {"model": model, "objective": objective, "batch": batch}
    missing = [name for name, value in parts.items() if value is None]
    if len(missing) == 3:
        alone = add_example_gradients(Evidence(gradient=gradient, arguments=arguments))
        return Explanation(describe_sections(alone, Labels(), about))
    if model is None or objective is None or batch is None:
        raise BatchError(
            f"ab.explain needs model, objective and batch, or none of them: "
            f"{' and '.join(missing)} missing. Pass those of the gradient."
        )
    model, optimizer = copy.deepcopy((model, optimizer))  # together: they share the parameters
    evidence = collect_evidence(model, objective, batch, optimizer, ids=gradient.ids, **arguments)
    _check_same(gradient, evidence.gradient)
    return Explanation(describe_sections(evidence, Labels(classes=_describe_classes(batch)), about))


def _check_same(gradient: Gradient, again: Gradient) -> None:
    a, b = float(gradient.loss), float(again.loss)
    if abs(a - b) > 1e-4 * max(abs(a), abs(b), 1e-6):
        raise ModelError(
            f"The loss of the gradient is {a:.6g}, but the model now gives {b:.6g} for this batch. "
            f"Have the weights changed since? Call ab.explain before optimizer.step(), with the "
            f"key, clip and precision of the gradient."
        )


def _describe_classes(batch: Any) -> torch.Tensor | None:
    """Return the targets of (inputs, targets) if they are one integer per example."""
    if not isinstance(batch, tuple | list) or len(batch) < 2:
        return None
    targets = batch[1]
    is_class = isinstance(targets, torch.Tensor) and targets.ndim == 1
    return targets if is_class and not targets.is_floating_point() else None
