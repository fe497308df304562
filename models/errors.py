"""The errors that users of the models can cause. Each message is one line: what is wrong, and what to do."""


class ModelError(ValueError):
    """Raised when a model cannot be built, loaded, edited or recorded."""

    exit_code = 2


class WeightsError(ModelError):
    """Raised when a file of weights is missing, damaged, of an unknown kind, or does not fit the model."""
