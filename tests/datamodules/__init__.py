"""Tests of recon.datamodules."""
