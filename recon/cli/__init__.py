"""The command line: `recon COMMAND`; `recon --help` lists the commands."""

from recon.cli.main import main

__all__ = ["main"]
