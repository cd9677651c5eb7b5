"""The live page of the service, and what the local stack tells Prometheus of its own programs."""
