"""Entry point: which command, which run folder, and errors as one sentence."""

import sys
from collections.abc import Sequence

from recon.cli.arguments import with_run_folder
from recon.errors import ReconError

LIGHTNING_COMMANDS = ("fit", "validate", "test", "predict")


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs one command; a ReconError ends it with status 2 and its message alone."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        if given[:1] == ["compare"]:
            from recon.cli.compare import compare

            compare(given[1:])
            return
        if given[:1] == ["bench-step"]:
            from recon.cli.bench_step import bench_step

            bench_step(given[1:])
            return
        # Lightning and torch take seconds to import: `compare --help` need not wait for them.
        from recon.cli.lightning import run

        run(with_run_folder(given))
    except ReconError as error:
        sys.exit(f"recon: {error}")
