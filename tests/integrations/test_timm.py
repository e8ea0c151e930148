import pytest
import torch

timm = pytest.importorskip("timm", reason="needs the extra 'timm'")

from expressive_attention.integrations import convert, expressive_sdpa  # noqa: E402
from expressive_attention.integrations.timm import Attention  # noqa: E402

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 5}


def vit(**options):
    return timm.models.VisionTransformer(**SMALL, **options).eval()


IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(4))


def test_a_vit_is_switched_and_restored():
    model = vit()
    with torch.no_grad():
        before = model(IMAGES)
        with expressive_sdpa():
            wanted = model(IMAGES)
    conversion = convert(model)
    assert str(conversion.verify(IMAGES)) == "EA ran in 2/2 layers"
    with torch.no_grad():
        assert torch.equal(model(IMAGES), wanted)
        assert not torch.allclose(wanted, before, atol=1e-4)
        conversion.undo()
        assert torch.equal(model(IMAGES), before)


def test_layers_that_were_to_compute_softmax_by_themselves_are_switched_too():
    model = vit()
    for block in model.blocks:
        block.attn.fused_attn = False
    conversion = convert(model)
    assert str(conversion.verify(IMAGES)) == "EA ran in 2/2 layers"
    conversion.undo()
    assert [block.attn.fused_attn for block in model.blocks] == [False, False]


def test_the_layer_can_be_given_to_the_constructor():
    model, plain = vit(attn_layer=Attention), vit()
    plain.load_state_dict(model.state_dict())
    convert(plain)
    with torch.no_grad():
        assert torch.equal(model(IMAGES), plain(IMAGES))


@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "beit_base_patch16_224", "eva02_tiny_patch14_224"])
def test_other_families(name):
    sizes = {"depths": (1, 1, 1, 1), "embed_dim": 24} if "swin" in name else {"depth": 1}
    model = timm.create_model(name, num_classes=5, **sizes).eval()
    conversion = convert(model)
    count = len(conversion.layers)
    assert str(conversion.verify(torch.randn(1, 3, 224, 224))) == f"EA ran in {count}/{count} layers"
    assert count == (4 if "swin" in name else 1)


def test_weights_without_the_model_are_refused_by_softmax(tmp_path):
    model, plain = vit(), vit()
    convert(model)
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    with pytest.raises(RuntimeError, match=r"Unexpected key.*blocks\.0\.attn\.expressive_attention_form"):
        timm.models.load_checkpoint(plain, str(tmp_path / "weights.pt"))
    convert(plain)
    timm.models.load_checkpoint(plain, str(tmp_path / "weights.pt"))
    with torch.no_grad():
        assert torch.equal(plain(IMAGES), model(IMAGES))
