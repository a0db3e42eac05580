"""Entry point: which command, which run folder, and errors as one sentence."""

import sys
from collections.abc import Sequence

from recon.cli.arguments import with_run_folder
from recon.cli.failures import sentence

LIGHTNING_COMMANDS = ("fit", "validate", "test", "predict")


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs one command; a ReconError ends it with status 2 and its message alone."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        if given[:1] == ["compare"]:
            from recon.cli.compare import compare

            compare(given[1:])
            return
        if given[:1] == ["table"]:
            from recon.cli.table import table

            table(given[1:])
            return
        if given[:1] == ["bench-step"]:
            from recon.cli.bench_step import bench_step

            bench_step(given[1:])
            return
        if given[:1] == ["export"]:
            from recon.cli.export import export

            export(given[1:])
            return
        if given[:1] == ["plan"]:
            from recon.cli.plan import plan

            plan(given[1:])
            return
        # Lightning and torch take seconds to import: `compare --help` need not wait for them.
        from recon.cli.lightning import run

        run(with_run_folder(given))
    except Exception as error:
        said = sentence(error)
        if said is None:
            raise
        sys.stderr.write(f"recon: {said}\n")
        sys.exit(2)
