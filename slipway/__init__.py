"""slipway: from a table of events to a fast, safe, canaried model service."""
