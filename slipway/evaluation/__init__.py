"""Evaluation: what a candidate scored, the gates it has to pass, and the page that shows it."""
