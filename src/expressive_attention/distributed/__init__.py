"""Context parallelism: sequences that are spread over ranks of `torch.distributed`.

`context_parallel` is the operator on sharded tokens, and `ContextParallel` a region in which whole models call it.
`Shards`, `shard` and `unshard` say which rank has which tokens.
"""

from .context import METHODS, context_parallel
from .moving import shard, unshard
from .orders import ORDERS, Run, Shards
from .region import ContextParallel

__all__ = ["METHODS", "ORDERS", "ContextParallel", "Run", "Shards", "context_parallel", "shard", "unshard"]
