"""A training step of a switched model on two processes is that of one."""

import copy

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from expressive_attention.integrations import convert
from tests.oldest import not_on_oldest
from tests.processes import forking

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="needs torch.distributed")


def model_and_data():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    convert(model)
    return model, torch.randn(4, 5, 8), torch.randn(4, 5, 8)


def step(model, x, y):
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    (model(x) - y).square().mean().backward()
    optimizer.step()


def worker(rank, how, address, expected):
    dist.init_process_group("gloo", init_method=f"file://{address}", rank=rank, world_size=2)
    try:
        model, x, y = model_and_data()
        mine = slice(2 * rank, 2 * rank + 2)
        if how == "ddp":
            step(DistributedDataParallel(model), x[mine], y[mine])
            found = {name: value.detach() for name, value in model.named_parameters()}
        else:
            for layer in model.layers:
                fully_shard(layer)
            step(fully_shard(model), x[mine], y[mine])
            found = {name: value.full_tensor() for name, value in model.named_parameters()}
        for name, value in torch.load(expected).items():
            torch.testing.assert_close(found[name], value.detach(), msg=lambda text, name=name: f"{name}: {text}")
        keep_and_load(model, x)
    finally:
        dist.destroy_process_group()


def keep_and_load(model, x):
    """The state dict of torch.distributed.checkpoint is taken by a converted model in one piece, and by no other."""
    kept = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    assert [name for name in kept if name.endswith("expressive_attention_form")]
    again, *_ = model_and_data()
    set_model_state_dict(again, dict(kept))
    torch.testing.assert_close(again(x), model(x))
    set_model_state_dict(model, dict(kept), options=StateDictOptions(full_state_dict=True))
    torch.testing.assert_close(model(x), again(x))
    plain = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True), 2)
    with pytest.raises(RuntimeError, match="expressive_attention_form"):
        set_model_state_dict(plain, dict(kept))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize(
    "how", ["ddp", pytest.param("fsdp2", marks=not_on_oldest("fully_shard asks the CPU for streams, which it has not"))]
)
def test_two_processes_take_the_step_of_one(how, tmp_path):
    model, x, y = model_and_data()
    before = copy.deepcopy(dict(model.named_parameters()))
    step(model, x, y)
    assert all(not torch.equal(value, before[name]) for name, value in model.named_parameters() if "bias" not in name)
    torch.save(dict(model.named_parameters()), tmp_path / "expected")
    start_method = forking().get_start_method()
    mp.start_processes(worker, (how, tmp_path / "rendezvous", tmp_path / "expected"), 2, start_method=start_method)
