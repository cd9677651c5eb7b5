"""Workloads: what is trained and served, one small package each."""
