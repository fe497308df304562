"""The errors that users of the models can cause. Each is one line: what is wrong, and what to do."""


class ModelError(ValueError):
    """Raised for a model that cannot be built, filled, edited or recorded."""

    exit_code = 2


class WeightsError(ModelError):
    """Raised for a file of weights that is missing, damaged, of an unknown kind, or does not fit the model."""
