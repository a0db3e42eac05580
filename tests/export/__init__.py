"""Tests of recon.export."""
