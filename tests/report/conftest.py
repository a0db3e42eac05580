"""A run folder with everything, once."""

from pathlib import Path

import pytest

from tests.report.made_run import made_run


@pytest.fixture(scope="session")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished, tested and exported run; tests must not change it."""
    return made_run(tmp_path_factory.mktemp("report") / "run")
