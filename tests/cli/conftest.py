"""A tiny pipeline on disk, a finished run of it, and the command line in this process."""

import os
import sys
from collections.abc import Callable
from pathlib import Path

import lightning.pytorch  # noqa: F401 (its log handler keeps the stream it finds when imported)
import pytest

from recon.cli import main
from tests.cli.command import fit_arguments
from tests.models.tiny import write_tiny_cogvideox, write_tiny_dit


@pytest.fixture(scope="session")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three 2B-like blocks with VAE, text encoder, tokenizer and scheduler."""
    return write_tiny_cogvideox(tmp_path_factory.mktemp("pipeline"), layers=3, pipeline=True)


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two blocks of DiT's layout with VAE and scheduler, six classes."""
    folder = tmp_path_factory.mktemp("images")
    return write_tiny_dit(folder, layers=2, classes=6, pipeline=True)


@pytest.fixture(scope="session")
def finished_run(pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a whole run of one epoch."""
    root = tmp_path_factory.mktemp("finished") / "run"
    argv = list(sys.argv)
    try:
        main(fit_arguments(root, pipeline, "--model.epochs", "1"))
    finally:
        sys.argv[:] = argv
    return root


@pytest.fixture
def recon(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> Callable[[list[str]], tuple[int, str]]:
    """Runs a command in this process, in an empty folder: exit status and what was printed."""
    monkeypatch.setattr(sys, "argv", ["recon"])
    os.makedirs(tmp_path / "here", exist_ok=True)
    monkeypatch.chdir(tmp_path / "here")

    def call(arguments: list[str]) -> tuple[int, str]:
        status = 0
        try:
            main(arguments)
        except SystemExit as stop:
            status = stop.code if isinstance(stop.code, int) else 1
        printed = capfd.readouterr()
        return status, printed.out + printed.err

    return call
