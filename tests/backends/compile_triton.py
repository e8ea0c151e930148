"""Compile the kernels in Triton for a GPU that need not be there: the compute capability is the argument.

Prints the shared memory of each kernel, in bytes.
"""

import sys

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from expressive_attention.backends.triton import launch
from expressive_attention.call import Call, Upstream, Visibility

TYPES = {
    torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.int32: "*i32", torch.int64: "*i64",
    torch.uint8: "*u8",
}  # fmt: skip
CAUSAL = Visibility(right=0)
TARGET = GPUTarget("cuda", int(sys.argv[1]), 32)
done = set()


def compile_only(kernel, grid, tile, arguments, **more):
    """What Triton does before the first launch with these arguments."""
    given = {**arguments, **more, "BLOCK_M": tile.rows, "BLOCK_N": tile.keys}
    signature, constants, attributes = {}, {}, {}

    def describe(place, value, specialize):
        if value is None or (specialize and isinstance(value, int) and value == 1):
            constants[place] = value
            return "constexpr"
        if isinstance(value, torch.Tensor) or (specialize and isinstance(value, int) and value % 16 == 0):
            attributes[place] = [["tt.divisibility", 16]]
        if isinstance(value, torch.Tensor):
            return TYPES[value.dtype]
        return "fp32" if isinstance(value, float) else "i32"

    for i, parameter in enumerate(kernel.params):
        value = given[parameter.name]
        if parameter.is_constexpr:
            constants[(i,)] = value
            signature[parameter.name] = "constexpr"
        elif isinstance(value, tuple):
            specialize = not parameter.do_not_specialize
            signature[parameter.name] = tuple(describe((i, j), x, specialize) for j, x in enumerate(value))
        else:
            signature[parameter.name] = describe((i,), value, not parameter.do_not_specialize)
    key = (kernel.fn.__name__, tuple(tile), str(signature), str(constants))
    if key in done:
        return
    done.add(key)
    source = ASTSource(kernel, signature, constants, attributes)
    compiled = triton.compile(source, TARGET, {"num_warps": tile.warps, "num_stages": tile.stages})
    sys.stdout.write(f"{kernel.fn.__name__} {compiled.metadata.shared}\n")


def attend(dtype, width, mask=None, visibility=CAUSAL, length=512, form="expressive", groups=2, seeds=None):
    """Forward and backward, for query heads that share a key head."""
    query = torch.empty(1, groups, length, width, dtype=dtype)
    key = value = torch.empty(1, 1, 512, width, dtype=dtype)
    call = Call(query, key, value, mask, visibility, 0.125, form, 0.0 if seeds is None else 0.1, seeds)
    result = launch.forward(call)
    has_bias = mask is not None and mask.dtype != torch.bool
    launch.backward(call, result, Upstream(result.output, result.normalizer, has_bias))


launch._run = compile_only
launch._processors = lambda device: 128  # as many as let decoding split the keys
BIAS = torch.zeros(1, 2, 512, 512)
SLOPES = torch.ones(1, 2)
STARTS = torch.tensor([0, 200, 512], dtype=torch.int32)
PACKED = {"query_starts": STARTS, "key_starts": STARTS, "longest_query": 312, "longest_key": 312}
LENGTHS = torch.tensor([300])
attend(torch.bfloat16, 64)
attend(torch.bfloat16, 128, BIAS > 0, Visibility(), form="squared")
attend(torch.bfloat16, 64, visibility=Visibility(), length=1)
attend(torch.float16, 128, BIAS)
attend(torch.float32, 64)
attend(torch.bfloat16, 256, BIAS)
attend(torch.float32, 256, BIAS, Visibility())
attend(torch.bfloat16, 128, visibility=Visibility(right=0, lower_right=True, **PACKED))
attend(torch.bfloat16, 128, visibility=Visibility(left=128, right=0, slopes=SLOPES[:, :1]), groups=1)
attend(torch.float16, 64, visibility=Visibility(slopes=SLOPES, **PACKED))
attend(torch.bfloat16, 64, BIAS, Visibility(left=128, key_lengths=LENGTHS))
attend(torch.bfloat16, 128, visibility=Visibility(right=0, lower_right=True, key_lengths=LENGTHS), length=1)
SEEDS = torch.zeros(1, 3, dtype=torch.int64)
attend(torch.bfloat16, 64, seeds=SEEDS)
attend(torch.bfloat16, 128, BIAS, seeds=SEEDS)
attend(torch.float32, 64, visibility=Visibility(left=128, right=0, slopes=SLOPES), seeds=SEEDS)
attend(torch.float16, 256, visibility=Visibility(), length=1, seeds=SEEDS)
