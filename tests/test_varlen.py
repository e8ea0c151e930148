"""Packed sequences: what each backend makes of them, and what the function refuses."""

import contextlib
import dataclasses
import inspect
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, seed, settings

from expressive_attention import expressive_attention, expressive_attention_varlen
from expressive_attention.backends import blockwise, cpu, dropout
from expressive_attention.backends.cpu import library
from expressive_attention.call import Call, Upstream, Visibility, lower
from tests.budget import FUSED, ON_CPU, Case, drawing, fused, threads_of_torch
from tests.packed import Packed, packed_problems

LENGTHS = [(4, 6), (0, 3), (7, 7), (5, 0), (1, 9)]  # of queries and of keys


def starts(lengths, dtype=torch.int32):
    return torch.tensor([0, *lengths], dtype=dtype).cumsum(0, dtype=dtype)


CU_Q, CU_K = (starts([pair[i] for pair in LENGTHS]) for i in range(2))
ROWS, KEYS = int(CU_Q[-1]), int(CU_K[-1])


def with_end(cu, end):
    return torch.cat([cu[:-1], cu.new_tensor([end])])


def packed(dtype=torch.float32, groups=2, rest=0):
    """Queries, keys and values, with so many rows after the last sequence."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((ROWS + rest, 2 * groups, 8), (KEYS + rest, 2, 8), (KEYS + rest, 2, 5))
    return [torch.randn(shape, generator=generator, dtype=dtype).requires_grad_() for shape in shapes]


def one_by_one(q, k, v, *, causal=False, alibi_slopes=None, seqused_k=None, causal_alignment="lower_right", **options):
    """Output and normalizer of each sequence by the reference, in a batch of its own."""
    outputs, normalizers = [], []
    for b in range(len(LENGTHS)):
        rows, keys = slice(CU_Q[b], CU_Q[b + 1]), slice(CU_K[b], CU_K[b + 1])
        if seqused_k is not None:
            keys = slice(CU_K[b], CU_K[b] + min(int(seqused_k[b]), LENGTHS[b][1]))
        slopes = alibi_slopes if alibi_slopes is None or alibi_slopes.ndim == 1 else alibi_slopes[b]
        output, normalizer = expressive_attention(
            *(x[part].transpose(0, 1) for x, part in ((q, rows), (k, keys), (v, keys))), is_causal=causal,
            alibi_slopes=slopes, causal_alignment=causal_alignment, enable_gqa=True, return_normalizer=True,
            backend="reference", **options,
        )  # fmt: skip
        outputs.append(output.transpose(0, 1))
        normalizers.append(normalizer)
    return torch.cat(outputs), torch.cat(normalizers, 1)


SETTINGS = {
    "plain": {},
    "causal": {"causal": True},
    "upper left": {"causal": True, "causal_alignment": "upper_left"},
    "window": {"window_size": (2, 1)},
    "causal window": {"causal": True, "window_size": (3, 5)},
    "slopes": {"alibi_slopes": torch.tensor([0.1, 0.5, 1.0, 3.0])},
    "slopes of each": {"alibi_slopes": torch.rand(len(LENGTHS), 4), "causal": True},
    "used": {"seqused_k": torch.tensor([3, 3, 0, 9, 8], dtype=torch.int32), "causal": True},
}


@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize("name", SETTINGS)
def test_sequences_do_not_see_one_another(backend, name):
    arguments = packed(torch.float64)
    options = SETTINGS[name]
    results = [
        expressive_attention_varlen(*arguments, CU_Q, CU_K, 7, 9, return_normalizer=True, backend=backend, **options),
        one_by_one(*arguments, **options),
    ]
    torch.testing.assert_close(*results)
    upstream = [torch.randn_like(x) for x in results[0]]
    gradients = [torch.autograd.grad(found, arguments, upstream) for found in results]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("part", range(4))
def test_random_problems_within_budget(part):
    @seed(part)
    @settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
    @given(packed_problems())
    def check(problem):
        problem.check("reference", *FUSED)

    check()


@pytest.mark.parametrize("backend", ON_CPU)
def test_rows_of_no_sequence_are_zero(backend):
    q, k, v = packed(rest=3)
    output, normalizer = expressive_attention_varlen(
        q, k, v, CU_Q, CU_K, 7, 9, return_normalizer=True, alibi_slopes=torch.ones(4), backend=backend
    )
    gradients = torch.autograd.grad(output.square().sum() + normalizer.sum(), (q, k, v))
    assert output[ROWS:].abs().max() == 0
    assert normalizer[:, ROWS:].abs().max() == 0
    for x, rows in zip(gradients, (ROWS, KEYS, KEYS), strict=True):
        assert x[rows:].abs().max() == 0
        assert x[:rows].abs().max() > 0


@pytest.mark.parametrize("backend", ON_CPU)
def test_second_derivatives(backend):
    generator = torch.Generator().manual_seed(0)
    shapes = ((3, 2, 2), (3, 1, 2), (3, 1, 2))  # two heads of queries share one of keys
    leaves = [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]
    cu = starts([1, 2])

    def function(q, k, v):
        return expressive_attention_varlen(q, k, v, cu, cu, 2, 2, causal=True, backend=backend)

    assert torch.autograd.gradgradcheck(function, leaves)


def test_compiles_as_one_graph():
    def function(q, k, v):
        return expressive_attention_varlen(q, k, v, CU_Q, CU_K, 7, 9, causal=True).square().sum()

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    arguments = packed()
    torch.testing.assert_close(*(torch.autograd.grad(f(*arguments), arguments) for f in (compiled, function)))
    torch._dynamo.reset()


def long_sequences(dtype, **settings):
    """Blocks of rows and of keys beside short sequences; the second has scores whose squares leave float32's range."""
    generator = torch.Generator().manual_seed(0)
    cases = []
    for size, rows, keys in ((1, 300, 300), (1e-25, 40, 70), (1, 1, 600), (1, 0, 5), (1, 5, 0), (1, 230, 3)):
        shapes = ((1, 4, rows, 32), (1, 2, keys, 32), (1, 2, keys, 16))
        q, k, v = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
        own = {"is_causal": True, "causal_alignment": "lower_right", "enable_gqa": True}
        own |= {name: x for name, x in settings.items() if name != "causal"}
        cases.append(Case(q * size, k, v, None, own, size == 1))
    return Packed(cases, {"causal": True, **settings}, (2, 3), 1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("threads", [1, 3])
def test_long_sequences_within_budget(dtype, threads):
    with threads_of_torch(threads):
        problem = long_sequences(dtype, window_size=(280, -1), alibi_slopes=torch.tensor([0.01, 0.1, 0.5, 0.0]))
        problem.cases = [replace(case, through_normalizer=False) for case in problem.cases]
        problem.check(*FUSED)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("build", library.BUILDS)
def test_same_bits_for_any_number_of_threads(build, dtype):
    problem = long_sequences(dtype, dropout_p=0.1)
    found = []
    for threads in (1, 2, 3, 2):
        with threads_of_torch(threads), fused(f"cpu {build}") as backend, drawing():
            each, _ = problem.results(backend, problem.cases)
            found.append([x for one in each for x in one.values()])
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))


