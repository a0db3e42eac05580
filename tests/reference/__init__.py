"""Slow, independent restatements of the papers' equations, each with its source."""
