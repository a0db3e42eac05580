"""Tests of recon.callbacks."""