@pytest.mark.parametrize("backend", [*FUSED, "reference"])
def test_dropout_drops_the_weights_that_sequences_of_their_own_drop(backend):
    """Seeds are shifted by the first row of each: checked against masks that say what is dropped."""
    q, k, v = packed(torch.float64)
    torch.manual_seed(3)
    seeds = dropout.draw(q)
    torch.manual_seed(3)
    with fused(backend) as name:
        found = expressive_attention_varlen(q, k, v, CU_Q, CU_K, 7, 9, 0.4, causal=True, backend=name)
    wanted = []
    for b, (rows, keys) in enumerate(LENGTHS):
        own = q[CU_Q[b] : CU_Q[b + 1]].transpose(0, 1)[None]
        own_k, own_v = (x[CU_K[b] : CU_K[b + 1]].transpose(0, 1)[None].repeat_interleave(2, 1) for x in (k, v))
        seen = Visibility(right=0, lower_right=True)
        call = Call(own, own_k, own_v, None, seen, 8**-0.5, "expressive", 0.4, seeds + torch.tensor([0, 0, CU_Q[b]]))
        kept = dropout.kept(call, *map(torch.arange, (1, 4, rows, keys)))
        z = own @ own_k.mT * 8**-0.5
        weight = (z * z / (1 + z * z)).tril(keys - rows)
        share = weight / weight.sum(-1, keepdim=True).clamp(min=1e-300)
        wanted.append(((share * kept / 0.6) @ own_v)[0].transpose(0, 1))
    wanted = torch.cat(wanted)
    torch.testing.assert_close(found, wanted)
    upstream = torch.randn_like(found)
    gradients = [torch.autograd.grad(x, (q, k, v), upstream) for x in (found, wanted)]
    torch.testing.assert_close(*gradients)


