"""What a workload is: one small package with its data, expectations, model, metrics, export and request schema.

A stage calls the interface below and knows nothing of any workload. Adding one means adding a folder whose modules are

    params.py        MODEL: the class of its section in params.yaml; TECHNIQUES: what `compress` can do with its model
    ingest.py        ingest(params, out, report): source -> columnar data; held_out(params, package, out, report): all
                     of a source as test data, for a model made elsewhere
    expectations.py  suite, frames and plots that `validate` checks and shows
    training.py      TASK: model, samples and loss for the training loop; the metric
    export.py        EXPORT: ONNX, calibration samples, golden inputs; replay(): held-out requests; muddle(): a bad copy
    scoring.py       samples, METRIC and other scores of an exported model, slices, examples, what is unknown to it;
                     chapters(run, samples, package, scores), if there is one: what it adds to the page of `evaluate`
    schema.py        ENDPOINT: the workload's own endpoint of the model server
    offline.py       requests(params, package, work, k): a source as requests, for `predict`

`part(workload, module)` imports one of them, so that a stage loads only what it needs: a replica never imports torch.
"""

from __future__ import annotations

import importlib
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, overload, runtime_checkable

import msgspec
import numpy as np
import numpy.typing as npt

from slipway.errors import ParamsError, RequestError

if TYPE_CHECKING:
    import torch

Array = npt.NDArray[Any]
Tensors = Mapping[str, Array]
T = TypeVar("T")


def part(workload: str, module: str) -> ModuleType:
    """Import one module of a workload's package.

    Raises:
        ParamsError: the workload has no such module.
    """
    name = f"slipway.workloads.{workload}.{module}"
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        raise ParamsError(f"params.yaml: workload: {workload} has no part {module}") from error


class Query(msgspec.Struct, frozen=True):
    """One decoded request: the engine's inputs for one sample, and what the answer needs to be written."""

    inputs: Tensors
    """Engine inputs without the batch dimension, such as history [T] int64."""
    asked: Mapping[str, Any]
    """What the client asked beside the inputs, such as k."""


@dataclass(frozen=True)
class Requests:
    """A source as requests to a model, for a table of its answers: made by `offline.requests`."""

    key: str
    """What a sample is called in the table, such as user."""
    answers: str
    """Where the endpoint's answer has its list, such as items."""
    columns: Mapping[str, str]
    """Arrow's types of the list's fields, by name."""
    total: int | None
    """Samples, where that is known before they are read."""
    read: Callable[[int], Iterator[tuple[str, Query | None]]]
    """Name and request of every sample from the n-th on, always in the same order; None: it cannot be read."""


@dataclass(frozen=True)
class Unknown:
    """What some data hold and a model has never seen, such as items of the ranker."""

    what: str
    """What they are, such as items."""
    count: int
    of: int
    """How many the data hold in all."""
    examples: tuple[str, ...]


class Task(Protocol):
    """What a workload trains, made by `training.TASK(data, train, model)` from the ingested data and its params.

    Its model is a `torch.nn.Module` whose forward takes a batch by its names and gives the loss.
    """

    metric: str
    """Name of the metric that `validate` sums, such as ndcg_at_10: larger is better."""
    unit: str
    """What `count` counts, such as sequences or tokens."""

    def model(self) -> torch.nn.Module:
        """Make the model with weights from torch's generator."""

    def about(self) -> Mapping[str, Any]:
        """What the export has to know beside the weights; plain JSON types."""

    def epoch(self, epoch: int, ranks: int) -> Sequence[Tensors]:
        """Give the micro-batches of an epoch, every sample in one of them, made when they are asked for by their index.

        The same on every process: a function of the seed and the two arguments alone. The loop gives them out in
        order (`slipway.training.order`), `ranks` to a step, so those of one step should cost about the same; after a
        restart with another number of processes it asks for the same `ranks` until the epoch ends.
        """

    def count(self, batch: Tensors) -> int:
        """Units in a batch: what the speed of training is told in."""

    def validate(self, model: torch.nn.Module, rank: int) -> tuple[float, int]:
        """Sum and count of the metric over this rank's share of the validation samples.

        Every rank runs the model equally often: a partitioned model (ZeRO 3) is gathered by all of them together.
        """

    def figures(self, metric: float) -> Mapping[str, float]:
        """What a value of the metric also tells people, by name, such as perplexity."""


class Batches(Sequence[Tensors]):
    """The micro-batches of one epoch, each made when it is asked for: what `Task.epoch` gives."""

    @abstractmethod
    def make(self, index: int) -> Tensors:
        """Make one of them."""

    @overload
    def __getitem__(self, index: int) -> Tensors: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Tensors]: ...
    def __getitem__(self, index: int | slice) -> Tensors | Sequence[Tensors]:
        if isinstance(index, slice):
            return [self.make(i) for i in range(len(self))[index]]
        return self.make(index)


class Endpoint(Protocol):
    """A workload's own endpoint, beside those of V2; made from its package by `schema.ENDPOINT(folder)`."""

    path: str
    """Path under the gateway, such as /v1/recommend."""
    outputs: Sequence[str]
    """Names of the engine's outputs that `encode` reads; the last one holds scores, larger for the surer."""
    slow: bool
    """Whether a small body can take long to decode, as a picture can: no thread that answers others does it."""

    @property
    def request(self) -> type:
        """Type of a request's body, of those that msgspec decodes."""

    @property
    def answer(self) -> type:
        """Type of what `encode` gives, a TypedDict."""

    def decode(self, body: bytes) -> Query:
        """Parse and check one request body.

        Raises:
            RequestError: says which field is wrong and what is allowed.
        """

    def check(self, inputs: Tensors) -> None:
        """Check one sample that came as raw tensors of the right types (no batch dimension): lengths and values.

        Raises:
            RequestError: says which input is wrong and what is allowed.
        """

    def collate(self, queries: Sequence[Query]) -> Tensors:
        """Pad and stack the inputs of several queries: engine inputs with a batch dimension."""

    def encode(self, query: Query, outputs: Tensors) -> Mapping[str, Any]:
        """Make the answer from the engine's outputs for this sample (no batch dimension); plain JSON types."""

    def shown(self, answer: Mapping[str, Any]) -> Sequence[str]:
        """What the answer showed to the user, best first: feedback is matched against it."""


@runtime_checkable
class Personal(Endpoint, Protocol):
    """An endpoint that can also be asked from what a user did: the server then keeps users' histories for it."""

    max_k: int
    """Most that one answer may hold."""

    def personal(self, seen: Sequence[str], k: int) -> Query:
        """Make the query of a user who took the items `seen`, oldest first; none of them is in the answer.

        It holds `k` where the catalogue has as many: what the model does not give, as to a newcomer, is popular.
        """


def parse(decoder: msgspec.json.Decoder[T], body: bytes) -> T:
    """Decode a JSON body into the type of `decoder`.

    Raises:
        RequestError: names the field and what is allowed.
    """
    try:
        return decoder.decode(body)
    except msgspec.ValidationError as error:
        text = str(error).replace("`$.", "`")
        raise RequestError(text if " - at `" in text else f"the body: {text}") from error
    except (ValueError, RecursionError) as error:
        raise RequestError(f"the body is not valid JSON: {error}") from error


def stack(rows: Sequence[Array], length: int | None = None) -> Array:
    """Stack 1-D rows of unequal length, padded with zeros on the left: [B, T]."""
    length = length or max(len(row) for row in rows)
    out = np.zeros((len(rows), length), dtype=rows[0].dtype)
    for target, row in zip(out, rows, strict=True):
        if len(row):
            target[-len(row) :] = row[-length:]
    return out
