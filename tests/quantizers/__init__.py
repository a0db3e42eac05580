"""Tests of recon.quantizers."""
