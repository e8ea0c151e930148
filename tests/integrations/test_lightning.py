"""Checkpoints of Lightning are state dicts: what was trained with expressive attention is not loaded as softmax."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

lightning = pytest.importorskip("pytorch_lightning", reason="needs Lightning")

from expressive_attention.integrations import calibrate, convert  # noqa: E402

pytestmark = [pytest.mark.filterwarnings("ignore")]  # Lightning has advice of many kinds

X = torch.randn(8, 5, 16, generator=torch.Generator().manual_seed(5))


class Plain(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=True)

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, _):
        return self(batch).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


class Converting(Plain):
    """Converts itself, as a class has to for `load_from_checkpoint`, which makes it anew."""

    def __init__(self):
        super().__init__()
        convert(self)


def trained(model, folder):
    trainer = lightning.Trainer(
        max_steps=2, logger=False, enable_progress_bar=False, enable_model_summary=False, accelerator="cpu",
        devices=1, default_root_dir=folder,
    )  # fmt: skip
    trainer.fit(model, DataLoader(list(X), 4))
    trainer.save_checkpoint(folder / "last.ckpt")
    return model.eval(), folder / "last.ckpt"


def test_a_class_that_does_not_convert_itself_refuses_the_checkpoint(tmp_path):
    model = Plain()
    convert(model)
    model, file = trained(model, tmp_path)
    with pytest.raises(RuntimeError, match=r"Unexpected key.*net\.self_attn\.expressive_attention_form"):
        Plain.load_from_checkpoint(file)
    again = Converting.load_from_checkpoint(file).eval()
    assert torch.equal(again(X), model(X))


def test_training_goes_on_from_a_checkpoint(tmp_path):
    model, file = trained(Converting(), tmp_path)
    with torch.no_grad():
        wanted = model(X)
    other = Converting()
    trainer = lightning.Trainer(
        max_steps=3, logger=False, enable_progress_bar=False, enable_model_summary=False, accelerator="cpu", devices=1,
        enable_checkpointing=False, default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(other, DataLoader(list(X), 4), ckpt_path=file)
    assert trainer.global_step == 3
    for parameter in model.parameters():
        parameter.grad = None
    model.train()(X[:4]).square().mean().backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= 0.1 * parameter.grad
    torch.testing.assert_close(other.eval()(X), model.eval()(X))
    assert not torch.allclose(other(X), wanted)


def test_gains_need_a_model_that_has_them(tmp_path):
    model = Plain()
    calibrate(convert(model), [X])
    model, file = trained(model, tmp_path)
    with pytest.raises(RuntimeError, match=r"Unexpected key.*net\.self_attn\.expressive_gain"):
        Converting.load_from_checkpoint(file)
