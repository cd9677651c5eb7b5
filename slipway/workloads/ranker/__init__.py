"""The ranker: a sequential recommender (self-attention over a user's last items)."""
