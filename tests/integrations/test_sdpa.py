import copy
import threading
from importlib.util import find_spec

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from torch.utils.checkpoint import checkpoint

from expressive_attention import expressive_attention
from expressive_attention.integrations import expressive_sdpa
from expressive_attention.nn import MultiheadAttention
from tests.oldest import not_on_oldest

Q, K, V = torch.randn(3, 2, 4, 6, 8, generator=torch.Generator().manual_seed(1)).unbind(0)
MASK = torch.rand(6, 6, generator=torch.Generator().manual_seed(2)) < 0.7
SDPA = F.scaled_dot_product_attention


@pytest.mark.parametrize(
    ("args", "kwargs"),
    [
        ((Q, K, V), {}),
        ((Q, K, V, MASK, 0.0, False), {"scale": 0.3}),
        ((Q,), {"value": V, "key": K, "is_causal": True}),
        ((Q, K[:, :2], V[:, :2]), {"attn_mask": MASK.float(), "enable_gqa": True}),
    ],
)
@pytest.mark.parametrize("form", ["expressive", "squared"])
def test_a_call_is_one_of_expressive_attention_with_the_same_arguments(args, kwargs, form):
    with expressive_sdpa(form):
        found = F.scaled_dot_product_attention(*args, **kwargs)
    assert torch.equal(found, expressive_attention(*args, **kwargs, form=form))
    assert not torch.allclose(found, SDPA(*args, **kwargs), atol=1e-3)


def test_it_nests_and_ends():
    softmax = SDPA(Q, K, V)
    with expressive_sdpa():
        outer = F.scaled_dot_product_attention(Q, K, V)
        with expressive_sdpa("squared"):
            inner = F.scaled_dot_product_attention(Q, K, V)
        assert torch.equal(F.scaled_dot_product_attention(Q, K, V), outer)
    assert torch.equal(inner, expressive_attention(Q, K, V, form="squared"))
    assert torch.equal(F.scaled_dot_product_attention(Q, K, V), softmax)
    with pytest.raises(KeyError), expressive_sdpa():
        raise KeyError
    assert torch.equal(F.scaled_dot_product_attention(Q, K, V), softmax)


def test_it_holds_for_its_own_thread():
    found = []
    with expressive_sdpa():
        thread = threading.Thread(target=lambda: found.append(F.scaled_dot_product_attention(Q, K, V)))
        thread.start()
        thread.join()
    assert torch.equal(found[0], SDPA(Q, K, V))


@pytest.mark.parametrize("need_weights", [False, True])
def test_it_sees_through_multi_head_attention(need_weights):
    module = nn.MultiheadAttention(8, 2, batch_first=True)
    ours = MultiheadAttention(8, 2, batch_first=True)
    ours.load_state_dict(module.state_dict())
    x, padding = torch.randn(3, 5, 8), torch.zeros(3, 5, dtype=torch.bool)
    padding[0, 3:] = True
    for grad in (True, False):
        with torch.set_grad_enabled(grad), expressive_sdpa():
            found = module.eval()(x, x, x, key_padding_mask=padding, need_weights=need_weights)
        torch.testing.assert_close(found, ours(x, x, x, key_padding_mask=padding, need_weights=need_weights))


def test_the_fused_path_of_torch_is_not_taken():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    switched = copy.deepcopy(layer)
    switched.self_attn = MultiheadAttention(8, 2, batch_first=True)
    switched.load_state_dict(layer.state_dict())
    x = torch.randn(3, 5, 8)
    for context in (torch.no_grad, torch.inference_mode):
        with context(), expressive_sdpa():
            found = layer(x)
        with context():
            torch.testing.assert_close(found, switched(x))
    attention = layer.self_attn
    weights = (attention.in_proj_weight, attention.in_proj_bias, attention.out_proj.weight, attention.out_proj.bias)
    with (
        torch.no_grad(),
        expressive_sdpa(),
        pytest.raises(NotImplementedError, match="_native_multi_head_attention of torch computes"),
    ):
        torch._native_multi_head_attention(x, x, x, 8, 2, *weights)


def attend(q, k, v):
    with expressive_sdpa():
        return F.scaled_dot_product_attention(q.sin(), k, v)


