"""The launches of a forward pass."""
