"""The plan: every budget of a model, and the evidence for it."""
