"""Tests of recon; the tree follows the package."""
