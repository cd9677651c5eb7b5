"""LitServe: `python with_litserve.py PORT`."""

import sys
from typing import Any

import litserve
from ranker import MAX_BATCH, Ranker


class Api(litserve.LitAPI):  # type: ignore[misc]  # untyped here
    """The model behind LitServe."""

    def setup(self, device: str) -> None:
        """Load it."""
        self._ranker = Ranker()

    def decode_request(self, request: dict[str, Any]) -> dict[str, Any]:
        """Take the body as it is."""
        return request

    def batch(self, inputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Keep them as a list."""
        return inputs

    def predict(self, x: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Answer a batch."""
        answers: list[dict[str, Any]] = self._ranker.answer(x)
        return answers

    def unbatch(self, output: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """One answer a request."""
        return output

    def encode_response(self, output: dict[str, Any]) -> dict[str, Any]:
        """Give it as it is."""
        return output


if __name__ == "__main__":
    api = Api(max_batch_size=MAX_BATCH, batch_timeout=0.001, api_path="/v1/recommend")
    server = litserve.LitServer(api, accelerator="cpu", workers_per_device=1)
    server.run(host="127.0.0.1", port=int(sys.argv[1]), generate_client_file=False, log_level="warning")
