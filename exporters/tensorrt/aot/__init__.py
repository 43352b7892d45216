"""PROTOTYPE: TensorRT nodes of one kernel each, compiled ahead of time."""
