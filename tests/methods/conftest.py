"""A tiny teacher and its calibration samples, once a session."""

from tests.engine.conftest import samples, teacher

__all__ = ["samples", "teacher"]
