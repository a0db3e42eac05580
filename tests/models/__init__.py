"""Tests of recon.models."""
