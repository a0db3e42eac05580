"""Tests of recon.methods."""
