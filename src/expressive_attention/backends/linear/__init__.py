"""The squared form in linear time: f(z) = z^2 factorizes, (q . k)^2 = phi(q) . phi(k).

phi has the E (E + 1) / 2 distinct products of components, so sum_j w_ij v_j is a product of phi(q_i) and of a state,
the sum_j phi(k_j) v_j^T of the keys so far. ``kernels/linear.h`` of the backend `cpu` has it in C, and ``linear.py`` of
`triton` in kernels for GPUs; `chunks` is plain torch, on any device.

The normalizer is read from the state as q^T (sum_j k_j k_j^T) q. Where q is nearly orthogonal to all keys, terms cancel
there that are |q|^2 |k|^2 / z^2 times as large as what is left. A state that some row cannot be read from accurately,
or that leaves float32's range, is computed again in float64. Where that does not help a row, or its query is not
finite, its pairs are multiplied (`rows`). If there are many such rows, or a key or value is not finite, all pairs are
multiplied, by the backend that has no state.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ... import call as calls
from ...call import Call, Gradients, Result, Upstream, differentiated_by_func
from .. import blockwise, cpu, triton
from ..cpu import library
from . import chunks, rows

__all__ = ["backward", "declines", "forward", "pays"]

# To form products costs as much as so many columns of values more.
_COST_OF_PRODUCTS = 8
# Causal rows see half of the pairs of a chunk.
_HALF_A_CHUNK = 48
# With gradients, linear time costs up to a fifth more beside all pairs than without.
_MARGIN = 1.2
# Its exponential is 0, and differences of its multiples are in float32's range.
_LARGEST_SLOPE = 1e4


def declines(call: Call) -> str | None:
    """The reason why this backend declines the call; None: it does not."""
    seen = call.visibility
    if call.form != "squared":
        return "it computes form='squared'"
    if call.attn_mask is not None or call.relative_bias is not None:
        return "masks have no linear form; is_causal, key_lengths, alibi_slopes and log_decay have one"
    if call.dropout_p:
        return "dropout has no linear form"
    if seen.left is not None:
        return "windows have no linear form"
    if (seen.slopes is not None or call.log_decay is not None) and seen.right != 0:
        return "weights decay under causality only"
    if seen.listed is not None:
        return "blocks have no linear form"
    if seen.query_starts is not None:
        return "sequences must be in a batch"
    if seen.key_lengths is not None and not call.query.is_cpu:
        return "key_lengths are implemented on the CPU"
    if differentiated_by_func():
        return "torch.func and forward-mode derivatives are not implemented"
    return None


def pays(call: Call) -> bool:
    """Whether the C kernels are expected to be faster in linear time than with all pairs.

    The costs are numbers of products, with constants by measurement (x86-64-v4, one thread, E = 8 to 128).
    """
    if not _in_c(call):
        return False  # not measured
    query, key, value = call[:3]
    (batch, heads, rows, width), kv_heads, keys = query.shape, key.shape[1], key.shape[2]
    seen = call.visibility
    if seen.query_starts is not None:  # sequences of the same length, as a guess
        count = seen.query_starts.shape[0] - 1
        rows, keys = rows // count, keys // count
    pairs = rows * keys if seen.right is None else rows * (keys - rows / 2 if rows < keys else keys / 2)
    if seen.right is not None and not seen.lower_right and rows < keys:
        pairs = rows * rows / 2
    columns = width + value.shape[-1]
    decays_of_queries = seen.slopes is not None or (call.log_decay is not None and call.log_decay.shape[1] == heads)
    states = batch * (heads if decays_of_queries else kv_heads)
    products = width * (width + 1) // 2 * (value.shape[-1] + _COST_OF_PRODUCTS)
    in_chunks = 0 if seen.right is None else batch * heads * rows * _HALF_A_CHUNK * columns
    linear = (batch * heads * rows + states * keys) * products + in_chunks
    # A state is one thread's; rows are shared out more evenly.
    threads = 1 if torch.compiler.is_compiling() else torch.get_num_threads()
    linear *= -(-states // threads) * threads / states
    all_pairs = batch * heads * pairs * columns
    if query.dtype == torch.bfloat16 and library.chosen().name.endswith("bf16"):
        all_pairs /= 2
    return linear * _MARGIN < all_pairs


def forward(call: Call) -> Result:
    """Output, normalizer and largest biases."""
    found = _with_state(call)
    if found is None:
        return calls.forward(_all_pairs(call), call)
    own, broken = found
    decays = _decays(call)
    output, normalizer = _from_state(own, decays)
    left = normalizer.isnan() | broken
    if left.any():
        if not rows.are_few(left):
            return calls.forward(_all_pairs(call), call)
        rows.multiply(call, decays, left, output, normalizer, _all_pairs(call))
    return Result(output, normalizer, _bias_max(call, normalizer))


def backward(call: Call, result: Result, upstream: Upstream) -> Gradients:
    """The gradients of query, key, value and log decays."""
    found = _with_state(call)
    if found is None or not _are_finite(*upstream[:2]):
        return _all_pairs_backward(call, upstream)
    own, broken = found
    decays = _decays(call)
    if broken.any():  # what comes back from there is not finite
        zeros = [None if x is None else x.masked_fill(_like(broken, x), 0.0) for x in upstream[:2]]
        assert zeros[0] is not None
        others = Upstream(zeros[0], zeros[1], False)
    else:
        others = upstream
    gradients = _gradients_from_state(own, decays, others)
    left = gradients[0].isnan().any(-1) | broken
    if left.any():
        if not rows.are_few(left):
            return _all_pairs_backward(call, upstream)
        gradients = rows.multiply_backward(call, decays, left, upstream, gradients, _all_pairs(call))
    if not broken.any() and not _are_finite(*gradients[1:3]):
        return _all_pairs_backward(call, upstream)
    dq, dk, dv, by_key = gradients
    of_decay = None if call.log_decay is None or by_key is None else _of_log_decay(call, by_key, result, upstream)
    return Gradients(dq, dk, dv, None, of_decay)


def _from_state(call: Call, decays: Tensor | None) -> tuple[Tensor, Tensor]:
    """Output and normalizer, in C, in Triton or in plain torch; N is NaN where no state holds a row."""
    if _in_c(call):
        return cpu.linear_forward(call, decays)
    if triton.linear_declines(call) is not None:
        return chunks.forward(call, decays)
    output, normalizer = triton.linear_forward(call, decays)
    if normalizer.isnan().any():
        return chunks.forward(call, decays, torch.float64)
    return output, normalizer


def _gradients_from_state(
    call: Call, decays: Tensor | None, upstream: Upstream
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The gradients of query, key, value and decays, as keys have them; NaN for queries that no state holds."""
    if _in_c(call):
        return cpu.linear_backward(call, decays, upstream)
    if triton.linear_declines(call) is not None:
        return chunks.backward(call, decays, upstream)
    found = triton.linear_backward(call, decays, upstream)
    return chunks.backward(call, decays, upstream, torch.float64) if found is None else found


