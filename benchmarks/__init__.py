"""Benchmarks: each writes JSON under benchmarks/results/ with GPU, versions and commit."""
