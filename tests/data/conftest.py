"""A data set that is prepared once, for all test files that read it."""

from pathlib import Path

import pytest
from prepared_sets import make, smooth_pictures


@pytest.fixture(scope="session")
def files(tmp_path_factory) -> Path:
    return smooth_pictures(tmp_path_factory.mktemp("files"))


@pytest.fixture(scope="session")
def whole(files, tmp_path_factory) -> Path:
    target = tmp_path_factory.mktemp("prepared") / "set"
    make(files, target)
    return target
