"""A tiny teacher and its calibration samples, once a session; one thread."""

from tests.engine.conftest import one_thread, samples, teacher

__all__ = ["one_thread", "samples", "teacher"]
