"""Tests of recon.report."""
