"""ONNX Runtime's MultiHeadAttention, the fastest rival on CPUs: optional, `pip install onnx onnxruntime`."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from problems import Problem

__all__ = ["attention", "fits"]

_NAMES = ("query", "key", "value")


def fits(problem: Problem) -> bool:
    """Whether it computes the problem: a forward pass of float32 on the CPU without dropout, bias or groups."""
    return problem.is_plain and not problem.backward and problem.dtype == torch.float32 and problem.device == "cpu"


def attention(problem: Problem) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """A function of query, key and value ``(B, H, L, E)``, by a session with as many threads as torch has.

    Its inputs ``(B, L, H E)``, as the runtime wants them, are made once and not timed; the output has to be one copy
    closer to ours, which is a view.
    """
    import onnxruntime
    from onnx import TensorProto, helper

    b, h, length, e = problem.shape
    keys = problem.keys or length
    shapes = [(b, rows, h * e) for rows in (length, keys, keys)]
    node = helper.make_node(
        "MultiHeadAttention", list(_NAMES), ["output"], domain="com.microsoft", num_heads=h,
        unidirectional=int(problem.causal),
    )  # fmt: skip
    inputs = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
        for name, shape in zip(_NAMES, shapes, strict=True)
    ]
    outputs = [helper.make_tensor_value_info("output", TensorProto.FLOAT, shapes[0])]
    model = helper.make_model(
        helper.make_graph([node], "attention", inputs, outputs),
        opset_imports=[helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)],
        ir_version=8,
    )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = torch.get_num_threads(), 1
    # Otherwise its threads spin for a while after a run, on the cores of whoever is timed next.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    given: dict[tuple[int, ...], dict[str, object]] = {}

    def run(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        place = query.data_ptr(), key.data_ptr(), value.data_ptr()
        if place not in given:
            rows = (x.transpose(1, 2).flatten(2).contiguous().numpy() for x in (query, key, value))
            given[place] = dict(zip(_NAMES, rows, strict=True))
        (output,) = session.run(None, given[place])
        return torch.from_numpy(output).unflatten(2, (h, e)).transpose(1, 2)

    return run
