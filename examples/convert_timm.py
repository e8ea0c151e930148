"""A vision transformer of timm with expressive attention.

pip install '.[timm]'
python examples/convert_timm.py
"""

import timm
import torch

from expressive_attention.integrations import convert


def main() -> None:
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", num_classes=10).eval()
    images = torch.randn(2, 3, 224, 224)

    conversion = convert(model)
    print(conversion)
    print(conversion.verify(images))


if __name__ == "__main__":
    main()
