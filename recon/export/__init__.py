"""Finished runs in the formats of other libraries, each read back by those before it counts."""