def test_the_library_is_called_once(monkeypatch):
    build, calls = library.chosen(), []

    def counting(name):
        return lambda problem: calls.append(name) or getattr(build, name)(problem)

    counted = dataclasses.replace(build, forward=counting("forward"), backward=counting("backward"))
    monkeypatch.setattr(library, "chosen", lambda: counted)
    expressive_attention_varlen(*packed(), CU_Q, CU_K, 7, 9, backend="cpu").sum().backward()
    assert calls == ["forward", "backward"]


@pytest.mark.parametrize("starts", [[0, 50, 20, 10**9], [0, -3, 5, 4]])
def test_starts_that_were_not_checked_reach_no_other_memory(starts):
    """As under torch.compile, which sees no numbers: they count as the nearest ones that are possible."""
    q, k, v = (x.detach().transpose(0, 1)[None] for x in packed())
    wrong = torch.tensor(starts)
    right = torch.tensor([0, ROWS, ROWS, ROWS] if starts[1] > 0 else [0, 0, 5, 5])
    results = []
    for cu in (wrong, right):
        seen = Visibility(query_starts=cu, key_starts=cu, longest_query=ROWS, longest_key=ROWS)
        call = Call(q, k[:, :, :ROWS], v[:, :, :ROWS], None, seen, 0.5, "expressive")
        result = cpu.forward(call)
        upstream = Upstream(torch.ones_like(result.output), None, False)
        results.append([*result[:2], *cpu.backward(call, result, upstream)[:3]])
    torch.testing.assert_close(*results, rtol=0, atol=0)


def test_opcheck():
    q, k, v = (x.detach().transpose(0, 1)[None].requires_grad_() for x in packed(rest=1))
    seen = Visibility(
        right=0, slopes=torch.rand(1, 4), query_starts=CU_Q, key_starts=CU_K, longest_query=7, longest_key=9
    )
    arguments = (q, k, v, None, *seen, 0.5, "expressive", 0.0, None, None, None, "cpu")
    torch.library.opcheck(torch.ops.expressive_attention.attention.default, arguments)
    with torch.no_grad():
        output, normalizer, _ = torch.ops.expressive_attention.attention(*arguments)
    arguments = (*arguments, output, normalizer, torch.randn_like(output), torch.randn_like(normalizer), False, False)
    torch.library.opcheck(torch.ops.expressive_attention.attention_backward.default, arguments)


def test_dropout_drops_weights():
    q, k, v = packed()
    torch.manual_seed(0)
    outputs = [expressive_attention_varlen(q, k, v, CU_Q, CU_K, 7, 9, 0.5) for _ in range(2)]
    assert not torch.equal(*outputs)
    assert expressive_attention_varlen(q, k, v, CU_Q, CU_K, 7, 9, 1.0).abs().max() == 0


def test_the_arguments_are_those_of_flash_attn_varlen_func():
    """The arguments of flash-attn 2.8, as far as they make sense here."""
    ours = list(inspect.signature(expressive_attention_varlen).parameters)
    assert ours[:11] == [
        "q", "k", "v", "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k", "dropout_p", "softmax_scale",
        "causal", "window_size",
    ]  # fmt: skip
    assert {"alibi_slopes", "seqused_k"} < set(ours)


