"""The command line: `recon fit | validate | test | predict | export | bench | compare`."""

from recon.cli.main import main

__all__ = ["main"]
