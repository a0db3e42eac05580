"""Model families: which blocks, how state flows between them, which Linears share an input."""
