"""Export to ONNX: the file, its function bodies, and the operator library."""
