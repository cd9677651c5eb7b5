"""Release logic: canary analysis, replayed traffic, promotion and rollback."""
