"""SIGTERM with several processes: all of them stop behind the same optimizer step."""

import signal
from typing import TYPE_CHECKING, Any

from recon.calibration import ranks

if TYPE_CHECKING:
    from recon.engine.reconstruction import Reconstruction

LOOK_EVERY = 10
"""Steps after which an accelerator is asked whether all is well."""


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


def agree(module: "Reconstruction", step: int) -> None:
    """If any process was asked to stop, lets Lightning stop all of them when this step is done.

    Accelerators are asked only now and then: the answer keeps the host waiting for them.
    """
    if not ranks.active() or (module.run_device.type != "cpu" and step % LOOK_EVERY):
        return
    if ranks.anywhere(module.stop_asked, module.run_device):
        module.trainer._signal_connector.received_sigterm = True
