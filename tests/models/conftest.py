"""For tests that compile models."""

import pytest
import torch


@pytest.fixture
def reset_compiler():
    """What others have compiled is not there, nor what this test does afterwards."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()