def _like(rows: Tensor, x: Tensor) -> Tensor:
    return rows if x.ndim == rows.ndim else rows.unsqueeze(-1)


def _in_c(call: Call) -> bool:
    return call.query.is_cpu and library.MISSING is None


# ---- decays ----


def _decays(call: Call) -> Tensor | None:
    """Cumulative log decays of slopes and tokens, ``(B, Hq | Hkv, S)`` of float64."""
    total, slopes = call.cumulative_decay(), call.visibility.slopes
    if slopes is None:
        return total
    keys = torch.arange(call.key.shape[2], device=slopes.device, dtype=torch.float64)
    of_slopes = (-slopes.to(torch.float64).clamp(max=_LARGEST_SLOPE).unsqueeze(-1) * keys).expand(
        call.query.shape[0], -1, -1
    )
    if total is None:
        return of_slopes
    return of_slopes + total.repeat_interleave(slopes.shape[1] // total.shape[1], 1)


def _bias_max(call: Call, normalizer: Tensor) -> Tensor | None:
    """The bias that a row has in common: queries after the last key are at the place of that one for the decays."""
    slopes = call.visibility.slopes
    if slopes is None:
        return None
    place, last = _places(call)
    return (
        (-slopes.to(torch.float64).unsqueeze(-1) * (place - last).clamp(min=0))
        .to(normalizer.dtype)
        .expand_as(normalizer)
        .contiguous()
    )


def _places(call: Call) -> tuple[Tensor, Tensor]:
    """The place of each query among the keys, and that of the last key, ``(B | 1, 1, L)`` and ``(B | 1, 1, 1)``."""
    rows, keys = call.query.shape[2], call.key.shape[2]
    place = call.visibility.places(torch.arange(rows, device=call.query.device), rows, keys)[0].squeeze(-1)
    lengths = call.visibility.key_lengths
    last = place.new_full((1, 1, 1), keys) if lengths is None else lengths.view(-1, 1, 1)
    return place, last - 1


def _of_log_decay(call: Call, by_key: Tensor, result: Result, upstream: Upstream) -> Tensor:
    """The gradient of log decays from that of their sums as keys have it, -sum_i w_ij g_ij.

    Queries have sum_j w_ij g_ij = N_i dN_i of them.
    """
    assert call.log_decay is not None
    total = by_key.to(torch.float64)
    if upstream.normalizer is not None:
        place, last = _places(call)
        of_row = upstream.normalizer.to(torch.float64) * result.normalizer.to(torch.float64)
        seen = (place >= 0) & (last >= 0)
        of_row = torch.where(seen, of_row, 0.0)
        place = place.clamp(min=0).minimum(last.clamp(min=0)).expand(of_row.shape)
        of_state = of_row.unflatten(1, (total.shape[1], -1)).flatten(2)
        total = total.scatter_add(-1, place.unflatten(1, (total.shape[1], -1)).flatten(2), of_state)
    heads = call.log_decay.shape[1]
    if total.shape[1] != heads:  # slopes have a state for each query head
        total = total.unflatten(1, (heads, -1)).sum(2)
    return total.flip(-1).cumsum(-1).flip(-1).to(call.log_decay.dtype)


# ---- numbers that a state does not hold ----


def _with_state(call: Call) -> tuple[Call, Tensor] | None:
    """The call with zeros for queries that are not finite, and which these are, ``(B, Hq, L)``; None: no state helps.

    One helps where all keys that exist, values and decays are finite, and there is anything to compute.
    """
    query, key, value = call[:3]
    if 0 in (query.numel(), key.numel(), value.numel()):
        return None
    lengths = call.visibility.key_lengths
    if lengths is None:
        is_finite = _are_finite(key, value, call.log_decay)
    else:
        pairs = zip(lengths.tolist(), zip(key, value, strict=True), strict=True)
        is_finite = _are_finite(call.log_decay) and all(_are_finite(k[:, :n], v[:, :n]) for n, (k, v) in pairs)
    if not is_finite:
        return None
    if _are_finite(query):
        return call, torch.zeros((), dtype=torch.bool, device=query.device)
    broken = ~query.isfinite().all(-1)
    return call.but(query=query.masked_fill(broken.unsqueeze(-1), 0.0)), broken


def _are_finite(*tensors: Tensor | None) -> bool:
    """Whether no number is NaN or infinite. Waits for the device."""
    for x in tensors:
        if x is not None and x.numel() and not all(end.isfinite() for end in torch.aminmax(x)):
            return False
    return True


def _all_pairs(call: Call) -> calls.Backend:
    """The backend that computes a call without a state."""
    return cpu if _in_c(call) else blockwise


def _all_pairs_backward(call: Call, upstream: Upstream) -> Gradients:
    """The gradients by the backend without a state. Decays are a mask there."""
    backend = _all_pairs(call)
    with torch.enable_grad():
        decay = None if call.log_decay is None else call.log_decay.detach().requires_grad_()
        lowered = call if decay is None else calls.lower_whole(call.but(log_decay=decay), backend)
    plain = lowered if decay is None or lowered.attn_mask is None else lowered.but(attn_mask=lowered.attn_mask.detach())
    result = calls.forward(backend, plain)
    dn = upstream.normalizer
    if dn is not None and result.bias_max is not None:
        of_result = _bias_max(call, result.normalizer)
        dn = dn * torch.exp(result.bias_max if of_result is None else result.bias_max - of_result)
    found = calls.backward(backend, plain, result, Upstream(upstream.output, dn, decay is not None))
    if decay is None or lowered.attn_mask is None or found.attn_mask is None:
        return found
    (ddecay,) = torch.autograd.grad(lowered.attn_mask, decay, found.attn_mask)
    return Gradients(*found[:3], None, ddecay)
