"""The peculiarities of the C kernels: builds, threads, processes, memory. Their numbers: test_fused.py."""

import ctypes
import itertools
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from expressive_attention import expressive_attention
from expressive_attention.backends import cpu
from expressive_attention.backends.cpu import layout, library
from expressive_attention.call import Call, Result, Upstream, Visibility
from tests.budget import fused, threads_of_torch
from tests.stand_ins import call_on, declined_by_func

pytestmark = pytest.mark.skipif(library.MISSING is not None, reason=str(library.MISSING))


def python(code, **environment):
    """The output of a new process."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        check=False,
    )
    return done.stdout.strip(), done.stderr.strip()


def attend(q, k, v, bias=None, **options):
    """Output and gradients."""
    leaves = [x.detach().requires_grad_() for x in (q, k, v, *([] if bias is None else [bias]))]
    output = expressive_attention(*leaves, backend="cpu", **options)
    return [output.detach(), *torch.autograd.grad(output.square().sum(), leaves)]


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


PACKED = Visibility(query_starts=torch.tensor([0, 1]), key_starts=torch.tensor([0, 1]))


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (call_on("cpu", torch.float16), None),
        (call_on("cuda"), "on the CPU, not on cuda"),
        (call_on("cpu", dropout_p=0.1), None),
        (call_on("cpu").but(visibility=Visibility(slopes=torch.ones(1, 1))), None),
        (call_on("cpu").but(visibility=PACKED), None),
        (call_on("cpu").but(visibility=PACKED, attn_mask=torch.ones(1, 1, 1, 1)), "packed sequences have no mask"),
        (call_on("cpu").but(log_decay=torch.zeros(1, 1, 1)), "decays must be in a mask"),
    ],
)
def test_it_says_why_it_declines(call, reason):
    found = cpu.declines(call)
    assert found is None if reason is None else reason in found
    assert "torch.func" in declined_by_func(cpu, call_on("cpu"))


def test_the_automatic_choice_takes_it(monkeypatch):
    def no(*arguments):
        raise AssertionError("blockwise was chosen")

    monkeypatch.setattr("expressive_attention.backends.blockwise.forward", no)
    q = torch.randn(2, 4, 5, 8)
    assert torch.equal(expressive_attention(q, q, q), expressive_attention(q, q, q, backend="cpu"))


SHOW = "from expressive_attention.backends.cpu import library; print(library.chosen().name)"


@pytest.mark.parametrize("build", library.BUILDS)
def test_the_environment_chooses_the_build(build, monkeypatch):
    monkeypatch.setenv("EXPRESSIVE_ATTENTION_CPU", build)
    assert library._choose() == library.BUILDS[build]


def test_the_environment_of_a_process_chooses_its_build():
    assert python(SHOW, EXPRESSIVE_ATTENTION_CPU="portable") == ("portable", "")


def test_the_best_build_is_the_default(monkeypatch):
    monkeypatch.setenv("EXPRESSIVE_ATTENTION_CPU", "")
    assert library._choose() == list(library.BUILDS.values())[-1]


def test_a_build_that_there_is_not_is_an_error():
    out, error = python(SHOW, EXPRESSIVE_ATTENTION_CPU="x86-64-v9")
    last = error.splitlines()[-1]
    assert not out
    assert last.startswith("ValueError: EXPRESSIVE_ATTENTION_CPU must be one of ('portable'")
    assert "'x86-64-v9'" in last


def test_without_the_library_the_package_says_so_once_and_works():
    code = (
        "import torch; from expressive_attention import expressive_attention as ea; q = torch.randn(2, 3, 4);"
        "print(torch.equal(ea(q, q, q), ea(q, q, q, backend='blockwise')))"
    )
    out, error = python(code, EXPRESSIVE_ATTENTION_LIBRARY="/there/is/none.so")
    assert out == "True"
    assert error.count("RuntimeWarning") == 1
    assert "runs on the blockwise backend: the C library could not be loaded: /there/is/none.so" in error
    code = (
        "import torch; from expressive_attention import expressive_attention as ea;"
        "q = torch.randn(2, 3, 4); ea(q, q, q, backend='cpu')"
    )
    _, error = python(code, EXPRESSIVE_ATTENTION_LIBRARY="/there/is/none.so")
    assert "NotImplementedError: backend 'cpu' does not support this call: the C library could not" in error


def test_the_package_without_the_library_is_imported_in_silence():
    assert python("import expressive_attention", EXPRESSIVE_ATTENTION_LIBRARY="/there/is/none.so") == ("", "")


LIBRARY = """
static int run(const void *problem) { return 0; }
const char *ea_build_name(int i) { return i ? 0 : "portable"; }
void *ea_forward(const char *name) { return (void *)run; }
void *ea_backward(const char *name) { return (void *)run; }
void *ea_linear(const char *name) { return (void *)run; }
void *ea_linear_backward(const char *name) { return (void *)run; }
void *ea_step(const char *name) { return (void *)run; }
void ea_set_openmp(void *function) {}
const char *ea_left_out(void) { return "x86-64-v4 x86-64-v4-bf16 "; }
"""


@pytest.mark.parametrize(
    ("members", "taken"),
    [
        (None, False),
        (layout.LAYOUT, True),
        ("0 " + layout.LAYOUT.partition(" ")[2], False),
        (layout.LAYOUT.replace("rows:q keys:q", "keys:q rows:q"), False),
        (layout.LAYOUT.replace("scale:d", "scale:q"), False),
        (layout.LAYOUT.replace("states:q groups:q", "groups:q states:q"), False),
    ],
)
def test_a_library_with_another_struct_is_refused(tmp_path, members, taken, monkeypatch):
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("there is no C compiler")
    answer = "" if members is None else f'const char *ea_layout(void) {{ return "{members}"; }}'
    (tmp_path / "other.c").write_text(LIBRARY + answer)
    library_file = str(tmp_path / "other.so")
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library_file, str(tmp_path / "other.c")], check=True)
    monkeypatch.setenv("EXPRESSIVE_ATTENTION_LIBRARY", library_file)
    builds, left_out, missing = library._load()
    if taken:
        assert (list(builds), left_out, missing) == (["portable"], ("x86-64-v4", "x86-64-v4-bf16"), None)
    else:
        reason = f"the C library {library_file} is of another version of the package, which has to be installed again"
        assert (builds, left_out, missing) == ({}, (), reason)


def small(x):
    """The tensor, in a storage that ends one byte before it does."""
    x = x.clone(memory_format=torch.preserve_format)
    x.untyped_storage().resize_(x.untyped_storage().nbytes() - 1)
    return x


def freed(x):
    x = x.clone(memory_format=torch.preserve_format)
    x.untyped_storage().resize_(0)
    return x


@pytest.mark.parametrize("broken", [small, freed])
@pytest.mark.parametrize("name", ["query", "key", "value", "attn_mask", "key_lengths", "grad_output"])
@pytest.mark.parametrize("strided", [False, True])
def test_memory_that_is_not_there_is_an_error(name, broken, strided):
    tensors = {name: torch.randn(2, 3, 8, 4) for name in ("query", "key", "value", "grad_output")}
    if strided:
        tensors = {name: x.transpose(1, 2).contiguous().transpose(1, 2) for name, x in tensors.items()}
    tensors |= {"attn_mask": torch.randn(1, 1, 8, 8), "key_lengths": torch.tensor([3, 8])}
    tensors[name] = broken(tensors[name])
    visibility = Visibility(key_lengths=tensors.pop("key_lengths"))
    upstream = tensors.pop("grad_output")
    call = Call(*tensors.values(), visibility, 0.5, "expressive")
    if name != "grad_output":
        with pytest.raises(ValueError, match=f"the memory of {name} was freed or is too small"):
            cpu.forward(call)
        result = Result(upstream, upstream[..., 0], None)
    else:
        result = cpu.forward(call)
    with pytest.raises(ValueError, match=f"the memory of {name} was freed or is too small"):
        cpu.backward(call, result, Upstream(upstream, None, True))


@pytest.mark.parametrize("name", ["query", "key", "value", "output", "normalizer"])
def test_what_is_freed_between_forward_and_backward_is_an_error(name):
    q, k, v = (torch.randn(1, 2, 5, 4, requires_grad=True) for _ in range(3))
    copies = [x.clone() for x in (q, k, v)]
    output, normalizer = expressive_attention(*copies, backend="cpu", return_normalizer=True)
    saved = dict(zip(("query", "key", "value", "output", "normalizer"), (*copies, output, normalizer), strict=True))
    upstream = torch.ones_like(output)
    saved[name].untyped_storage().resize_(0)
    with pytest.raises(ValueError, match=f"the memory of {name} was freed"):
        torch.autograd.grad(output, q, upstream)


def test_views_that_end_with_their_storage_are_taken():
    whole = torch.randn(3, 2, 9, 12)
    part = whole[1:, :, 2:, 4:]
    want = expressive_attention(*(part.contiguous() for _ in range(3)), backend="cpu")
    assert torch.equal(expressive_attention(part, part, part, backend="cpu"), want)
    nothing = torch.empty(0, 2, 3, 4)
    assert expressive_attention(nothing, nothing, nothing, backend="cpu").shape == (0, 2, 3, 4)


# Few long heads, many short ones, a mask whose gradient all heads share, one query against many keys.
SHAPES = {
    "one long head": ((1, 1, 700, 32), (1, 1, 900, 32), None),
    "many short heads": ((40, 8, 16, 16), (40, 8, 16, 16), None),
    "shared bias": ((3, 4, 90, 32), (3, 4, 90, 32), (90, 90)),
    "bias of rows": ((2, 2, 300, 16), (2, 2, 300, 16), (300, 1)),
    "one query": ((1, 2, 1, 64), (1, 2, 6000, 64), None),
}


def drawn(name):
    torch.manual_seed(0)
    query, key, bias = SHAPES[name]
    return torch.randn(query), torch.randn(key), torch.randn(key), None if bias is None else torch.randn(bias)


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("threads", [1, 2, 3, 8])
def test_same_bits_for_the_same_number_of_threads(name, threads):
    with threads_of_torch(threads):
        results = [attend(*drawn(name)) for _ in range(3)]
    assert same(results[0], results[1])
    assert same(results[0], results[2])
    with threads_of_torch(1):
        torch.testing.assert_close(results[0], attend(*drawn(name)), rtol=1e-4, atol=1e-5)


def test_eight_python_threads_at_once():
    problems = [drawn(name) for name in SHAPES]
    with threads_of_torch(2):
        alone = [attend(*problem) for problem in problems]

        def work(i):
            torch.set_num_threads(2)  # of this Python thread
            order = [(i + j) % len(problems) for j in range(3 * len(problems))]
            return all(same(attend(*problems[n]), alone[n]) for n in order)

        with ThreadPoolExecutor(8) as pool:
            assert all(pool.map(work, range(8)))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
def test_a_forked_process_computes_the_same():
    """By the kernels alone: operations of torch that use its threads hang after a fork."""
    code = """
