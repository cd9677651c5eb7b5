"""Chaos experiments: faults injected while the steady state is watched."""
