"""Attention without a compiler: calls of attention are answered by the op as they come."""
