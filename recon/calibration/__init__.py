"""Calibration: which samples, what is recorded on them, and the streams carried through."""
