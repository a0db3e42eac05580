"""Tests of recon.engine."""
