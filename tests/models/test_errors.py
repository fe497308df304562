"""Every error of the models is a ModelError, which is a ValueError, and ends a program with exit code 2."""

import pytest

import models
from models.errors import ModelError, WeightsError


@pytest.mark.parametrize("error", [ModelError, WeightsError])
def test_errors_of_the_models(error):
    assert issubclass(error, models.ModelError) and issubclass(error, ValueError)
    assert error.exit_code == 2
