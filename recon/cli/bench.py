"""`recon bench`: an export against full precision, timed on this machine.

One denoising step (a held-out sample's call of the network) and one whole sample, in float32 and
bfloat16, eager and compiled. All networks stand in one process and take turns, so that other work
on the machine falls on all of them; peak memory is that of a process (or device) with one of them
alone.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from recon.atomic import write_json
from recon.cli.device import usable
from recon.export.finished import Finished
from recon.export.speed import Settings, measure, subjects


def bench(arguments: Sequence[str]) -> None:
    """Prints medians and ratios, and writes them to `<run folder>/bench.json`.

    Raises:
        ConfigError: There is no such device.
        ExportError: There is no such export, or it does not load.
        CheckpointMismatch: The run did not finish, or its parts belong to different runs.
    """
    parser = argparse.ArgumentParser("recon bench", description=__doc__)
    parser.add_argument("--run", type=Path, required=True, help="Folder of a run that ended.")
    parser.add_argument("--format", default="torchao", help="Of an export in RUN/exports.")
    parser.add_argument("--runs", type=int, default=5, help="Timed rounds, after one to warm up.")
    parser.add_argument("--steps", type=int, help="Of a whole sample; default: the run's. 0: none.")
    parser.add_argument("--eager", action="store_true", help="Leave torch.compile out.")
    parser.add_argument("--threads", type=int, help="Default: torch's.")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args(arguments)
    settings = Settings(options.runs, options.steps, not options.eager, str(usable(options.device)))
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    finished = Finished.open(options.run)
    result = measure(finished, subjects(finished, options.format), settings)
    write_json(options.run / "bench.json", result)
    show(result)


def show(result: dict[str, Any]) -> None:
    """The result as tables."""
    console = Console()
    timed = list(result["networks"][0]["seconds"])
    table = Table(title=f"{result['device']}, {result['threads']} threads; medians in ms")
    for head in ("network", *timed, "disk, MB", "peak, MB"):
        table.add_column(head, justify="left" if head == "network" else "right")
    for row in result["networks"]:
        table.add_row(
            f"{row['network']}, {row['dtype']}",
            *(f"{1000 * row['seconds'][what]:.1f}" for what in timed),
            f"{row['disk_bytes'] / 1e6:.1f}",
            f"{row['peak_bytes'] / 1e6:.0f}",
        )
    console.print(table)
    if not result["integer_dot_products"]:
        console.print(
            "This CPU has no integer dot products (VNNI): int8 products take longer here than "
            "float32 ones, and no ratio says anything about a CPU that has them.",
            soft_wrap=True,
        )
    for dtype, ratios in result["times_faster"].items():
        said = ", ".join(f"{what} {ratio:.2f}" for what, ratio in ratios.items())
        console.print(f"Times faster than {dtype}: {said}", highlight=False, soft_wrap=True)
