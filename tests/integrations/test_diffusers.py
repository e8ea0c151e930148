import pytest
import torch

pytest.importorskip("diffusers", reason="needs the extra 'diffusers'")

from diffusers import DiTTransformer2DModel, FluxTransformer2DModel, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor

from expressive_attention.integrations import ConversionError, calibrate, convert, expressive_sdpa
from expressive_attention.integrations.diffusers import ExpressiveAttnProcessor

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


def unet():
    return UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, cross_attention_dim=12,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=4,
    ).eval()  # fmt: skip


def dit():
    return DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=4, in_channels=4, out_channels=4, num_layers=2, sample_size=8,
        patch_size=2, num_embeds_ada_norm=8, norm_num_groups=4,
    ).eval()  # fmt: skip


def flux():
    return FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=12, pooled_projection_dim=6, axes_dims_rope=(2, 2, 4),
    ).eval()  # fmt: skip


UNET_INPUTS = (torch.randn(2, 4, 8, 8), torch.tensor(3), torch.randn(2, 5, 12))
DIT_INPUTS = (torch.randn(2, 4, 8, 8), torch.tensor([3, 3]), torch.tensor([1, 2]))
FLUX_INPUTS = (torch.randn(2, 9, 4), torch.randn(2, 5, 12), torch.randn(2, 6), torch.tensor([0.3, 0.7]),
               torch.randn(9, 3), torch.randn(5, 3))  # fmt: skip


@pytest.mark.parametrize(
    ("build", "inputs", "count"), [(unet, UNET_INPUTS, 8), (dit, DIT_INPUTS, 2), (flux, FLUX_INPUTS, 2)]
)
def test_a_model_is_switched_and_restored(build, inputs, count):
    model = build()
    with torch.no_grad():
        before = model(*inputs)[0]
        with expressive_sdpa():
            wanted = model(*inputs)[0]
    conversion = convert(model)
    assert str(conversion.verify(*inputs)) == f"EA ran in {count}/{count} layers"
    with torch.no_grad():
        assert torch.equal(model(*inputs)[0], wanted)
        conversion.undo()
        assert torch.equal(model(*inputs)[0], before)


def test_the_processor_can_be_set_by_itself():
    model, other = unet(), unet()
    other.load_state_dict(model.state_dict())
    convert(model)
    other.set_attn_processor(ExpressiveAttnProcessor())
    with torch.no_grad():
        assert torch.equal(model(*UNET_INPUTS)[0], other(*UNET_INPUTS)[0])


def test_a_processor_that_computes_softmax_by_itself_is_refused():
    model = unet()
    model.set_attn_processor(AttnProcessor())
    with pytest.raises(ConversionError, match=r"8 of 8 .*: its processor AttnProcessor does not call"):
        convert(model)


@pytest.mark.parametrize("how", ["convert", "squared", "processor", "one layer"])
def test_the_choice_is_saved_and_restored(how, tmp_path):
    model = unet()
    if how == "processor":
        model.set_attn_processor(ExpressiveAttnProcessor())
    elif how == "one layer":
        convert(model, layers="mid_block.attentions.0.transformer_blocks.0.attn1")
    else:
        convert(model, form="squared" if how == "squared" else "expressive")
    again = model
    for place in ("1", "2"):
        again.save_pretrained(tmp_path / place)
        again = UNet2DConditionModel.from_pretrained(tmp_path / place).eval()
    plain = unet()
    weights = {name: x for name, x in model.state_dict().items() if not name.endswith("expressive_attention_form")}
    plain.load_state_dict(weights)
    with torch.no_grad():
        assert torch.equal(again(*UNET_INPUTS)[0], model(*UNET_INPUTS)[0])
        assert not torch.equal(plain(*UNET_INPUTS)[0], model(*UNET_INPUTS)[0])


def test_what_is_undone_is_not_saved(tmp_path):
    model = dit()
    convert(model).undo()
    model.save_pretrained(tmp_path)
    assert "expressive" not in (tmp_path / "config.json").read_text()


def test_gains_that_the_loader_would_leave_out_are_an_error(tmp_path):
    model = dit()
    calibrate(convert(model), [DIT_INPUTS])
    model.save_pretrained(tmp_path)
    with pytest.raises(ConversionError, match=r"saved with gains in transformer_blocks\.0\.attn1, .*merge_gains"):
        DiTTransformer2DModel.from_pretrained(tmp_path)
