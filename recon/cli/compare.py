"""`recon compare RUN…`: finished runs side by side, from their json files."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from recon.errors import ConfigError
from recon.report.comparison import ROWS, inside


def compare(arguments: Sequence[str]) -> None:
    """Prints a table with a column per run.

    Raises:
        ConfigError: A folder has no summary.json.
    """
    parser = argparse.ArgumentParser("recon compare", description=__doc__)
    parser.add_argument("run", nargs="+", type=Path, help="Run folder.")
    runs: list[Path] = parser.parse_args(arguments).run
    table = Table()
    table.add_column("")
    for run in runs:
        if not (run / "summary.json").is_file():
            raise ConfigError(
                f"{run} has no summary.json: it is no run folder, or the run did not finish. "
                "Continue it with --ckpt_path last."
            )
        table.add_column(run.name, justify="right")
    contents = [{name: _read(run / name) for name in ("summary.json", "test.json")} for run in runs]
    for label, file, keys, form in ROWS:
        values = [inside(content[file], keys) for content in contents]
        if any(value is not None for value in values):
            table.add_row(label, *("–" if v is None else format(v, form) for v in values))
    Console().print(table)


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.is_file() else {}
