"""Choosing budgets: what there is to choose, what it costs, and what it does to the output."""
