"""mosec: `python with_mosec.py --address 127.0.0.1 --port PORT`."""

from __future__ import annotations

from typing import Any

from mosec import Server, Worker
from ranker import MAX_BATCH, Ranker


class Inference(Worker):  # type: ignore[misc]  # untyped here
    """One process with the model."""

    def __init__(self) -> None:
        super().__init__()
        self._ranker = Ranker()

    def forward(self, data: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Answer a batch."""
        answers: list[dict[str, Any]] = self._ranker.answer(data)
        return answers


if __name__ == "__main__":
    server = Server()
    server.append_worker(Inference, num=1, max_batch_size=MAX_BATCH, max_wait_time=1, route="/v1/recommend")
    server.run()
