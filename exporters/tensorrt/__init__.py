"""Export to TensorRT: the file, the plugin, and what builds and runs an engine."""
