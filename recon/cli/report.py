"""`recon report`: one page about a run, or about several side by side, that needs nothing else.

What was quantised and how well, on which samples, what the run was calibrated on, and how to repeat
it. The page opens anywhere, offline, on a phone and in print. A run that has not ended is shown as
far as it is.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from recon.errors import ConfigError
from recon.report.page import write_page
from recon.report.run import open_runs


def report(arguments: Sequence[str]) -> None:
    """Writes the page and says where.

    Raises:
        ConfigError: A folder is no run folder, or several runs have no file named for them.
        CheckpointMismatch: A result is damaged, or its calibration set is another run's.
        CalibrationError: A calibration set is damaged.
    """
    parser = argparse.ArgumentParser("recon report", description=__doc__)
    parser.add_argument(
        "--run", type=Path, action="append", required=True,
        help="Run folder; given again, the runs stand side by side.",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, help="Default, for one run: RUN/report.html.")
    options = parser.parse_args(arguments)
    runs: list[Path] = options.run
    out: Path | None = options.out
    if out is None and len(runs) > 1:
        raise ConfigError(
            f"--run names {len(runs)} folders, and their common page has no place of its own. Name "
            "it with --out FILE, such as --out comparison.html."
        )
    path = out or runs[0] / "report.html"
    if path.is_dir():
        raise ConfigError(
            f"--out {path} is a folder. Name a file in it, such as {path / 'report.html'}."
        )
    write_page(open_runs(runs), path)
    Console().print(f"Written: {path}", highlight=False, soft_wrap=True)
