"""The command line: `recon fit | validate | test | predict | export | compare`."""

from recon.cli.main import main

__all__ = ["main"]