GOOD = {"cu_seqlens_q": CU_Q, "cu_seqlens_k": CU_K, "max_seqlen_q": 7, "max_seqlen_k": 9}
BAD = [
    ({"q": torch.randn(2, 3, 4, 8)}, ValueError, r"q must have three dimensions, .* got shape \(2, 3, 4, 8\)"),
    ({"q": [1.0]}, TypeError, "q must be a torch.Tensor, got list"),
    ({"v": torch.randn(KEYS + 1, 2, 5)}, ValueError, r"v must have the length S = 25 of k"),
    ({"k": torch.randn(KEYS, 2, 7)}, ValueError, r"k must have the head dimension E = 8 of q, got shape \(25, 2, 7\)"),
    (
        {"k": torch.randn(KEYS, 2, 8).double()},
        ValueError,
        "k must have the dtype of q, torch.float32, got torch.float64",
    ),
    ({"v": torch.randn(KEYS, 1, 5)}, ValueError, "v must have the 2 heads of k, got 1"),
    ({"q": torch.randn(ROWS, 3, 8)}, ValueError, "q must have a multiple of the 2 heads of k, at least one, got 3"),
    ({"cu_seqlens_q": CU_Q.float()}, ValueError, "cu_seqlens_q must be int32 or int64, got torch.float32"),
    ({"cu_seqlens_q": torch.cat([CU_Q[:1] + 1, CU_Q[1:]])}, ValueError, "cu_seqlens_q must start at 0"),
    ({"cu_seqlens_q": CU_Q + 1}, ValueError, "cu_seqlens_q must start at 0, never fall, and end at the 17 rows"),
    ({"cu_seqlens_k": CU_K * 2}, ValueError, "cu_seqlens_k must start at 0, never fall, and end at the 25 rows"),
    ({"cu_seqlens_q": with_end(CU_Q, ROWS + 1)}, ValueError, "cu_seqlens_q must .* end at the 17 rows"),
    ({"cu_seqlens_k": with_end(CU_K, KEYS + 1), "max_seqlen_k": 10}, ValueError, "cu_seqlens_k must .* the 25 rows"),
    (
        {"seqused_k": torch.tensor([3, -1, 0, 0, 9])},
        ValueError,
        "seqused_k must be from 0 to the 25 keys .* got -1 to 9",
    ),
    ({"cu_seqlens_k": CU_K.flip(0)}, ValueError, "cu_seqlens_k must start at 0"),
    ({"cu_seqlens_k": torch.tensor([0, 9, 8, 17, 17, 25])}, ValueError, "cu_seqlens_k must start at 0, never fall"),
    ({"cu_seqlens_k": CU_K[:-1]}, ValueError, r"cu_seqlens_k must have the shape \(6,\) of cu_seqlens_q, got \(5,\)"),
    ({"cu_seqlens_q": CU_Q[:1]}, ValueError, r"cu_seqlens_q must have shape \(B \+ 1,\) for B >= 1"),
    ({"max_seqlen_q": 6}, ValueError, "max_seqlen_q must be at least the 7 of the longest sequence, got 6"),
    ({"max_seqlen_q": -1}, ValueError, "max_seqlen_q must be at least 0, got -1"),
    ({"max_seqlen_k": 9.0}, TypeError, "max_seqlen_k must be an int, got float"),
    ({"softmax_scale": float("nan")}, ValueError, "softmax_scale must be finite, got nan"),
    ({"window_size": (-2, 0)}, ValueError, r"window_size must be two integers .* got \(-2, 0\)"),
    ({"window_size": (True, 0)}, ValueError, r"window_size must be two integers .* got \(True, 0\)"),
    ({"window_size": 4}, ValueError, r"window_size must be two integers .* got 4"),
    ({"seqused_k": torch.ones(4, dtype=torch.int32)}, ValueError, r"seqused_k must have shape \(5,\), got \(4,\)"),
    (
        {"seqused_k": torch.full((5,), 26)},
        ValueError,
        "seqused_k must be from 0 to the 25 keys there are, got 26 to 26",
    ),
    (
        {"alibi_slopes": torch.ones(3)},
        ValueError,
        r"alibi_slopes must have the 4 heads of the queries .* got shape \(3,\)",
    ),
    ({"alibi_slopes": torch.ones(2, 4)}, ValueError, r"alibi_slopes must have shape \(4,\) or \(5, 4\), got \(2, 4\)"),
    ({"alibi_slopes": -torch.ones(4)}, ValueError, "alibi_slopes must be at least 0, got -1.0"),
    ({"alibi_slopes": torch.ones(4).double()}, ValueError, "alibi_slopes must be float32, got torch.float64"),
    (
        {"alibi_slopes": torch.ones(4, requires_grad=True), "backend": "blockwise"},
        ValueError,
        "alibi_slopes must not require a gradient",
    ),
    ({"backend": "flash"}, ValueError, "backend must be one of"),
    ({"causal_alignment": "left"}, ValueError, "causal_alignment must be one of"),
]


