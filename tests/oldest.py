"""A mark of tests for what the oldest torch that is supported, 2.6, cannot do by itself."""

import pytest
import torch

OLDEST = torch.__version__ < (2, 7)


def not_on_oldest(why):
    return pytest.mark.skipif(OLDEST, reason=f"torch 2.6: {why}")
