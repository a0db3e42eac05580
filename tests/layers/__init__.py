"""Tests of recon.layers."""
