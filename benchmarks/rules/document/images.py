"""What docs/scaling-rules.md says of its data, and of the sizes that are missing on digits."""

from rules.batches import ASKED as RULE_SIZES
from rules.common import FULL, HIDDEN
from rules.data import DATA, by_data, left_out
from rules.gap import ASKED as GAP_SIZES
from rules.noise import LARGE, NUM_BATCHES, SMALL
from rules.tuning import ASKED as STEP_SIZES
from rules.warmup import ASKED as WARMUP_SIZES
from rules.worst import NUM_IMAGES

__all__ = ["ADDED", "OF_ALL", "TITLE", "WRITTEN", "images", "missing"]

IS_DIGITS = DATA.name == "digits"
TITLE = "# Rules for another batch size, measured" + (" on digits" if IS_DIGITS else "")
WRITTEN = by_data(
    {
        "fashion_mnist": "Written by `make scaling-rules`, which runs "
        "`benchmarks/scaling_rules.py --write`, from",
        "digits": "Written by `benchmarks/scaling_rules.py --data digits --write`, from",
    }
)
ADDED = by_data(
    {"fashion_mnist": " (to which an earlier round, of 128 hidden units, had led)", "digits": ""}
)
OF_ALL = by_data({"fashion_mnist": "", "digits": " (all to train on)"})


def images() -> list[str]:
    """Which images, how many, and the layers of the network, which the sentence goes on with."""
    whose = "Fashion-MNIST (Debian's dataset-fashion-mnist)"
    if IS_DIGITS:
        whose = (
            f"scikit-learn's digits, and not {whose}, which the command takes where it is "
            f"installed; without the {DATA.held_out_examples} that are held out"
        )
    return [
        f"{whose}, {FULL:,} images as vectors, one mean and one deviation",
        f"taken out; {DATA.inputs}-{HIDDEN}-10",
    ]


def missing() -> list[str]:
    """A paragraph: the sizes that exceed the training set, and what is smaller for that reason."""
    if not IS_DIGITS:
        return []
    wanted = {1: RULE_SIZES, 2: GAP_SIZES, 3: WARMUP_SIZES, 8: STEP_SIZES}
    sections: dict[int, list[str]] = {}
    for section, asked in wanted.items():
        for size in left_out(asked):
            sections.setdefault(size, []).append(f"{section}")
    said = [
        f"{size:,} in section{'s' if len(where) > 1 else ''} {', '.join(where)}"
        for size, where in sections.items()
    ]
    return [
        "",
        f"Batches larger than the {FULL:,} to train on are missing: {'; '.join(said)}. "
        f"Section 5 has {NUM_IMAGES:,} images, section 7 batches of {LARGE} and parts of {SMALL}, "
        f"of which this set holds {NUM_BATCHES} that share no example: {NUM_BATCHES * LARGE:,} of "
        f"those that brute force rests on, so fewer misses are to be expected than of a sample "
        f"apart. Grids of rates and the training losses to reach are of its own.",
    ]
