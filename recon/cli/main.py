"""Entry point: which command, which run folder, and errors as one sentence."""

import sys
from collections.abc import Sequence
from importlib import import_module

from recon.cli.arguments import with_run_folder
from recon.cli.failures import sentence
from recon.cli.quiet import quieten

OWN_COMMANDS = ("bench", "bench-step", "compare", "export", "plan", "report", "table")
"""Each is the function of its name in the module of its name."""
LIGHTNING_COMMANDS = ("fit", "validate", "test", "predict")


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs one command; a ReconError ends it with status 2 and its message alone."""
    quieten()
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        if given and given[0] in OWN_COMMANDS:
            name = given[0].replace("-", "_")
            getattr(import_module(f"recon.cli.{name}"), name)(given[1:])
            return
        # Lightning and torch take seconds to import: `compare --help` need not wait for them.
        from recon.cli.lightning import run

        run(with_run_folder(given), given)
    except Exception as error:
        said = sentence(error)
        if said is None:
            raise
        sys.stderr.write(f"recon: {said}\n")
        sys.exit(2)
