"""BentoML: `bentoml serve with_bentoml:Recommend --host 127.0.0.1 --port PORT`; its batches come as `inputs`."""

from typing import Any

import bentoml
from ranker import MAX_BATCH, Ranker


@bentoml.service(workers=1)
class Recommend:
    """The model behind BentoML."""

    def __init__(self) -> None:
        self._ranker = Ranker()

    @bentoml.api(route="/v1/recommend", batchable=True, max_batch_size=MAX_BATCH, max_latency_ms=1000)  # type: ignore[untyped-decorator]
    def recommend(self, inputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Answer a batch."""
        answers: list[dict[str, Any]] = self._ranker.answer(inputs)
        return answers
