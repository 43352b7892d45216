"""The launches of a backward pass."""
