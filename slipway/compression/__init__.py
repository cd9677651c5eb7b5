"""Compression: export to ONNX, INT8, and the gate it has to pass."""
