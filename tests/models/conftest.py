"""Fixtures for tests that compile models."""

import pytest
import torch


@pytest.fixture
def reset_compiler():
    """Clear the compiler's state before and after the test."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()
