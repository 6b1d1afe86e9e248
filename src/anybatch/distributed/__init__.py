"""Ranks: the only importer of torch.distributed.

connection   how ranks meet, and what is said when one is gone
messages     what they tell each other: small things, errors, sums of tensors
shards       models of which each rank holds a slice
rollcall     which rank the others wait for in vain
"""

from torch.distributed import ProcessGroup

from anybatch.distributed.connection import (
    PATIENCE,
    LostRankError,
    RankError,
    joined,
    missing,
    num_ranks,
    rank_of,
    watched,
)
from anybatch.distributed.messages import (
    Coming,
    Origin,
    agreed,
    all_sum,
    by_itself,
    end_to_end,
    everywhere,
    largest,
    of_first,
    origin_of,
    slices,
    to_all,
)

__all__ = [
    "PATIENCE",
    "Coming",
    "LostRankError",
    "Origin",
    "ProcessGroup",
    "RankError",
    "agreed",
    "all_sum",
    "by_itself",
    "end_to_end",
    "everywhere",
    "joined",
    "largest",
    "missing",
    "num_ranks",
    "of_first",
    "origin_of",
    "rank_of",
    "slices",
    "to_all",
    "watched",
]
