"""A tiny teacher and its calibration samples, once a session; one thread."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.engine.tiny_run import write_samples
from tests.models.tiny import write_tiny_cogvideox


@pytest.fixture(autouse=True, scope="package")
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three 2B-like blocks of width 32."""
    return write_tiny_cogvideox(tmp_path_factory.mktemp("teacher"), layers=3)


@pytest.fixture(scope="session")
def samples(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four calibration samples, two held out."""
    return write_samples(tmp_path_factory.mktemp("data") / "calibration", teacher)
