"""Entry point: which command, which run folder, and errors as one sentence."""

import sys
from collections.abc import Sequence
from importlib import import_module

from recon import __version__
from recon.cli.arguments import with_run_folder
from recon.cli.failures import sentence
from recon.cli.quiet import quieten
from recon.errors import ConfigError

LIGHTNING_COMMANDS = {
    "fit": "quantise a network, unit by unit (--config FILE), or go on with a run (--run FOLDER)",
    "validate": "as test, to validate.json",
    "test": "compare the result with full precision: samples or answers, to test.json",
    "predict": "what the quantised network makes: videos, pictures or answers",
}
OWN_COMMANDS = {
    "plan": "memory, time, disk and output sizes of a fit, before it runs",
    "compare": "runs side by side, on the terminal",
    "report": "one page about a run, or about several side by side",
    "export": "the result in the formats of other libraries, each loaded again and compared",
    "bench": "an export against full precision, timed on this machine",
    "table": "methods against baselines on the same seeds, as in the README",
    "bench-step": "an optimizer step of S²Q-VDiT on a block of real size, timed",
}
"""Each is the function of its name in the module of its name."""
COMMANDS = {**LIGHTNING_COMMANDS, **OWN_COMMANDS}


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs one command; a ReconError ends it with status 2 and its message alone."""
    quieten()
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        _run(given)
    except Exception as error:
        said = sentence(error)
        if said is None:
            raise
        sys.stderr.write(f"recon: {said}\n")
        sys.exit(2)


def _run(given: list[str]) -> None:
    name = given[0] if given else "--help"
    if name in ("-h", "--help"):
        sys.stdout.write(overview())
    elif name == "--version":
        sys.stdout.write(f"recon {__version__}\n")
    elif name in OWN_COMMANDS:
        module = name.replace("-", "_")
        getattr(import_module(f"recon.cli.{module}"), module)(given[1:])
    elif name in LIGHTNING_COMMANDS:
        # Lightning and torch take seconds to import: `compare --help` need not wait for them.
        from recon.cli.lightning import run

        run(with_run_folder(given), given)
    else:
        raise ConfigError(
            f"{name} is no command. There are {', '.join(COMMANDS)}; `recon --help` says what each "
            "does. Options follow the command."
        )


def overview() -> str:
    """What `recon --help` prints."""
    width = max(map(len, COMMANDS)) + 2
    lines = [f"  {name:{width}}{what}" for name, what in COMMANDS.items()]
    return "\n".join(
        [
            "usage: recon COMMAND [options]",
            "",
            "Post-training quantisation of diffusion transformers and vision-language models.",
            "",
            *lines,
            "",
            "recon COMMAND --help lists the options of a command, recon fit --model.help CLASS",
            "those of a method. fit, validate, test and predict take --run FOLDER for a run that",
            "is there: its configuration and its newest checkpoint.",
            "",
        ]
    )
