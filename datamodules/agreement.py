"""Errors that one process meets and all must know of."""

from collections.abc import Callable
from typing import Any

import torch

from recon import errors
from recon.calibration import ranks


def attempt(action: Callable[[], object]) -> Exception | None:
    """What the action raised, None if nothing: for `agree`."""
    try:
        action()
    except Exception as error:  # raised again by agree, on every rank
        return error
    return None


def agree(error: Exception | None) -> None:
    """Raise on every rank what one of them met: the others would wait for it for ever.

    Raises:
        Exception: This rank's own error.
        ReconError: Another rank's error, by its class and message.
    """
    if ranks.active():
        notes: list[Any] = [None] * ranks.world()
        note = None if error is None else (type(error).__name__, str(error))
        torch.distributed.all_gather_object(notes, note)
        met = next((n for n in notes if n is not None), None)
        if error is None and met is not None:
            kind = getattr(errors, met[0], errors.CalibrationError)
            raise kind(met[1])
    if error is not None:
        raise error
