"""Tests of recon.losses."""
