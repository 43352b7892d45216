"""How attention is written: each spelling, found by one anchor node."""
