"""`recon export`: a finished run in the formats of other libraries, each read back and compared.

Formats: native (lossless, for recon.load), torchao and auto-round (diffusers), compressed-tensors
(transformers, vLLM), bf16 (de-quantised weights, loads anywhere; activations not quantised). What a
format cannot hold is refused, with the reason and the formats that can.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from recon.errors import ExportError
from recon.export.exporting import export as write_export
from recon.export.exporting import format_named
from recon.export.folder import REPORT


def export(arguments: Sequence[str]) -> None:
    """Writes each format, and says where, how large, how exact and what runs it.

    Raises:
        ExportError: One folder is given for several formats, or as `recon.export.exporting.export`.
    """
    parser = argparse.ArgumentParser("recon export", description=__doc__)
    parser.add_argument("--run", type=Path, required=True, help="Folder of a run that ended.")
    parser.add_argument("--format", nargs="+", required=True, help="One or several.")
    parser.add_argument("--out", type=Path, help="Default: RUN/exports/FORMAT.")
    parser.add_argument("--force", action="store_true", help="Replace an export that is there.")
    options = parser.parse_args(arguments)
    if options.out and len(options.format) > 1:
        raise ExportError(
            "--out names one folder, and --format several formats. Leave --out out (they go to "
            "RUN/exports), or export one after the other."
        )
    for name in options.format:
        format_named(name)  # before any is written
    for name in options.format:
        folder = write_export(options.run, name, options.out, force=options.force)
        _show(folder)


def _show(folder: Path) -> None:
    report = json.loads((folder / REPORT).read_text())
    console, size = Console(), report["bytes"]
    console.print(f"Written: {folder}", highlight=False, soft_wrap=True)
    differences = report["reload"]["difference"].values()
    worst = max(differences, key=lambda found: found["relative"])
    loader = report["reload"]["loaded_by"].rpartition(".")[2]
    lines = [
        f"Linears {size['quantized_linears']:,} bytes, {size['ratio']:.3f} of bfloat16; folder "
        f"{size['folder']:,} bytes",
        f"Loaded by {loader}: differs by {worst['relative']:.2e} of the output's size "
        f"({worst['tolerance']:.2e} allowed)",
        *(f"Runs as: {line}" for line in report["runs_as"]),
        *report["notes"],
    ]
    for line in lines:
        console.print(f"  {line}", highlight=False, soft_wrap=True)
