"""One thread: on tensors this small, waiting for the other threads is most of the time."""

from tests.engine.conftest import one_thread

__all__ = ["one_thread"]
