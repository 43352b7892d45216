"""Which tokens an axis holds: axes carried through a graph, grids read from them."""