import os, torch
from expressive_attention.backends import cpu
from expressive_attention.call import Call, Upstream, Visibility
torch.set_num_threads(2)
q, k, v, g = torch.randn(4, 2, 4, 300, 32).unbind(0)
call = Call(q, k, v, None, Visibility(), 0.2, "expressive")
def run():
    result = cpu.forward(call)
    gradients = cpu.backward(call, result, Upstream(g, None, False))
    return [x.numpy().tobytes() for x in (*result[:2], *gradients[:3])]
before = run()
if pid := os.fork():
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), before == run())
else:
    os._exit(0 if before == run() else 1)
"""
    assert python(code, PYTHONWARNINGS="ignore")[0] == "0 True"


def test_upstream_gradients_of_any_stride():
    torch.manual_seed(1)
    q, k, v = (torch.randn(2, 3, 40, 8, requires_grad=True) for _ in range(3))
    output = expressive_attention(q, k, v, backend="cpu")
    whole = torch.randn(2, 3, 8, 40)
    for upstream in (torch.ones(()).expand(2, 3, 40, 8), whole.mT, torch.randn(2, 3, 40, 16)[..., ::2]):
        got = torch.autograd.grad(output, (q, k, v), upstream, retain_graph=True)
        assert same(got, torch.autograd.grad(output, (q, k, v), upstream.contiguous(), retain_graph=True))


@pytest.mark.parametrize("build", library.BUILDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads", [2, 4])
def test_strides_change_no_bit(build, dtype, heads):
    """Rows that follow one another are read in their place, or packed, where a block has those of two heads too."""
    torch.manual_seed(3)
    q, k, v, upstream = (torch.randn(2, 110, h, 32).to(dtype).transpose(1, 2) for h in (heads, 2, 2, heads))

    def results(*tensors):
        *leaves, gradient = (x.detach().requires_grad_() for x in tensors)
        output = expressive_attention(*leaves, is_causal=True, enable_gqa=True, backend="cpu")
        return [output.detach(), *torch.autograd.grad(output, leaves, gradient.detach())]

    with fused(f"cpu {build}"):
        strided, contiguous = results(q, k, v, upstream), results(*(x.contiguous() for x in (q, k, v, upstream)))
    assert same(strided, contiguous)


def test_a_normalizer_alone_has_a_gradient():
    torch.manual_seed(2)
    q, k, v = (torch.randn(1, 2, 30, 8, requires_grad=True) for _ in range(3))

    def gradients(backend):
        _, normalizer = expressive_attention(q, k, v, return_normalizer=True, backend=backend)
        return torch.autograd.grad(normalizer.square().sum(), (q, k))

    torch.testing.assert_close(gradients("cpu"), gradients("reference"))


@pytest.mark.parametrize("build", library.BUILDS)
def test_nothing_is_left_allocated(build):
    """Also where rows are computed again in double, parts are merged, and nothing is computed at all."""
    try:
        libc = ctypes.CDLL(None)
        libc.mallinfo2.restype = type(
            "Info", (ctypes.Structure,), {"_fields_": [(n, ctypes.c_size_t) for n in "abcdefghij"]}
        )
    except (OSError, AttributeError, TypeError):
        pytest.skip("the C library does not count what is allocated")
    torch.manual_seed(3)
    sizes = [((2, 2, 20, 16), (2, 2, 30, 16)), ((1, 1, 1, 16), (1, 1, 500, 16)), ((1, 1, 3, 16), (1, 1, 0, 16))]
    tensors = [
        [(torch.randn(shape) * factor).to(dtype) for shape in (query, key, key)]
        for (query, key), factor, dtype in itertools.product(
            sizes, (1.0, 1e-18), (torch.float32, torch.float64, torch.bfloat16, torch.float16)
        )
    ]

    def live():
        info = libc.mallinfo2()
        return info.h + info.e  # in use, from the heap and mapped: uordblks and hblkhd

    def calls(repeats):
        for _ in range(repeats):
            for q, k, v in tensors:
                attend(q, k, v)

    with threads_of_torch(3), fused(f"cpu {build}"):
        calls(3)
        before = live()
        calls(20)
        assert live() - before < 16 * 20 * len(tensors)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_is_linear_and_masks_are_not_spread_out():
    code = """
import re, torch
from pathlib import Path
from expressive_attention import expressive_attention
status = lambda name: int(re.search(name + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
def run(length, dtype):
    x = torch.randn(1, length, 2, 16, dtype=dtype, requires_grad=True).transpose(1, 2)
    keep, bias = torch.rand(length) < 0.9, torch.randn(2, length, 1, dtype=dtype)
    expressive_attention(x, x, x, keep, backend="cpu").sum().backward()
    expressive_attention(x, x, x, bias.requires_grad_(), is_causal=True, backend="cpu").sum().backward()
    table, slopes = torch.randn(2, 2 * length - 1).requires_grad_(), torch.rand(2).requires_grad_()
    expressive_attention(x, x, x, relative_bias=table, alibi_slopes=slopes, backend="cpu").sum().backward()
for dtype in (torch.float32, torch.bfloat16):
    run(64, dtype)
Path("/proc/self/clear_refs").write_text("5")
before = status("VmRSS")
for dtype in (torch.float32, torch.bfloat16):
    run(6000, dtype)
print(status("VmHWM") - before)
"""
    out, error = python(code)
    assert not error
    assert int(out) < 6000 * 6000 / 1024 / 2  # KiB; a mask of L x S bytes takes twice that
