"""Putting something else in the place of an attention."""
