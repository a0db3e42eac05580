"""A tiny teacher and its calibration samples, once a session."""

from pathlib import Path

import pytest

from tests.engine.tiny_run import write_samples
from tests.models.tiny import write_tiny_cogvideox


@pytest.fixture(scope="session")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three 2B-like blocks of width 32."""
    return write_tiny_cogvideox(tmp_path_factory.mktemp("teacher"), layers=3)


@pytest.fixture(scope="session")
def samples(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four calibration samples, two held out."""
    return write_samples(tmp_path_factory.mktemp("data") / "calibration", teacher)
