"""Orders: which examples make up the batch of step t.

permutation   keyed random permutations (Feistel network)
order         Order: a permutation an epoch, cut into batches
protocol      OrderProtocol, for orders of your own
sampler       BatchSampler: the batches of an order for a torch DataLoader
by_length     ByLength: batches of examples of similar length
weighted      Weighted: draws with replacement
growing       Growing: batches that grow
"""

from anybatch.order.arguments import MAX_EXAMPLES
from anybatch.order.order import LastBatch, Order
from anybatch.order.protocol import OrderProtocol

__all__ = ["MAX_EXAMPLES", "LastBatch", "Order", "OrderProtocol"]
