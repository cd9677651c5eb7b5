"""The model server beside others and under load: `make bench-serving`."""
