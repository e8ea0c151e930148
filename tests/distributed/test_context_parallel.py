"""Four processes, and two, compute what one does: within the error budget, every gradient too."""

import functools
import itertools
import sys
import time

import pytest
import torch
import torch.distributed as dist
from torch import nn

from expressive_attention import expressive_attention, expressive_attention_varlen
from expressive_attention.distributed import ContextParallel, Shards, context_parallel, costs, shard, unshard
from expressive_attention.distributed.links import Links
from expressive_attention.integrations import convert
from expressive_attention.nn import Transformer
from tests.budget import NAMES, Case, Judge
from tests.distributed import world
from tests.oldest import OLDEST

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="needs torch.distributed")

METHODS = ("ring", "all_to_all", "states")


def make_case(length, *, heads=4, kv_heads=2, dtype=torch.float32, batch=2, width=8, seed=0, **settings):
    """Random tensors of a call; of settings, ``mask`` and ``decay`` are what these are made of."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(*shape, generator=generator)

    query, key, value = random(batch, heads, length, width), random(batch, kv_heads, length, width), None
    value = random(batch, kv_heads, length, 5)
    mask = settings.pop("mask", None)
    if mask is not None:
        kind, *shape = mask
        mask = 3 * random(*shape) if kind == "float" else random(*shape) > 0
    if (of_heads := settings.pop("decay", None)) is not None:
        settings["log_decay"] = -torch.rand(batch, of_heads, length, generator=generator)
    tensors = [x.to(dtype) for x in (query, key, value)]
    return Case(*tensors, mask, {"enable_gqa": heads != kv_heads, **settings})


def results(case, mesh, shards, method):
    """The same as `Case.results`, of tensors that are sharded and gathered here."""
    leaves = [x.clone().requires_grad_() for x in (case.query, case.key, case.value)]
    parts = [shard(x, mesh, shards, 2) for x in leaves]
    settings, names = dict(case.settings), list(NAMES)
    mask = None
    if case.mask is not None:
        whole = case.mask.clone().requires_grad_(case.mask.is_floating_point())
        mask = shard(whole, mesh, shards, -2) if whole.shape[-2] > 1 else whole
        if whole.requires_grad:
            leaves.append(whole)
            names.append("mask")
    if case.log_decay is not None:
        leaves.append(case.log_decay.clone().requires_grad_())
        names.append("decay")
        settings["log_decay"] = shard(leaves[-1], mesh, shards, -1)
    output, normalizer = context_parallel(
        *parts, mesh, mask, shards=shards, method=method, return_normalizer=True, timeout=world.PATIENCE, **settings
    )
    do, dn = (shard(x, mesh, shards, 2) for x in case.upstream())
    gradients = torch.autograd.grad([output, normalizer], leaves, [do.to(output.dtype), dn.to(normalizer.dtype)])
    found = [unshard(x.detach(), mesh, shards, 2).double() for x in (output, normalizer)]
    for x in gradients:
        whole = x.double()
        dist.all_reduce(whole, group=mesh.get_group())
        found.append(whole)
    return dict(zip(names, found, strict=True))


def check(meshes, ranks, case, method, order="zigzag"):
    mesh = meshes[ranks]
    found = results(case, mesh, Shards(case.query.shape[2], ranks, order), method)
    if dist.get_rank() == 0:
        Judge(case).check(f"{method} on {ranks}", found)


def check_packed(meshes, ranks, lengths, method, **settings):
    """Each of the sequences is judged by itself."""
    case = make_case(sum(lengths), batch=1, **settings)
    mesh = meshes[ranks]
    found = results(case, mesh, Shards(lengths, ranks), method)
    if dist.get_rank() == 0:
        do, dn = case.upstream()
        for start, stop in itertools.pairwise([0, *itertools.accumulate(lengths)]):
            tensors = [x[:, :, start:stop] for x in (case.query, case.key, case.value)]
            mask = None if case.mask is None else case.mask[..., start:stop, start:stop]
            part = Case(*tensors, mask, case.settings)
            part.upstream = lambda start=start, stop=stop: (do[:, :, start:stop], dn[:, :, start:stop])
            own = {name: x[:, :, start:stop] for name, x in found.items()}
            if mask is not None:
                own["mask"] = own["mask"][..., start:stop]
            Judge(part).check(f"{method} on {ranks}, packed", own)


def cases():
    """Names, and functions of the meshes."""
    for ranks, order, method, is_causal in itertools.product((2, 4), ("zigzag", "contiguous"), METHODS, (True, False)):
        form = "squared" if method == "states" else "expressive"
        case = make_case(37, is_causal=is_causal, form=form)
        yield (
            f"{method} {ranks} {order} {is_causal}",
            functools.partial(check, ranks=ranks, case=case, method=method, order=order),
        )
    lengths, slopes = torch.tensor([20, 33]), torch.tensor([[0.1, 0.0, 1.0, 0.4], [0.3, 2.0, 0.0, 0.2]])
    more = {
        "squared": ({"is_causal": True, "form": "squared"}, "ra"),
        "window": ({"window_size": (9, -1), "is_causal": True}, "ra"),
        "both sides": ({"window_size": (5, 12)}, "ra"),
        "alibi": ({"is_causal": True, "alibi_slopes": slopes[0]}, "ra"),
        "alibi of each": ({"alibi_slopes": slopes, "window_size": (11, -1), "key_lengths": lengths}, "ra"),
        "alibi states": ({"is_causal": True, "alibi_slopes": slopes, "form": "squared"}, "s"),
        "lengths": ({"is_causal": True, "key_lengths": lengths}, "ra"),
        "lengths states": ({"is_causal": True, "key_lengths": lengths, "form": "squared"}, "s"),
        "bias": ({"mask": ("float", 2, 4, 37, 37), "is_causal": True}, "ra"),
        "bias of heads": ({"mask": ("float", 1, 4, 37, 37), "alibi_slopes": slopes[0]}, "ra"),
        "bias of rows": ({"mask": ("float", 2, 1, 37, 1)}, "ra"),
        "bias of keys": ({"mask": ("float", 2, 1, 1, 37), "is_causal": True}, "ra"),
        "bool mask": ({"mask": ("bool", 37, 37)}, "ra"),
        "short": ({"length": 3, "is_causal": True}, "ra"),
        "short states": ({"length": 3, "is_causal": True, "form": "squared", "decay": 2}, "s"),
        "cut groups": ({"heads": 6, "kv_heads": 3, "is_causal": True}, "ra"),
        "one head of keys": ({"heads": 5, "kv_heads": 1, "is_causal": True}, "ra"),
        "bfloat16": ({"dtype": torch.bfloat16, "is_causal": True}, "ra"),
        "float16": ({"dtype": torch.float16, "is_causal": True}, "ra"),
        "float64": ({"dtype": torch.float64, "is_causal": True}, "ra"),
        "bfloat16 states": ({"dtype": torch.bfloat16, "is_causal": True, "form": "squared"}, "s"),
        "decay": ({"decay": 2, "is_causal": True}, "a"),
        "decay squared": ({"decay": 4, "is_causal": True, "form": "squared"}, "as"),
        "decay of keys": ({"decay": 2, "is_causal": True, "form": "squared", "alibi_slopes": slopes[0]}, "as"),
    }
    for name, (settings, methods) in more.items():
        case = make_case(**{"length": 37, **settings})
        for method, ranks in itertools.product(METHODS, (2, 4)):
            if method[0] in methods:
                yield f"{name} {method} {ranks}", functools.partial(check, ranks=ranks, case=case, method=method)
    # Pieces that are longer than the chunks of a state, and components in more than one block.
    long = make_case(560, heads=2, kv_heads=1, width=17, batch=1, decay=1, is_causal=True, form="squared")
    odd = make_case(9, heads=1, kv_heads=1, width=3, batch=1, is_causal=True, form="squared")
    yield "long states", functools.partial(check, ranks=2, case=long, method="states", order="contiguous")
    packed = (17, 5, 1, 30)
    for method in ("ring", "all_to_all"):
        for settings in ({"is_causal": True}, {"alibi_slopes": slopes[0], "window_size": (6, 3)}):
            yield (
                f"packed {method} {len(settings)}",
                functools.partial(check_packed, ranks=4, lengths=packed, method=method, **settings),
            )
    yield (
        "packed mask",
        functools.partial(
            check_packed, ranks=4, lengths=packed, method="ring", mask=("float", 1, 4, 53, 53), is_causal=True
        ),
    )
    yield from (
        ("nearly orthogonal", nearly_orthogonal),
        ("one key", one_key),
        ("what is hidden", what_is_hidden),
        ("dropout", dropout),
        ("equal shards", equal_shards),
        ("bytes", bytes_sent),
        ("unshard", gradient_of_unshard),
        ("second derivative", second_derivative),
        ("errors", errors),
        ("odd state", functools.partial(check, ranks=4, case=odd, method="states")),
        ("transformer", own_transformer),
        ("mixed forms", mixed_forms),
        ("llama", llama),
        ("tensor parallelism", tensor_parallelism),
        ("fsdp", fsdp),
        ("slow rank", slow_rank),
        ("dead rank", dead_rank),
    )


def nearly_orthogonal(meshes):
    """Queries that a state in float32 does not hold: all ranks go to float64 together."""
    case = make_case(37, is_causal=True, form="squared")
    case.key[..., 1:] *= 1e-4
    case.query[..., 0] *= 1e-4
    check(meshes, 4, case, "states")


def one_key(meshes):
    """A row that one key decides, on whichever rank, has gradient 0 exactly, though scores are tiny."""
    mesh, shards = meshes[4], Shards(16, 4)
    tensors = [1e-7 * torch.randn(1, 4, 16, 8), torch.randn(1, 4, 16, 8), torch.randn(1, 4, 16, 8)]
    for options in ({"window_size": (0, 0)}, {"attn_mask": shard(torch.eye(16).log().roll(5, 1), mesh, shards, -2)}):
        parts = [shard(x, mesh, shards, 2).requires_grad_() for x in tensors]
        output = context_parallel(*parts, mesh, shards=shards, **options)
        dq, dk, dv = torch.autograd.grad(output, parts, torch.randn_like(output))
        assert not dq.any()
        assert not dk.any()
        assert dv.any()


def what_is_hidden(meshes):
    """NaN in later keys, behind lengths and behind a mask, on other ranks too, has no influence."""
    keep = torch.ones(37, 37, dtype=torch.bool)
    keep[:, 30:] = False
    for method, settings, mask in (
        ("ring", {"key_lengths": torch.tensor([30, 30])}, None),
        ("all_to_all", {"key_lengths": torch.tensor([30, 30])}, None),
        ("states", {"key_lengths": torch.tensor([30, 30]), "form": "squared"}, None),
        ("ring", {"is_causal": True}, keep),
    ):
        plain = make_case(37, **settings)
        plain.mask = mask
        spoiled = make_case(37, **settings)
        spoiled.mask = mask
        spoiled.key[:, :, 30:] = torch.nan
        spoiled.value[:, :, 30:] = torch.inf
        found = [results(case, meshes[4], Shards(37, 4), method) for case in (plain, spoiled)]
        for name, want in found[0].items():
            torch.testing.assert_close(
                found[1][name], want, rtol=1e-5, atol=1e-6, msg=lambda text, m=method: f"{m} {text}"
            )


def dropout(meshes):
    """Weights are dropped at the rate, kept ones are larger, and both passes drop the same."""
    ones = torch.ones(1, 4, 64, 4, dtype=torch.float64)
    for method in ("ring", "all_to_all"):
        torch.manual_seed(5)
        value = torch.eye(64, dtype=torch.float64).expand(1, 4, -1, -1)
        leaf = value.clone().requires_grad_()
        mesh, shards = meshes[4], Shards(64, 4)
        parts = [shard(x, mesh, shards, 2) for x in (ones, ones, leaf)]
        output = context_parallel(*parts, mesh, dropout_p=0.25, shards=shards, method=method)
        whole = unshard(output.detach(), mesh, shards, 2)  # the weights themselves
        kept = whole > 0
        torch.testing.assert_close(whole[kept], torch.full_like(whole[kept], 1 / 64 / 0.75))
        assert 0.7 < kept.double().mean() < 0.8, method
        rows = kept.flatten(0, 2).unique(dim=0)
        if method == "ring":  # with other heads on each rank, the generators of ranks have to differ
            assert len(rows) == 256
        (gradient,) = torch.autograd.grad(output, leaf, torch.ones_like(output))
        dist.all_reduce(gradient, group=mesh.get_group())
        torch.testing.assert_close(gradient[..., 0], whole.sum(-2))


def equal_shards(meshes):
    """Without `shards`, all ranks have as many tokens, in zigzag order."""
    for ranks, rows in ((4, 5), (2, 8)):
        case = make_case(ranks * rows, is_causal=True)
        mesh, shards = meshes[ranks], Shards(ranks * rows, ranks)
        parts = [shard(x, mesh, shards, 2) for x in (case.query, case.key, case.value)]
        found = context_parallel(*parts, mesh, is_causal=True, enable_gqa=True)
        want = expressive_attention(case.query, case.key, case.value, is_causal=True, enable_gqa=True)
        torch.testing.assert_close(found, shard(want, mesh, shards, 2))


def bytes_sent(meshes):
    """The bytes that ranks send are those of the formulas."""
    sent, start = [], Links.start

    def counting(self, sends, *args):
        sent.append(sum(x.nbytes for x, _ in sends))
        return start(self, sends, *args)

    Links.start = counting
    try:
        for method, dtype, heads, kv_heads, width in (
            ("ring", torch.float32, 4, 2, 8),
            ("ring", torch.bfloat16, 4, 1, 8),
            ("all_to_all", torch.float32, 8, 4, 8),
            ("all_to_all", torch.bfloat16, 6, 2, 8),
            ("states", torch.float32, 4, 2, 20),
            ("states", torch.bfloat16, 4, 4, 8),
        ):
            layer = costs.Layer(heads, kv_heads, width, batch=2, itemsize=dtype.itemsize)
            # No score is small, for which states of float64 would travel.
            parts = [torch.rand(2, n, 6, width).to(dtype).requires_grad_() for n in (heads, kv_heads, kv_heads)]
            sent.clear()
            output = context_parallel(
                *parts, meshes[4], is_causal=True, method=method, enable_gqa=True,
                form="squared" if method == "states" else "expressive", backend=None,
            )  # fmt: skip
            found = [sum(sent)]
            sent.clear()
            output.float().square().sum().backward()
            found.append(sum(sent))
            largest = torch.tensor(found)
            dist.all_reduce(largest, dist.ReduceOp.MAX, group=meshes[4].get_group())
            want = [costs.cost(method, layer, 24, 4, backward).sent for backward in (False, True)]
            assert largest.tolist() == want, (method, heads, kv_heads)
    finally:
        Links.start = start


def gradient_of_unshard(meshes):
    mesh, shards = meshes[4], Shards(11, 4)
    whole = torch.randn(2, 11, 3, requires_grad=True)
    again = unshard(shard(whole, mesh, shards), mesh, shards)
    assert torch.equal(again, whole)
    weight = torch.randn(2, 11, 3)
    (gradient,) = torch.autograd.grad((again * weight * (dist.get_rank() + 1)).sum(), whole)
    torch.testing.assert_close(shard(gradient, mesh, shards), 10 * shard(weight, mesh, shards))  # 1 + 2 + 3 + 4


def second_derivative(meshes):
    """There is none, which is an error and not a wrong number."""
    q = torch.randn(1, 2, 4, 8, requires_grad=True)
    for method, form in (("ring", "expressive"), ("states", "squared")):
        output = context_parallel(q, q, q, meshes[4], method=method, form=form)
        (first,) = torch.autograd.grad(output.square().sum(), q, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            first.sum().backward()


def errors(meshes):
    """Wrong arguments are errors on each rank, before any of them waits for another."""
    q = torch.randn(1, 2, 4, 8)
    mesh = meshes[4]
    decay = torch.zeros(1, 2, 4)
    for error, message, options in (
        (ValueError, "method must be one of .* got 'rings'", {"method": "rings"}),
        (ValueError, "shards must be of the 4 ranks of mesh, got 2", {"shards": Shards(8, 2)}),
        (ValueError, "query must have the 8 tokens that shards gives to rank", {"shards": Shards(32, 4)}),
        (TypeError, "shards must be a Shards", {"shards": 16}),
        (ValueError, "packed sequences must be in a batch of one", {"shards": Shards((8, 8), 4), "batch": 2}),
        (ValueError, 'states" needs form="squared"', {"method": "states"}),
        (
            ValueError,
            "cannot have attn_mask and window_size; ring and all_to_all can",
            {"method": "states", "form": "squared", "attn_mask": torch.ones(4, 16), "window_size": (1, 1)},
        ),
        (
            ValueError,
            "alibi_slopes without is_causal; ring and all_to_all can",
            {"method": "states", "form": "squared", "alibi_slopes": torch.ones(2)},
        ),
        (ValueError, "cannot have log_decay; all_to_all and states can", {"log_decay": decay, "is_causal": True}),
        (ValueError, "packed sequences; ring", {"method": "states", "form": "squared", "shards": Shards((8, 8), 4)}),
        (ValueError, "needs a head for each of the 4 ranks, got 2", {"method": "all_to_all"}),
        (ValueError, r"attn_mask must be broadcastable to .* \(1, 2, 4, 16\)", {"attn_mask": torch.ones(4, 4)}),
        (ValueError, r"key_lengths must have shape \(1,\)", {"key_lengths": torch.tensor([3, 4])}),
        (
            ValueError,
            "key_lengths must be None for packed",
            {"key_lengths": torch.tensor([3]), "shards": Shards((8, 8), 4)},
        ),
        (ValueError, "timeout must be positive", {"timeout": 0}),
        (TypeError, "timeout must be a number", {"timeout": "1"}),
        (ValueError, "alibi_slopes must not require", {"alibi_slopes": torch.ones(2, requires_grad=True)}),
    ):
        own = q.expand(options.pop("batch", 1), -1, -1, -1)
        with pytest.raises(error, match=message):
            context_parallel(own, own, own, mesh, **options)
    with pytest.raises(
        ValueError, match=r"mesh must have one dimension, got 2: choose one of them, such as mesh\[.cp.\]"
    ):
        context_parallel(q, q, q, meshes["grid"])
    with pytest.raises(TypeError, match=r"mesh must be a torch\.distributed\.DeviceMesh, got int"):
        context_parallel(q, q, q, 4)
    with pytest.raises(ValueError, match="key must be of the same sequences and tokens"):
        context_parallel(q, q[:, :, :3], q[:, :, :3], mesh)
    with pytest.raises(ValueError, match="query must have the 1 heads of key, got 2; with enable_gqa"):
        context_parallel(q, q[:, :1], q[:, :1], mesh)
    with pytest.raises(ValueError, match="x must have the 16 tokens of shards in dimension 2"):
        shard(q, mesh, Shards(16, 4), 2)
    with pytest.raises(ValueError, match="x must have the 5 tokens of this rank in dimension 2"):
        unshard(q, mesh, Shards(20, 4), 2)
    from torch.distributed.tensor import DTensor, Replicate

    distributed = DTensor.from_local(q, mesh, [Replicate()])
    with pytest.raises(TypeError, match="query must be this rank's part as a plain tensor, got a DTensor"):
        context_parallel(distributed, distributed, distributed, mesh)
    with ContextParallel(mesh, Shards(16, 4)):
        with pytest.raises(NotImplementedError, match="scaled_dot_product_attention would see this rank's tokens"):
            nn.functional.scaled_dot_product_attention(q, q, q)
        with pytest.raises(ValueError, match=r"among the 4 tokens that rank . has, got 4 queries and 3 keys"):
            expressive_attention(q, q[:, :, :3], q[:, :, :3])
        for position in ("learned", "sinusoidal", "rope", "relative"):
            model = Transformer(16, 32, embed_dim=16, num_heads=2, position=position)
            with pytest.raises(NotImplementedError, match=r"positions of .* number the tokens of one rank"):
                model(torch.zeros(1, 4, dtype=torch.long))
        model = Transformer(16, 32, embed_dim=16, num_heads=2, position="learned_alibi")
        with pytest.raises(ValueError, match="alibi_slopes must not require a gradient"):
            model(torch.zeros(1, 4, dtype=torch.long))
        starts = torch.tensor([0, 4])
        packed = q[0].transpose(0, 1)
        with pytest.raises(NotImplementedError, match="packed sequences are those of shards"):
            expressive_attention_varlen(packed, packed, packed, starts, starts, 4, 4)
    assert expressive_attention(q, q, q).shape == q.shape  # the region is left


# ---- models ----


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: x.grad.clone() for name, x in model.named_parameters() if x.grad is not None}


def summed(found, mesh):
    for x in found.values():
        dist.all_reduce(x, group=mesh.get_group())
    return found


def assert_same(found, want):
    assert found.keys() == want.keys()
    for name, x in want.items():
        assert (found[name] - x).abs().max() <= 1e-5 * x.abs().max(), name


def own_transformer(meshes):
    """A model of `nn` in a region, in both forms, also with ALiBi, whose places are those of the whole sequence."""
    for mechanism, position in itertools.product(("expressive", "squared"), ("none", "alibi")):
        torch.manual_seed(1)
        model = Transformer(16, 32, embed_dim=16, num_heads=2, mechanism=mechanism, position=position)
        tokens, weight = torch.randint(16, (2, 21)), torch.randn(2, 21, 16)
        want = model(tokens)
        expected = gradients(model, (want * weight).sum())
        mesh, shards = meshes[4], Shards(21, 4)
        with ContextParallel(mesh, shards):
            found = model(shard(tokens, mesh, shards))
            own = gradients(model, (found * shard(weight, mesh, shards)).sum())
        torch.testing.assert_close(unshard(found, mesh, shards), want)
        assert_same(summed(own, mesh), expected)


def mixed_forms(meshes):
    """In a region, states travel for calls that states have a form of; a ring has all others."""
    from expressive_attention.distributed import region

    methods = []
    original = region.context_parallel

    def spy(*args, **kwargs):
        methods.append(kwargs["method"])
        return original(*args, **kwargs)

    q = torch.randn(1, 2, 4, 8)
    region.context_parallel = spy
    try:
        with ContextParallel(meshes[4], Shards(16, 4)):
            expressive_attention(q, q, q, is_causal=True)
            expressive_attention(q, q, q, is_causal=True, form="squared")
            expressive_attention(q, q, q, form="squared", window_size=(2, 2))
            expressive_attention(q, q, q, form="squared", alibi_slopes=torch.ones(2))
        with ContextParallel(meshes[2], Shards(8, 2), method="all_to_all"):
            expressive_attention(q, q, q, is_causal=True)
    finally:
        region.context_parallel = original
    assert methods == ["ring", "states", "ring", "ring", "all_to_all"]


def make_llama(switched=True, **config):
    sys.modules["torchvision"] = None  # which may be of another torch, and takes its time
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(2)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = {"sliding_window": None, **sizes, **config}
    model = MistralForCausalLM(MistralConfig(vocab_size=20, num_hidden_layers=2, eos_token_id=None, **config))
    if switched:
        convert(model)
    return model, torch.randint(20, (2, 23)), torch.randn(2, 23, 20)


def run_model(model, tokens, **kwargs):
    return model(tokens, use_cache=False, **kwargs).logits


def llama(meshes):
    """A converted model of transformers, with checkpointed activations, a window, padding and packed sequences."""
    mesh, shards = meshes[4], Shards(23, 4)
    for window in (None, 6):
        model, tokens, weight = make_llama(sliding_window=window)
        want = run_model(model, tokens)
        expected = gradients(model, (want * weight).sum())
        model.gradient_checkpointing_enable()
        model.train()
        with ContextParallel(mesh, shards) as region:
            found = run_model(model, shard(tokens, mesh, shards), position_ids=region.position_ids)
            own = gradients(model, (found * shard(weight, mesh, shards)).sum())
        torch.testing.assert_close(unshard(found, mesh, shards), want, rtol=1e-4, atol=1e-5)
        assert_same(summed(own, mesh), expected)

    model, tokens, _ = make_llama()
    with torch.no_grad():
        exists = (torch.arange(23) < torch.tensor([[23], [9]])).long()
        want = run_model(model, tokens, attention_mask=exists)
        with ContextParallel(mesh, shards, key_lengths=torch.tensor([23, 9])) as region:
            part = shard(tokens, mesh, shards)
            found = unshard(run_model(model, part, position_ids=region.position_ids), mesh, shards)
            padded = shard(exists, mesh, shards)
            if not padded.all():
                with pytest.raises(ValueError, match="attention_mask must hide no token"):
                    run_model(model, part, position_ids=region.position_ids, attention_mask=padded)
        torch.testing.assert_close(found[exists.bool()], want[exists.bool()], rtol=1e-4, atol=1e-5)

        lengths = (9, 3, 11)
        want = torch.cat([run_model(model, part) for part in tokens[:1].split(lengths, 1)], 1)
        shards = Shards(lengths, 4)
        with ContextParallel(mesh, shards, method="all_to_all") as region:
            found = run_model(model, shard(tokens[:1], mesh, shards), position_ids=region.position_ids)
        torch.testing.assert_close(unshard(found, mesh, shards), want, rtol=1e-4, atol=1e-5)

        softmax, *_ = make_llama(switched=False)
        with ContextParallel(mesh, Shards(24, 4)), pytest.raises(NotImplementedError, match="convert switches models"):
            run_model(softmax, tokens[:, :6])


def tensor_parallelism(meshes):
    """Heads over one dimension of the mesh, tokens over the other."""
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    model, tokens, weight = make_llama()
    want = run_model(model, tokens)
    expected = gradients(model, (want * weight).sum())
    grid = meshes["grid"]
    columns = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
    plan = {name: ColwiseParallel() for name in columns}
    plan |= {name: RowwiseParallel() for name in ("self_attn.o_proj", "mlp.down_proj")}
    for layer in model.model.layers:
        parallelize_module(layer, grid["dp"], plan)
    mesh, shards = grid["cp"], Shards(23, 2)
    with ContextParallel(mesh, shards) as region:
        found = run_model(model, shard(tokens, mesh, shards), position_ids=region.position_ids)
        own = gradients(model, (found * shard(weight, mesh, shards)).sum())
    torch.testing.assert_close(unshard(found, mesh, shards), want, rtol=1e-4, atol=1e-5)
    whole = {name: x.full_tensor() if hasattr(x, "full_tensor") else x for name, x in own.items()}
    assert_same(summed(whole, mesh), expected)


def fsdp(meshes):
    """Parameters sharded over all ranks, batches over one dimension of the mesh, tokens over the other."""
    if OLDEST:  # fully_shard asks the CPU for streams, which it has not
        return
    from torch.distributed.fsdp import fully_shard

    model, tokens, weight = make_llama()
    expected = gradients(model, (run_model(model, tokens) * weight).sum())
    for layer in model.model.layers:
        fully_shard(layer, mesh=meshes[4])
    fully_shard(model, mesh=meshes[4])
    grid = meshes["grid"]
    mesh, shards = grid["cp"], Shards(23, 2)
    mine = slice(grid.get_local_rank("dp"), grid.get_local_rank("dp") + 1)
    with ContextParallel(mesh, shards) as region:
        found = run_model(model, shard(tokens[mine], mesh, shards), position_ids=region.position_ids)
        own = gradients(model, 4 * (found * shard(weight[mine], mesh, shards)).sum())  # FSDP takes the mean
    assert_same({name: x.full_tensor() for name, x in own.items()}, expected)


# ---- ranks that do not answer: the last cases ----


def slow_rank(meshes):
    """A rank that does something else: the others say so, and do not wait for ever."""
    q = torch.randn(1, 4, 4, 8)
    group = dist.new_group(list(range(4)))  # what is late does not come into the next case
    from torch.distributed.device_mesh import DeviceMesh

    mesh = DeviceMesh.from_group(group, "cpu", mesh_dim_names=("cp",))
    if dist.get_rank() == 3:
        time.sleep(4)
        return
    start = time.monotonic()
    with pytest.raises(ConnectionError, match=r"rank \d of 4 did not finish .* with .*within 1 s each"):
        context_parallel(q, q, q, mesh, timeout=1)
    assert time.monotonic() - start < 4


def dead_rank(meshes):
    """A rank that dies in the middle of a training step: a clear error on the others, within the timeout."""
    q = torch.randn(1, 4, 4, 8, requires_grad=True)
    mesh = meshes[4]
    output = context_parallel(q, q, q, mesh, timeout=20)
    if dist.get_rank() == 1:
        raise world.Death
    start = time.monotonic()
    with pytest.raises(ConnectionError, match=r"rank \d of 4 did not finish"):
        output.sum().backward()
    assert time.monotonic() - start < 20


def test_four_processes_and_two_compute_what_one_does(tmp_path):
    found = world.run(cases, 4, tmp_path)
    assert not found, "\n".join(f"{name}:\n{text}" for name, text in found.items())
