"""Answers kept for the next equal request, at three levels: memory, the Redis near the replica, and shared nodes.

An answer follows from its query alone, so it may be given again. Its key holds the model's version, the package and all
that the request asks: a promotion never serves an old model's answer, and a canary never gets the champion's. A canary
thus starts cold while the champion is warm, which can make it look slower, never faster.

Nothing of the cache fails a request: whatever goes wrong in it is a miss.
"""

from slipway.serving.cache.cache import Cache

__all__ = ["Cache"]
