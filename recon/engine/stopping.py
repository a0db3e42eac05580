"""SIGTERM with several processes: all of them stop behind the same optimizer step."""

import signal
from typing import TYPE_CHECKING, Any

import torch

from recon.calibration import ranks

if TYPE_CHECKING:
    from recon.engine.reconstruction import Reconstruction


def listen(module: "Reconstruction") -> None:
    """Notes SIGTERM from now on; alone, Lightning's own handler does so.

    With several processes that handler runs a collective at whatever point the signal finds each
    of them, which may then meet another collective of its neighbour. Read in its code (2.6.6).
    """
    if not ranks.active():
        return

    def note(number: int, frame: Any) -> None:
        module.stop_asked = True

    # Lightning puts the former handlers back when fit ends.
    signal.signal(signal.SIGTERM, note)


def agree(module: "Reconstruction") -> None:
    """If any process was asked to stop, lets Lightning stop all of them when this step is done."""
    if not ranks.active():
        return
    asked = torch.tensor(float(module.stop_asked), device=module.run_device)
    if ranks.maximum(asked).item():
        module.trainer._signal_connector.received_sigterm = True
