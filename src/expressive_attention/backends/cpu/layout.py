"""The structs that the C library is given, member by member; `library` compares it with the one that was compiled.

To add a member, enter it here and in ``kernels/problem.h``, and give its value where `cpu` packs the struct.
"""

from __future__ import annotations

import struct

__all__ = ["BACKWARD", "FORWARD", "LAYOUT", "TOKEN"]

# As EA_VERSION: what members mean, where their names do not say.
_VERSION = 5

# A tensor is its address and four strides.
_FORWARD = (
    "threads:q dtype:q mask_dtype:q squared:q causal:q right:q window:q left:q lower_right:q batch:q heads:q "
    "kv_heads:q rows:q keys:q width:q value_width:q scale:d sequences:q query_starts:q key_starts:q key_lengths:q "
    "slopes:q slopes_stride:q relative:5q reach:q "
    "dropout_threshold:q keep:d dropout_seeds:q dropout_batches:q "
    "blocks:5q listed_rows:q listed_keys:q tiles:q query:5q key:5q value:5q mask:5q "
    "decay_heads:q decay:5q output:q normalizer:q bias_max:q "
)
_BACKWARD = (
    "grad_output:5q grad_normalizer:q grad_query:q grad_key:q grad_value:q grad_mask:q grad_decay:q mask_size:4q "
    "grad_relative:q grad_relative_stride:q "
)
# The members of `ea_token`.
_TOKEN = (
    "threads:q in_double:q states:q groups:q width:q value_width:q sums:q moment:q "
    "key:q value:q factor:q query:q output:q normalizer:q "
)


def _formats(members: str) -> str:
    return "".join(member.partition(":")[2] for member in members.split())


LAYOUT = f"{_VERSION} {_FORWARD}{_BACKWARD}; {_TOKEN}"  # as ea_layout() has it
FORWARD = struct.Struct(f"{_formats(_FORWARD)}{struct.calcsize(_formats(_BACKWARD))}x")
BACKWARD = struct.Struct(_formats(_FORWARD + _BACKWARD))
TOKEN = struct.Struct(_formats(_TOKEN))
