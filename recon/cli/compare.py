"""`recon compare RUN…`: finished runs side by side, from their json files."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from recon.errors import ConfigError

ROWS: tuple[tuple[str, str, tuple[str, ...], str], ...] = (
    ("method", "summary.json", ("method",), "{}"),
    ("weight bits", "summary.json", ("bits", "weight"), "{}"),
    ("activation bits", "summary.json", ("bits", "activation"), "{}"),
    ("error, round to nearest", "summary.json", ("error", "round_to_nearest"), "{:.4e}"),
    ("error, reconstructed", "summary.json", ("error", "reconstructed"), "{:.4e}"),
    ("seconds", "summary.json", ("seconds", "total"), "{:.0f}"),
    ("bytes of quantised linears", "summary.json", ("size_bytes", "quantized"), "{:,}"),
    ("paired PSNR, dB", "test.json", ("paired", "psnr"), "{:.2f}"),
    (
        "paired PSNR, dB, round to nearest",
        "test.json",
        ("paired_round_to_nearest", "psnr"),
        "{:.2f}",
    ),
    ("paired SSIM", "test.json", ("paired", "ssim"), "{:.4f}"),
    ("oracle, all right, teacher", "test.json", ("full_precision", "all"), "{:.3f}"),
    ("oracle, all right, quantised", "test.json", ("quantized", "all"), "{:.3f}"),
    ("FID, teacher", "test.json", ("full_precision", "fid"), "{:.3f}"),
    ("FID, quantised", "test.json", ("quantized", "fid"), "{:.3f}"),
    ("KID, teacher", "test.json", ("full_precision", "kid"), "{:.4f}"),
    ("KID, quantised", "test.json", ("quantized", "kid"), "{:.4f}"),
    ("precision, quantised", "test.json", ("quantized", "precision"), "{:.3f}"),
    ("recall, quantised", "test.json", ("quantized", "recall"), "{:.3f}"),
)


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
        values = [_inside(content[file], keys) for content in contents]
        if any(value is not None for value in values):
            table.add_row(label, *("–" if v is None else form.format(v) for v in values))
    Console().print(table)


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.is_file() else {}


def _inside(content: dict[str, Any], keys: tuple[str, ...]) -> Any:
    value: Any = content
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value
