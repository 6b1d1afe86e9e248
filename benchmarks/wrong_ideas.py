"""Draw the loss of six wrong ideas and the right gradient: `docs/wrong-ideas.svg`.

    python benchmarks/wrong_ideas.py [--write]

`anybatch.questions.wrong_ideas` trains seven times from the same weights, on the same batches.
"""

import argparse
from pathlib import Path

from anybatch.questions import wrong_ideas
from svg import Axis, Series, plot

PICTURE = Path(__file__).parents[1] / "docs" / "wrong-ideas.svg"


def draw() -> str:
    """Return the picture: the loss of all digits plus the penalty, over 100 updates."""
    series = [
        Series(idea.name, idea.curve, number, dash="" if number == 0 else "6 3")
        for number, idea in enumerate(wrong_ideas(num_updates=100))
    ]
    updates = Axis("updates", range(0, 101, 20))
    loss = Axis("mean loss of all digits, with penalty", range(4))
    return plot("The loss of six wrong ideas", updates, loss, series)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="write the picture")
    picture = draw()
    if parser.parse_args().write:
        PICTURE.write_text(picture, encoding="utf8")
        print(f"written: {PICTURE.name}")
    else:
        print(picture)


if __name__ == "__main__":
    main()
