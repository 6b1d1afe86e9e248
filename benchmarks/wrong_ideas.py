"""Draw the loss of six wrong ideas and the right gradient: `docs/wrong-ideas.svg`.

Its figures go into src/anybatch/report/wrong_ideas.json, for the page that explains an update.

    python benchmarks/wrong_ideas.py [--write]

`anybatch.questions.wrong_ideas` trains seven times from the same weights, on the same batches.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from anybatch.questions import WrongIdea, wrong_ideas
from svg import Axis, Series, plot

ROOT = Path(__file__).parents[1]
PICTURE = ROOT / "docs" / "wrong-ideas.svg"
FIGURES = ROOT / "src" / "anybatch" / "report" / "wrong_ideas.json"


def list_figures(ideas: Sequence[WrongIdea]) -> str:
    """Return distance, cosine and loss of each as JSON, with six digits."""
    rows = [
        {"name": idea.name}
        | {key: float(f"{getattr(idea, key):.6g}") for key in ("distance", "cosine", "loss")}
        for idea in ideas
    ]
    return json.dumps(rows, indent=1) + "\n"


def draw(ideas: Sequence[WrongIdea]) -> str:
    """Return the picture: the loss of all digits plus the penalty, over 100 updates."""
    series = [
        Series(idea.name, idea.curve, number, dash="" if number == 0 else "6 3")
        for number, idea in enumerate(ideas)
    ]
    updates = Axis("updates", range(0, 101, 20))
    loss = Axis("mean loss of all digits, with penalty", range(4))
    return plot("The loss of six wrong ideas", updates, loss, series)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="write the picture and the figures")
    is_written = parser.parse_args().write
    ideas = wrong_ideas(num_updates=100)
    if is_written:
        PICTURE.write_text(draw(ideas), encoding="utf8")
        FIGURES.write_text(list_figures(ideas), encoding="utf8")
        print(f"written: {PICTURE.name}, {FIGURES.name}")
    else:
        print(list_figures(ideas))


if __name__ == "__main__":
    main()
