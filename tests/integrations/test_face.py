"""The parts that a user sees: conversions as context managers and tables, modules that say what they compute."""

import re
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from expressive_attention.integrations import calibrate, convert
from expressive_attention.nn import MultiheadAttention, SelfAttention


def test_a_conversion_undoes_itself_at_the_end_of_a_block():
    model, x = nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True), torch.randn(2, 5, 8)
    before = model(x)
    with convert(model) as conversion:
        assert str(conversion.verify(x)) == "EA ran in 1/1 layers"
        assert not torch.allclose(model(x), before, atol=1e-4)
    assert torch.equal(model(x), before)
    with pytest.raises(ValueError, match="must have the width 8"), convert(model):
        model(x[..., :7])
    assert torch.equal(model(x), before)


def test_results_are_shown_as_their_tables():
    model, x = nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True), torch.randn(2, 5, 8)
    conversion = convert(model)
    for shown in (conversion, conversion.verify(x), calibrate(conversion, [x])):
        assert repr(shown) == str(shown)
        assert shown._repr_html_() == f"<pre>{str(shown).replace('>', '&gt;')}</pre>"
    assert "form 'expressive'" in repr(conversion)


def test_records_of_geometry_are_shown_as_their_tables():
    pytest.importorskip("safetensors", reason="needs the extra 'geometry'")
    from expressive_attention.geometry import capture

    model, x = nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True), torch.randn(2, 5, 8)
    convert(model)
    with capture(model) as record:
        model(x)
    assert repr(record) == str(record)
    rows = re.findall(r"<tr><th>(.*?)</th><td>(.*?)</td>(.*?)</tr>", record._repr_html_().split("<tbody>")[1])
    assert [name for name, *_ in rows] == [row["name"] for row in record.rows()]
    for (_, form, cells), row in zip(rows, record.rows(), strict=True):
        shown = re.findall(r"<td(.*?)>(.*?)</td>", cells)
        assert form == row["form"]
        assert shown[0][1] == f"{row['antiparallel']:.3g}"
        assert f" {100 * row['antiparallel']:.0f}%, transparent" in shown[0][0]  # a bar of this length
        assert shown[1] == ("", f"{row['effective_keys']:.3g}")


def test_modules_say_what_they_compute():
    assert repr(SelfAttention(8, 2, position="rope", is_causal=True)).splitlines()[1].strip() == (
        "num_heads=2, mechanism='expressive', position='rope', is_causal=True"
    )
    assert "8, num_heads=2, mechanism='expressive', form='squared'" in repr(MultiheadAttention(8, 2, form="squared"))
    model = nn.TransformerEncoderLayer(8, 2, 16)
    convert(model, form="squared")
    assert "mechanism='expressive', form='squared'" in repr(model)


def test_a_pipeline_is_told_what_to_give_instead():
    class Attn(nn.Module):
        def forward(self, x):
            return F.scaled_dot_product_attention(x, x, x)

    with pytest.raises(TypeError, match=r"got SimpleNamespace; give its \.model$"):
        convert(SimpleNamespace(model=Attn(), task="text"))
    with pytest.raises(TypeError, match=r"give its \.unet or its \.text_encoder$"):
        convert(SimpleNamespace(components={"unet": Attn(), "text_encoder": Attn(), "scheduler": None}))
