"""What docs/scaling-rules.md says of its data, and of the sizes that are missing on digits."""

from scaling_rules_batches import ASKED as RULE_SIZES
from scaling_rules_common import FULL, HIDDEN
from scaling_rules_data import DATA, left_out
from scaling_rules_gap import ASKED as GAP_SIZES
from scaling_rules_noise import LARGE, SMALL
from scaling_rules_steps import ASKED as STEP_SIZES
from scaling_rules_warmup import ASKED as WARMUP_SIZES
from scaling_rules_worst import NUM_IMAGES

__all__ = ["TITLE", "images", "missing"]

IS_DIGITS = DATA.name == "digits"
TITLE = "# Rules for another batch size, measured" + (" on digits" if IS_DIGITS else "")


def images() -> list[str]:
    """Which images, how many, and the layers of the network, which the sentence goes on with."""
    whose = "Fashion-MNIST (Debian's dataset-fashion-mnist)"
    if IS_DIGITS:
        whose = (
            f"scikit-learn's digits, and not {whose}, which the command takes where it is "
            f"installed: {FULL + DATA.held_out_examples:,} images, {DATA.held_out_examples} of "
            f"them held out. {missing()} The other"
        )
    return [
        f"{whose}{'' if IS_DIGITS else ','} {FULL:,} images as vectors, one mean and one deviation",
        f"taken out; {DATA.inputs}-{HIDDEN}-10",
    ]


def missing() -> str:
    """The sizes that exceed the training set, and what is smaller for the same reason."""
    wanted = {1: RULE_SIZES, 2: GAP_SIZES, 3: WARMUP_SIZES, 8: STEP_SIZES}
    sizes = {section: left_out(asked) for section, asked in wanted.items()}
    said = [
        f"{', '.join(f'{size:,}' for size in gone)} in section {section}"
        for section, gone in sizes.items()
        if gone
    ]
    return (
        f"Batches larger than the {FULL:,} to train on are missing: {'; '.join(said)}. "
        f"Section 5 has {NUM_IMAGES:,} images, section 7 batches of {LARGE} and parts of {SMALL}, "
        f"of which this set holds 40 that share no example; grids of rates and the training "
        f"losses to reach are of its own."
    )