def test_torch_compile_follows_it_inside_and_outside():
    inside = torch.compile(attend, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(inside(Q, K, V), attend(Q, K, V))
    outside = torch.compile(
        lambda q, k, v: F.scaled_dot_product_attention(q.sin(), k, v), fullgraph=True, backend="aot_eager"
    )
    with expressive_sdpa():
        torch.testing.assert_close(outside(Q, K, V), attend(Q, K, V))
    torch.testing.assert_close(outside(Q, K, V), SDPA(Q.sin(), K, V))


def test_checkpointing_needs_the_mode_for_the_second_pass_too():
    def gradient(**options):
        q = Q.clone().requires_grad_()
        with expressive_sdpa():
            y = checkpoint(
                lambda q: F.scaled_dot_product_attention(q, K, V).square().sum(), q, use_reentrant=False, **options
            )
        y.backward()
        return q.grad

    q = Q.clone().requires_grad_()
    expressive_attention(q, K, V).square().sum().backward()
    torch.testing.assert_close(gradient(context_fn=lambda: (expressive_sdpa(), expressive_sdpa())), q.grad)


def test_the_operator_of_torch_is_replaced_too():
    wanted = expressive_attention(Q, K, V, MASK, is_causal=False, scale=0.3)
    for function in (torch.ops.aten.scaled_dot_product_attention, torch.ops.aten.scaled_dot_product_attention.default):
        with expressive_sdpa():
            assert torch.equal(function(Q, K, V, MASK, scale=0.3), wanted)


def within(b, h, i, j):
    return (i - j).abs() < 40


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@not_on_oldest("its FlexAttention hides from modes what it computes")
@pytest.mark.parametrize("outside", [False, True])
def test_flex_attention_with_a_block_mask(outside):
    q, k, v = torch.randn(3, 2, 4, 160, 8, generator=torch.Generator().manual_seed(3)).unbind(0)
    near = (torch.arange(160)[:, None] - torch.arange(160)).abs() < 40
    mask = create_block_mask(within, None, None, 160, 160, device="cpu", BLOCK_SIZE=32)
    # Blocks that are listed and not full, of which nothing says what they hide but that they are not listed.
    first = BlockMask.from_kv_blocks(torch.ones(1, 1, 5, dtype=torch.int32), torch.zeros(1, 1, 5, 5, dtype=torch.int32),
                                     BLOCK_SIZE=32, seq_lengths=(160, 160))  # fmt: skip
    tall = BlockMask.from_kv_blocks(torch.ones(1, 1, 1, dtype=torch.int32), torch.zeros(1, 1, 1, 5, dtype=torch.int32),
                                    BLOCK_SIZE=(160, 32), seq_lengths=(160, 160))  # fmt: skip
    listed = (torch.arange(160) < 32).expand(160, 160)
    masks = [(None, None), (mask, near), (first, listed), (tall, listed)]
    if outside:  # what differs there is that a mask may be compiled
        attend, masks = torch.compile(flex_attention, backend="aot_eager"), masks[1:3]
    else:
        attend = flex_attention
    for block_mask, keep in masks:
        with expressive_sdpa("squared"):
            found = attend(q, k[:, :2], v[:, :2], block_mask=block_mask, scale=0.4, enable_gqa=True)
        wanted = expressive_attention(q, k[:, :2], v[:, :2], keep, scale=0.4, enable_gqa=True, form="squared")
        torch.testing.assert_close(found, wanted)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_what_computes_softmax_inside_is_an_error():
    with expressive_sdpa():
        # FlexAttention compiles itself, and the compiler has an error of its own for an error in what it compiles.
        with pytest.raises((NotImplementedError, torch._dynamo.exc.Unsupported)):
            flex_attention(Q, K, V, score_mod=lambda score, b, h, i, j: score + i)
        with pytest.raises(NotImplementedError, match="_scaled_dot_product_flash_attention_for_cpu of torch computes"):
            torch._scaled_dot_product_flash_attention_for_cpu(Q, K, V)
        with pytest.raises(NotImplementedError, match=r"_scaled_dot_product_attention_math\.default of torch computes"):
            torch.ops.aten._scaled_dot_product_attention_math.default(Q, K, V)
        if find_spec("torch.nn.attention.varlen") is not None:
            from torch.nn.attention.varlen import varlen_attn

            x, starts = Q[0].transpose(0, 1), torch.tensor([0, 6], dtype=torch.int32)
            with pytest.raises(NotImplementedError, match=r"expressive_attention_varlen for packed sequences"):
                varlen_attn(x, x, x, starts, starts, 6, 6)


def test_a_wrong_form_is_named():
    with pytest.raises(ValueError, match=r"form must be one of \('expressive', 'squared'\), got 'softmax'"):
        expressive_sdpa("softmax")


def test_a_gain_multiplies_z_also_of_a_single_head():
    q, k, v = (x[0, 0] for x in (Q, K, V))
    with expressive_sdpa(gain=torch.tensor([3.0])):
        found = F.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(found, expressive_attention(q, k, v, scale=3 / q.shape[-1] ** 0.5))
