"""What users did: kept in Redis for the next answer, and in a log for the next release."""
