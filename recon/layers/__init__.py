"""Quantised layers and how they are put into a module tree."""
