import copy

import pytest
import torch
from torch import nn

from expressive_attention.integrations import convert
from expressive_attention.nn import MultiheadAttention

MODES = {
    "train": torch.enable_grad,
    "eval": torch.enable_grad,
    "no_grad": torch.no_grad,
    "inference": torch.inference_mode,
}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors", "ignore:enable_nested_tensor is True")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("batch_first", [False, True])
def test_a_transformer_runs_expressive_attention_in_every_mode(mode, batch_first):
    model = nn.Transformer(8, 2, 2, 2, 16, dropout=0.0, batch_first=batch_first).train(mode == "train")
    x, y = torch.randn(3, 5, 8), torch.randn(3, 4, 8)
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2, [False] * 4 + [True]])
    inputs = (x, y) if batch_first else (x.transpose(0, 1), y.transpose(0, 1))
    masks = {"src_key_padding_mask": padding, "memory_key_padding_mask": padding}
    with MODES[mode]():
        before = model(*inputs, **masks)
    conversion = convert(model)
    assert str(conversion.verify(*inputs, **masks)) == "EA ran in 6/6 layers"
    with MODES[mode]():
        found = model(*inputs, **masks)
        changed = x.clone()
        changed[padding] = torch.randn(3, 8)
        other = model(changed if batch_first else changed.transpose(0, 1), inputs[1], **masks)
    assert not torch.allclose(found, before, atol=1e-3)
    assert torch.equal(found, other)  # padding does not leak
    conversion.undo()
    with MODES[mode]():
        assert torch.equal(model(*inputs, **masks), before)


def test_it_is_our_module_with_the_same_parameters():
    module = nn.MultiheadAttention(8, 2, kdim=3, vdim=5, add_bias_kv=True)
    ours = MultiheadAttention(8, 2, kdim=3, vdim=5, add_bias_kv=True)
    ours.load_state_dict(module.state_dict())
    inputs = torch.randn(4, 2, 8), torch.randn(6, 2, 3), torch.randn(6, 2, 5)
    theirs = module(*inputs)
    conversion = convert(module)
    for found, wanted in zip(module(*inputs), ours(*inputs), strict=True):
        assert torch.equal(found, wanted)
    assert torch.equal(copy.deepcopy(module)(*inputs)[0], ours(*inputs)[0])
    conversion.undo()
    assert torch.equal(module(*inputs)[0], theirs[0])
    assert module._qkv_same_embed_dim is False  # as torch had it, for these widths


def test_a_subclass_with_a_forward_pass_of_its_own_keeps_it():
    class Doubled(nn.MultiheadAttention):
        def forward(self, *args, **kwargs):
            output, weights = super().forward(*args, **kwargs)
            return 2 * output, weights

    module, plain = Doubled(8, 2), nn.MultiheadAttention(8, 2)
    plain.load_state_dict(module.state_dict())
    x = torch.randn(4, 2, 8)
    for model in (module, plain):
        assert str(convert(model).verify(x, x, x)) == "EA ran in 1/1 layers"
    torch.testing.assert_close(module(x, x, x)[0], 2 * plain(x, x, x)[0])


def test_our_own_modules_need_no_conversion():
    from expressive_attention.integrations import ConversionError

    with pytest.raises(ConversionError, match="no attention layer"):
        convert(MultiheadAttention(8, 2))
