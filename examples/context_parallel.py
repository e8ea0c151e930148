"""A sequence spread over processes: attention, and a model that trains on its part of the tokens.

    torchrun --nproc-per-node 2 examples/context_parallel.py [--length 4096] [--steps 20]

Each process holds its part of the sequence. The first part compares the three methods with one process; the second
trains a small model to count, once on all processes together and once on one.
"""

import argparse
import os
import time

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.device_mesh import init_device_mesh

from expressive_attention import expressive_attention
from expressive_attention.distributed import ContextParallel, Shards, context_parallel, shard, unshard
from expressive_attention.nn import Transformer


def compare(mesh, length):
    """The three methods against one process: the largest difference of outputs, and the time with gradients."""
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, 4, length, 32) for _ in range(3))
    shards = Shards(length, mesh.size())
    for method, form in (("ring", "expressive"), ("all_to_all", "expressive"), ("states", "squared")):
        parts = [shard(x, mesh, shards, dim=2).requires_grad_() for x in (query, key, value)]
        start = time.perf_counter()
        output = context_parallel(*parts, mesh, is_causal=True, shards=shards, method=method, form=form)
        output.square().sum().backward()
        taken = time.perf_counter() - start
        whole = unshard(output.detach(), mesh, shards, dim=2)
        difference = (whole - expressive_attention(query, key, value, is_causal=True, form=form)).abs().max()
        if dist.get_rank() == 0:
            print(f"{method:10}  {taken:.2f} s, largest difference from one process {difference:.1e}")


def loss_of(model, tokens, mesh=None, shards=None):
    """The mean loss of predicting the next token, or this rank's part of it."""
    inputs, labels = tokens[:, :-1], tokens[:, 1:]
    if mesh is None:
        return F.cross_entropy(model(inputs).flatten(0, 1), labels.flatten())
    with ContextParallel(mesh, shards):
        logits = model(shard(inputs, mesh, shards))
    own = shard(labels, mesh, shards)
    return F.cross_entropy(logits.flatten(0, 1), own.flatten(), reduction="sum") / labels.numel()


def train(mesh, length, steps):
    """The losses of some steps; a mesh of None is one process."""
    torch.manual_seed(0)
    model = Transformer(16, length, embed_dim=32, num_heads=4, position="none")
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    shards = None if mesh is None else Shards(length - 1, mesh.size())
    losses = []
    for _ in range(steps):
        tokens = (torch.randint(16, (2, 1)) + torch.arange(length)) % 16
        loss = loss_of(model, tokens, mesh, shards)
        optimizer.zero_grad()
        loss.backward()
        if mesh is not None:  # of each parameter, every rank has the part of its tokens
            for x in [loss.detach(), *(p.grad for p in model.parameters())]:
                dist.all_reduce(x)
        optimizer.step()
        losses.append(loss.item())
    return losses


def main():
    """Run both parts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args()
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(os.environ["WORLD_SIZE"])))
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("cp",))
    compare(mesh, options.length)
    together, alone = train(mesh, 256, options.steps), train(None, 256, options.steps)
    if dist.get_rank() == 0:
        print(f"loss after {options.steps} steps: {together[-1]:.4f} together, {alone[-1]:.4f} on one process")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
