import os

import pytest

from tests.integrations.torchvision_stub import make_importable

os.environ["HF_HUB_OFFLINE"] = "1"
make_importable()


@pytest.fixture(autouse=True)
def _fixed_seed():
    import torch

    torch.manual_seed(0)
