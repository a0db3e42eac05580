"""What went wrong, in a sentence."""

import argparse

from recon.errors import ReconError

_NOISE = (
    "Does not validate against",
    "Given value",
    "Expected a <class 'NoneType'>",
    "Subtypes:",
    "Errors:",
)
"""Beginnings of lines in which jsonargparse describes itself, not the mistake."""


def sentence(error: BaseException) -> str | None:
    """The message meant for the user; None for a fault of the program, which keeps its trace.

    A ReconError counts wherever it stands in the chain of causes: one that is raised while an
    argument is turned into an object reaches the surface inside the parser's own errors.
    """
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ReconError):
            return str(cause)
        cause = cause.__cause__ or cause.__context__
    if isinstance(error, argparse.ArgumentError):
        lines = [line.strip().removeprefix("- ") for line in str(error.message).splitlines()]
        kept = [line for line in lines if line and not line.startswith(_NOISE)]
        return f"{' '.join(kept)}. `recon fit --help` and `--model.help CLASS` list what there is."
    return None
