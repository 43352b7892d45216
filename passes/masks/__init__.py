"""Masks that a split can honour, and whether anybody writes into one."""