@pytest.mark.parametrize(
    "change",
    [
        {},  # sequences that end with the last row, and bounds that some of them reach
        {"cu_seqlens_q": with_end(CU_Q, ROWS - 1), "cu_seqlens_k": with_end(CU_K, KEYS - 1)},
        {"max_seqlen_q": 8, "max_seqlen_k": 10},
        {"seqused_k": torch.full((len(LENGTHS),), KEYS)},
        {"seqused_k": torch.zeros(len(LENGTHS), dtype=torch.int64)},
    ],
)
def test_bounds_are_inclusive(change):
    arguments = dict(zip("qkv", packed(), strict=True)) | GOOD | change
    assert expressive_attention_varlen(**arguments).isfinite().all()


@pytest.mark.parametrize(("change", "error", "message"), BAD)
def test_bad_arguments_are_named(change, error, message):
    arguments = dict(zip("qkv", packed(), strict=True)) | GOOD | change
    with pytest.raises(error, match=message):
        expressive_attention_varlen(**arguments)


def test_the_output_is_contiguous():
    q, k, v = packed()
    assert expressive_attention_varlen(q, k, v, CU_Q, CU_K, 7, 9).view(ROWS, -1).shape == (ROWS, 20)


def test_slopes_of_a_model_are_welcome_without_a_gradient():
    slopes = torch.nn.Parameter(torch.rand(4))
    with torch.no_grad():
        output = expressive_attention_varlen(*packed(), CU_Q, CU_K, 7, 9, alibi_slopes=slopes)
    torch.testing.assert_close(output, one_by_one(*packed(), alibi_slopes=slopes.detach())[0])


@pytest.mark.parametrize("form", ["expressive", "squared"])
@pytest.mark.parametrize("shape", [(4,), (len(LENGTHS), 4)])
@pytest.mark.parametrize("backend", [None, *FUSED[1:], "reference"])
def test_slopes_of_sequences_have_a_gradient(backend, shape, form):
    slopes = torch.rand(shape, requires_grad=True)
    arguments = packed(torch.float64, rest=2)
    seen = {"causal": True, "window_size": (5, -1), "form": form}
    with fused(backend) if backend else contextlib.nullcontext() as name:
        results = expressive_attention_varlen(
            *arguments, CU_Q, CU_K, 7, 9, alibi_slopes=slopes, return_normalizer=True, backend=name, **seen
        )
        found = (results[0][:ROWS], results[1][:, :ROWS])
        wanted = one_by_one(*arguments, alibi_slopes=slopes, **seen)
        torch.testing.assert_close(found, wanted)
        upstream = [torch.randn_like(x) for x in wanted]
        gradients = [torch.autograd.grad(x, (*arguments, slopes), upstream) for x in (found, wanted)]
        torch.testing.assert_close(*gradients)


def test_vmap_is_refused():
    q, k, v = (torch.stack([x, x]) for x in packed())
    with pytest.raises(NotImplementedError, match="vmap over sequences of variable length"):
        torch.vmap(lambda *x: expressive_attention_varlen(*x, CU_Q, CU_K, 7, 9))(q, k, v)


