"""Tests of recon.calibration."""
