"""Ranks: the only package that imports torch.distributed.

group         open a process group; a failed connection becomes an error that names the lost rank
collectives   exchange small objects, errors and sums of tensors
fsdp          models of which each rank holds a shard (`fully_shard`)
failures      find out which rank is lost
"""

from torch.distributed import ProcessGroup

from anybatch.distributed.collectives import (
    ErrorOrigin,
    Transfer,
    all_gather_object,
    all_gather_vectors,
    all_reduce_max,
    all_reduce_sum,
    broadcast_from_first,
    call_together,
    find_origin,
    raise_together,
    start_all_gather,
    start_all_to_all,
)
from anybatch.distributed.group import (
    TIMEOUT,
    LostRankError,
    RankError,
    describe_failure,
    get_num_ranks,
    get_rank,
    get_world,
    init_group,
    watch_thread,
)

__all__ = [
    "TIMEOUT",
    "ErrorOrigin",
    "LostRankError",
    "ProcessGroup",
    "RankError",
    "Transfer",
    "all_gather_object",
    "all_gather_vectors",
    "all_reduce_max",
    "all_reduce_sum",
    "broadcast_from_first",
    "call_together",
    "describe_failure",
    "find_origin",
    "get_num_ranks",
    "get_rank",
    "get_world",
    "init_group",
    "raise_together",
    "start_all_gather",
    "start_all_to_all",
    "watch_thread",
]
