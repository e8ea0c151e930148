"""DTensors on two processes: values and gradients of one, and where they lie."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from expressive_attention import expressive_attention, expressive_attention_varlen
from tests.processes import forking

pytestmark = [
    pytest.mark.skipif(not dist.is_available(), reason="needs torch.distributed"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"),
]

# Heads of query and of key; the dimension of a shard; which one the output has.
HEADS = [
    (4, 2, 1, 1),  # groups stay whole
    (3, 3, 1, 1),  # two and one
    (4, 1, 1, 1),  # all share one key
    (6, 3, 1, None),  # groups would be cut
    (4, 2, 0, 0),
    (4, 2, 2, None),  # the sequence
    (4, 2, 3, None),
    (4, 2, None, None),
]
MASKS = [None, (2, 1, 5, 6), (1, "heads", 5, 6), (5, 6), (2, "heads", 1, 6)]


def compare(mesh, call, inputs, dim, expected_dim):
    """`call` with tensors that are sharded on a dimension, where they are that long, and with whole ones."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    def place(x):
        whole = dim is None or x.ndim <= dim or x.shape[dim] == 1
        return [Replicate() if whole else Shard(dim)]

    whole = [x.clone().requires_grad_(x.is_floating_point()) for x in inputs]
    parts = [distribute_tensor(x, mesh, place(x)).requires_grad_(x.is_floating_point()) for x in inputs]
    results = [call(*x) for x in (whole, parts)]
    for output, normalizer in results:
        (output.square().sum() + normalizer.sum()).backward()
    for x, y in zip(*results, strict=True):
        torch.testing.assert_close(y.full_tensor(), x)
        assert y.placements == (Replicate() if expected_dim is None else Shard(expected_dim),)
    for x, y in zip(whole, parts, strict=True):
        if x.grad is not None:
            torch.testing.assert_close(y.grad.full_tensor(), x.grad)


def worker(rank, address):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    dist.init_process_group("gloo", init_method=f"file://{address}", rank=rank, world_size=2)
    try:
        mesh = init_device_mesh("cpu", (2,))
        torch.manual_seed(0)
        options = {"enable_gqa": True, "is_causal": True, "return_normalizer": True}
        for heads, kv_heads, dim, expected in HEADS:
            inputs = [torch.randn(2, heads, 5, 8), torch.randn(2, kv_heads, 6, 8), torch.randn(2, kv_heads, 6, 3)]
            for shape in MASKS:
                mask = [] if shape is None else [torch.randn([heads if n == "heads" else n for n in shape])]
                compare(mesh, lambda *x: expressive_attention(*x, **options), [*inputs, *mask], dim, expected)

        inputs = [torch.randn(4, 4, 5, 8), torch.randn(4, 2, 6, 8), torch.randn(4, 2, 6, 3)]
        lengths, slopes = torch.tensor([6, 3, 0, 4]), torch.rand(4, 4)

        def with_pattern(q, k, v, lengths, slopes):
            pattern = {"key_lengths": lengths, "alibi_slopes": slopes.detach(), "window_size": (3, 1)}
            return expressive_attention(q, k, v, **options, **pattern)

        compare(mesh, with_pattern, [*inputs, lengths, slopes], 0, 0)

        def with_decay(q, k, v, decay):
            return expressive_attention(q, k, v, **options, form="squared", log_decay=-decay, backend="linear")

        for dim, decay in ((0, torch.rand(4, 2, 6)), (1, torch.rand(4, 2, 6)), (1, torch.rand(4, 4, 6))):
            compare(mesh, with_decay, [*inputs, decay], dim, dim)

        def masked(q, k, v, keep):
            return expressive_attention(q, k, v, keep, **options)

        for dim, shape in ((0, (4, 1, 5, 6)), (1, (1, 4, 5, 6)), (1, (5, 6))):
            compare(mesh, masked, [*inputs, torch.rand(shape) < 0.7], dim, dim)

        def dropping(q, k, v):
            torch.manual_seed(3)
            return expressive_attention(q, k, v, None, 0.5, **options)

        compare(mesh, dropping, inputs, None, None)

        from torch.distributed.tensor import DTensor

        starts = torch.tensor([0, 2, 9])
        packed = [torch.randn(9, 2, 8) for _ in range(3)]

        def varlen(q, k, v):
            own = DTensor.from_local(starts, mesh, [Replicate()]) if isinstance(q, DTensor) else starts
            output, normalizer = expressive_attention_varlen(q, k, v, own, own, 7, 7, return_normalizer=True)
            return output, normalizer.transpose(0, 1)

        compare(mesh, varlen, packed, 1, 1)

        q, k, v = (distribute_tensor(x, mesh, [Shard(0)]) for x in inputs)
        with pytest.raises(RuntimeError, match=r"mixed torch\.Tensor and DTensor"):
            expressive_attention(q, k, v, torch.ones(5, 6), enable_gqa=True)
    finally:
        dist.destroy_process_group()


def test_two_processes_compute_what_one_does(tmp_path):
    mp.start_processes(worker, (tmp_path / "rendezvous",), 2, start_method=forking().get_start_method())


def test_groups_that_a_mesh_would_cut():
    from expressive_attention.sharding import _even

    assert _even(2, (4, 2))  # four do not fit, two do
    assert _even(8, (4, 2))
    assert not _even(6, (4, 2))
    assert _even(6, (2, 3))
    assert not _even(6, (2, 2))  # over both, they would be cut
    assert not _even(3, (2,))
