"""What a graph is of: modules and their names, pieces of a model, the grids that calls bring."""
