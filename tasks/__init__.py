"""The stages: one module each, named by a verb, run as `python -m tasks.STAGE`."""