def test_one_place_splits_them():
    """A part of each sequence where the backend takes none together, with what it does not know in a mask."""
    q, k, v = (x.detach().transpose(0, 1)[None] for x in packed())
    seen = Visibility(
        right=0, left=2, lower_right=True, query_starts=CU_Q, key_starts=CU_K, longest_query=9, longest_key=9
    )
    call = Call(q, k, v, None, seen, 0.5, "expressive")
    parts = lower(call, blockwise)
    found = [(x.rows.start, x.rows.stop, x.keys.start, x.keys.stop) for x in parts]
    assert found == [
        (a, b, c, d) for a, b, c, d in zip(CU_Q[:-1], CU_Q[1:], CU_K[:-1], CU_K[1:], strict=True)
    ]  # fmt: skip
    for part, (rows, keys) in zip(parts, LENGTHS, strict=True):
        place, key = torch.arange(rows)[:, None] + keys - rows, torch.arange(keys)
        visible = part.call.attn_mask[0, 0] & (key <= torch.arange(rows)[:, None] + part.call.diagonal)
        assert torch.equal(visible, (key <= place) & (key >= place - 2))
        assert part.call.visibility.is_diagonal()
    one = Call(q, k, v, None, Visibility(right=0), 0.5, "expressive")
    (part,) = lower(one, blockwise)
    assert part.call is one
    (part,) = lower(one.but(visibility=Visibility(left=2)), blockwise)
    assert part.call.attn_mask.shape == (1, 1, ROWS, KEYS)


@pytest.mark.parametrize("form", ["expressive", "squared"])
@pytest.mark.parametrize("heads", [2, 4])
@pytest.mark.parametrize("used", [False, True])
def test_decays_of_packed_sequences_are_those_of_each(form, heads, used):
    torch.manual_seed(0)
    starts, rows = torch.tensor([0, 4, 4, 11]), torch.tensor([0, 4, 6, 13])
    q = torch.randn(15, 4, 8, dtype=torch.float64, requires_grad=True)
    k, v = (torch.randn(12, 2, 8, dtype=torch.float64, requires_grad=True) for _ in range(2))
    decay = (-torch.rand(12, heads, dtype=torch.float64)).requires_grad_()
    lengths = torch.tensor([3, 0, 7]) if used else starts.diff()
    found = expressive_attention_varlen(
        q, k, v, rows, starts, 7, 7, causal=True, form=form, log_decay=decay, return_normalizer=True,
        seqused_k=lengths if used else None, alibi_slopes=torch.tensor([0.1, 0.0, 0.2, 0.3]),
    )  # fmt: skip
    outputs, normalizers = [], []
    for row, end, start, n in zip(rows, rows[1:], starts, lengths, strict=False):
        place = torch.arange(end - row)[:, None] + n - (end - row)
        column = torch.arange(n)
        total = decay[start : start + n].cumsum(0).repeat_interleave(4 // heads, 1).T
        here = torch.cat([total, total.new_zeros(4, 1)], 1)[:, place.clamp(min=-1).squeeze(-1)]
        bias = here[..., None] - total[:, None] - torch.tensor([0.1, 0.0, 0.2, 0.3])[:, None, None] * (place - column)
        bias = bias.masked_fill(column > place, -torch.inf)
        own = [
            x[part].transpose(0, 1)
            for x, part in zip((q, k, v), (slice(row, end), *2 * [slice(start, start + n)]), strict=True)
        ]
        output, normalizer = expressive_attention(
            *own, bias, enable_gqa=True, form=form, return_normalizer=True, backend="reference"
        )
        outputs.append(output.transpose(0, 1))
        normalizers.append(normalizer)
    wanted = [torch.cat(outputs), torch.cat(normalizers, 1)]
    assert not found[0][13:].any()
    assert not found[1][:, 13:].any()
    torch.testing.assert_close(found[0][:13], wanted[0])
    torch.testing.assert_close(found[1][:, :13], wanted[1])
    weights = torch.randn(13, 4, 8, dtype=torch.float64)
    gradients = [torch.autograd.grad((x[:13] * weights).sum(), (q, k, v, decay)) for x in (found[0], wanted[0])]
    for x, y in zip(*gradients, strict=True):
        torch.testing.assert_close(x, y)


def test_wrong_decays_of_packed_sequences_are_named():
    q, starts = torch.randn(5, 2, 4), torch.tensor([0, 5])
    for decay, options, message in (
        (torch.zeros(5), {"causal": True}, r"log_decay must have shape \(5, 2\), got \(5,\)"),
        (torch.ones(5, 2), {"causal": True}, "log_decay must be at most 0, got 1"),
        (torch.zeros(5, 2), {}, "log_decay needs is_causal=True"),
    ):
        with pytest.raises(ValueError, match=message):
            expressive_attention_varlen(q, q, q, starts, starts, 5, 5, log_decay=decay, **options)
