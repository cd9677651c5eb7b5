"""What a user may turn: the sections of `params.yaml` as frozen, typed objects. `config` reads and checks the file.

The text under a field is its help everywhere: in errors, in `--help` and in the Airflow form. A section bears the name
of the stage that reads it. A workload keeps its own section beside its code, in `slipway/workloads/NAME/params.py`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

Share = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1)]
Port = Annotated[int, Field(ge=1024, le=65535)]


def turn() -> Any:
    """Mark a field as one that a user turns for a single run: it appears in the Airflow form."""
    return Field(json_schema_extra={"form": True})


class Section(BaseModel):
    """A part of `params.yaml`: frozen, strict, and deaf to keys it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True)


class Columns(Section):
    """Which columns of the source hold what: a name, or a position from 0 where the file has no header."""

    user: str | int = 0
    """Column of the user (name, or position from 0)."""
    item: str | int = 1
    """Column of the item (name, or position from 0)."""
    time: str | int | None = None
    """Column of the time (name, or position from 0); empty: the order of the rows counts."""


class TokenizerParams(Section):
    """What cuts texts into tokens: trained on the source, or given."""

    vocabulary: Annotated[int, Field(ge=257, le=1_048_576)] = 2048
    """Tokens that are trained on the source, byte-level BPE (257..1048576: every byte, and the end of a text)."""
    file: str | None = None
    """Path of a tokenizer.json that is used instead; empty: one is trained."""


class ImagesParams(Section):
    """How pictures are read and parted; tables and texts have none."""

    image_size: Annotated[int, Field(ge=8, le=1024)] | Literal["auto"] = "auto"
    """Side of the square that the model sees (px, 8..1024), or auto: what the source's pictures have, 32 to 160."""
    validation_share: Annotated[float, Field(gt=0, lt=0.5)] = 0.1
    """Pictures for validation, by hash of their content, where the source parts none (share, over 0, under 0.5)."""
    test_share: Annotated[float, Field(gt=0, lt=0.5)] = 0.1
    """Pictures for the test, by hash of their content, where the source parts none (share, over 0, under 0.5)."""
    min_side: Count = 8
    """Pictures whose shorter side is less are left out (px, 1 or more)."""
    max_megapixels: Annotated[float, Field(gt=0, le=89)] = 64.0
    """Pictures with more are left out before they are decoded (million pixels, over 0, at most 89)."""
    max_mb: Annotated[float, Field(gt=0, le=1024)] = 32.0
    """Larger files are left out before they are read (MB, over 0, at most 1024)."""
    near_bits: Annotated[int, Field(ge=0, le=16)] = 6
    """Bits of 64 in which the perceptual hashes of near duplicates may differ (0..16)."""
    leaks: Literal["quarantine", "stop"] = "quarantine"
    """Training pictures that nearly repeat held-out ones: quarantine (left out), or stop: `validate` ends the run."""


class IngestParams(Section):
    """Where the data come from and which of them are kept."""

    source: Annotated[str, Field(min_length=1), turn()] = "embedded"
    """A table (ranker; also a URL), a text file or folder (llm), a folder or archive of class folders (classifier), or
    `embedded`: what is there."""
    format: Literal["auto", "csv", "tsv", "parquet", "text"] = "auto"
    """Form of the source; auto: by its ending (csv: parted by commas, semicolons or bars; text: by blanks)."""
    columns: Columns = Columns()
    """Which columns hold what."""
    min_user_events: Annotated[int, Field(ge=3)] = 3
    """Users with fewer events are left out (events, 3 or more: one each to train, validate and test)."""
    min_item_events: Count = 1
    """Items with fewer events are left out (events, 1 or more)."""
    memory_mb: Annotated[int, Field(ge=128)] = 1024
    """Memory that reading and sorting may use (MB, 128 or more); what does not fit goes to disk."""
    tokenizer: TokenizerParams = TokenizerParams()
    """How texts are cut into tokens; tables have none."""
    images: ImagesParams = ImagesParams()
    """How pictures are read."""
    distributions: Annotated[tuple[str, ...], Field(min_length=1, strict=False)] = ("pandas",)
    """Installed Python distributions that the ranker's embedded data are mined from."""

    @field_validator("source")
    @classmethod
    def _bears_no_password(cls, source: str) -> str:
        if "://" in source and urlsplit(source).password:
            raise ValueError("a password in the URL would get into reports and commits; give it by the environment")
        return source


class ValidateParams(Section):
    """When data are too bad to train on. Hard limits stop the pipeline, soft ones warn."""

    max_null_ratio: Share = 0.0
    """Hard: share of rows without a user, an item or a time, or of texts that are empty or not UTF-8 (0..1)."""
    max_duplicate_ratio: Share = 0.01
    """Hard: share of rows, texts or pictures that repeat an earlier one (0..1)."""
    min_users: Count = 100
    """Hard: users after filtering (1 or more); texts have none."""
    min_items: Count = 20
    """Hard: items after filtering (1 or more); texts have none."""
    min_volume_ratio: Share = 0.5
    """Hard: events, tokens or pictures against the last accepted version of the same source (0..1)."""
    max_psi: Positive = 0.2
    """Soft: population stability index of items, texts' bytes or classes, against the last version (over 0)."""
    max_unusable_ratio: Share = 0.02
    """Hard: share of files that are no picture, broken, tiny or huge, and are left out (0..1; 0: one stops the run)."""
    min_class_pictures: Count = 10
    """Hard: training pictures of every class (1 or more)."""
    max_imbalance: Annotated[float, Field(ge=1)] = 20.0
    """Soft: training pictures of the largest class over those of the smallest (1 or more)."""
    max_near_ratio: Share = 0.1
    """Soft: share of pictures that look like another one of their part (0..1)."""
    max_leak_ratio: Share = 0.0
    """Soft: share of held-out pictures that a training picture nearly repeats in the source (0..1)."""


class LossScaleParams(Section):
    """Dynamic loss scaling of fp16: the loss is scaled so that small gradients do not vanish."""

    initial: Positive = 32768.0
    """Scale of the first step (over 0; 2^15 as published)."""
    growth: Annotated[float, Field(gt=1)] = 2.0
    """Factor that the scale grows by after a window without an overflow (over 1)."""
    backoff: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """Factor that the scale shrinks by at an overflow, whose step is skipped (0..1, both excluded)."""
    window: Count = 2000
    """Steps without an overflow after which the scale grows (1 or more)."""


class CommunicationParams(Section):
    """How gradients are averaged among the processes; a node is a machine of the launcher's."""

    method: Literal["flat", "hierarchical", "powersgd", "hierarchical_powersgd", "auto"] = "flat"
    """flat: DeepSpeed's own; at zero 0 also hierarchical: inside nodes first; powersgd: compressed; auto: by trial."""
    rank: Annotated[int, Field(ge=1, le=1024)] | Literal["auto"] = "auto"
    """Rank of PowerSGD's factors (1..1024), or auto: the largest that sends at most a sixteenth of flat."""
    warmup_steps: Annotated[int, Field(ge=2)] = 20
    """First steps that are not compressed (2 or more)."""


class SparseParams(Section):
    """Top-K sparse training: of each weight matrix in the blocks only the rows largest in magnitude are trained."""

    share: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of the rows that are trained (over 0 to 1; 1: dense)."""
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.75
    """Share of the training that is dense, before the first selection (0..1, 1 excluded); less of it costs quality."""
    reselect_every: Count = 200
    """Steps after which the rows are selected anew (1 or more)."""
    tables: bool = False
    """Also of embeddings and output layers, a row an item or token: saves most memory, but costs quality."""
    freeze: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the blocks, from below, that are frozen at most, in turn (0..1, 1 excluded; 0: none)."""


class LoaderParams(Section):
    """How batches are made ready while the model computes."""

    workers: Annotated[int, Field(ge=0, le=64)] | Literal["auto"] = "auto"
    """Preprocessing processes of each rank (0..64; 0: in the rank itself), or auto: as many as keep it busy."""
    max_workers: Annotated[int, Field(ge=1, le=64)] = 4
    """Most processes that auto may start for one rank (1..64)."""
    prefetch: Annotated[int, Field(ge=1, le=64)] = 4
    """Batches that are made ahead (1..64)."""


class TrainParams(Section):
    """How the model is trained; what the model is stands in the workload's own section."""

    epochs: Annotated[int, Field(ge=1, le=10_000), turn()] = 16
    """Passes over the training data (1..10000)."""
    batch_size: Count = 64
    """Samples a step on one process: the micro-batch (1 or more)."""
    learning_rate: Positive = 2e-3
    """Peak learning rate of AdamW (over 0)."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Decoupled weight decay of AdamW (0 or more)."""
    world_size: Annotated[int, Field(ge=1, le=1024), turn()] = 2
    """Training processes, of all nodes together (1..1024); what each needs of memory, `python -m tasks.train --plan`
    shows."""
    zero: Literal[0, 1, 2, 3, "auto"] = 1
    """DeepSpeed ZeRO: partitioned are 0 nothing, 1 the optimizer, 2 and gradients, 3 and parameters; auto: the cheapest
    that fits, with its offload, as `python -m tasks.train --plan` shows."""
    offload: Literal["none", "cpu", "disk"] = "none"
    """Where optimizer state, and at ZeRO 3 parameters, are kept while the device does not need them."""
    device_memory_gb: Positive | None = None
    """Memory of one device that the plan has to fit into (GB, 10^9 bytes, over 0); empty: what this machine has."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Arithmetic of forward and backward; weights and optimizer keep fp32 masters."""
    loss_scale: LossScaleParams = LossScaleParams()
    """Loss scaling of fp16."""
    communication: CommunicationParams = CommunicationParams()
    """How gradients travel."""
    sparse: SparseParams = SparseParams()
    """Top-K sparse training."""
    loader: LoaderParams = LoaderParams()
    """How batches are made ready."""
    patience: Annotated[int, Field(ge=0)] = 0
    """Epochs without a better validation metric after which training ends early (0: never)."""
    profile: bool = False
    """Leave a trace of a few steps that Perfetto opens (reports/train.trace.json.gz)."""
    restarts: Annotated[int, Field(ge=0, le=100)] = 2
    """Times that the processes are started again from the last checkpoint when one of them was killed (0..100)."""
    checkpoint_every_s: Positive = 30.0
    """Seconds between checkpoints (over 0)."""
    seed: Annotated[int, Field(ge=0)] = 1
    """Seed of initial weights, order and dropout (0 or more)."""

    @model_validator(mode="after")
    def _leaves_whole_gradients(self) -> TrainParams:
        method = self.communication.method
        if method not in ("flat", "auto") and self.zero != 0:
            raise ValueError(
                f"communication.method: {method} needs zero: 0, got zero: {self.zero}: from ZeRO 1 on gradients are "
                "reduced inside the optimizer; set zero: 0, or communication.method: flat"
            )
        return self

    @model_validator(mode="after")
    def _offloads(self) -> TrainParams:
        if self.offload != "none" and self.zero == 0:
            raise ValueError(f"offload {self.offload} needs zero 1, 2, 3 or auto; at stage 0 nothing is partitioned")
        return self

    @model_validator(mode="after")
    def _sparse_fits(self) -> TrainParams:
        on = "sparse.share" if self.sparse.share < 1 else "sparse.freeze" if self.sparse.freeze > 0 else None
        for key, fits in (("zero", 0), ("offload", "none"), ("precision", "fp32")):
            got = getattr(self, key)
            if on and got != fits:
                raise ValueError(
                    f"{on} is {self.sparse.share if on == 'sparse.share' else self.sparse.freeze:g}, which works with "
                    f"{key}: {fits} only (got {got}); set train.{key}: {fits}, or train.sparse.share: 1 and "
                    "train.sparse.freeze: 0"
                )
        return self


RECIPE = r"^(int8|qat|bf16|tuned(-int8)?|(prune|distill)-([5-9]|[1-8][0-9]|9[0-5])(-int8|-qat)?)$"
"""Names of recipes; slipway/compression/recipes.py says what they mean."""


class CompressParams(Section):
    """Compression: a small search among recipes, and the gate that a compressed model has to pass."""

    recipes: Annotated[
        tuple[Annotated[str, Field(pattern=RECIPE)], ...],
        Field(strict=False, json_schema_extra={"form": True, "examples": ["int8", "bf16", "qat", "prune-50-qat"]}),
    ] = ("int8", "bf16")
    """What is tried beside FP32: int8 (calibrated), qat (INT8, trained), bf16, prune-30 (channels less, in percent),
    distill-30 (pruned, taught by the full model), prune-50-qat, distill-50-int8 and so on; tuned (FP32, trained on as
    long), tuned-int8; none: FP32 is served."""
    engine: Literal["auto", "all", "onnxruntime", "openvino", "cuda", "tensorrt", "npu", "inductor"] = "auto"
    """What runs the model: auto: the fastest of those that are here and load ONNX, by measurement; all: inductor
    (torch.compile, FP32 only) beside them, which compiles for half a minute; or one by its name."""
    max_drop: Share = 0.02
    """Largest loss of the workload's metric on validation data, relative (0..1): overall a smaller one must be shown,
    and no slice may be shown to lose more."""
    confidence: Annotated[float, Field(ge=0.5, lt=1)] = 0.95
    """How sure the gate has to be (0.5..1, 1 excluded)."""
    min_overlap: Share = 0.9
    """Least share of FP32's ten best answers that must be among the ten best (0..1); of workloads that rank alone."""
    min_speedup: Positive = 1.05
    """Least ratio of the latency of FP32, in its fastest engine, to that of a compressed model, one thread (over 0)."""
    calibration_samples: Count = 512
    """Training samples that INT8 ranges are read from (1 or more)."""
    finetune_epochs: Count = 3
    """Passes over the training data that tuned, qat and each step of prune and distill train for (1 or more)."""
    finetune_rate: Positive = 0.1
    """Peak learning rate of such a pass, as a share of train.learning_rate (over 0)."""


class EvaluateParams(Section):
    """Gates that a candidate has to pass before it is registered."""

    max_users: Annotated[int, Field(ge=0)] = 0
    """Test samples that are scored, drawn at random (0: all)."""
    min_metric: Share = 0.01
    """Least value of the workload's metric on test data (0..1)."""
    max_champion_drop: Share = 0.05
    """Largest loss of the metric against the present champion on the same data, relative (0..1)."""
    max_latency_ms: Positive = 50.0
    """Largest P99 of a single prediction in the engine, one thread (ms)."""


class RegisterParams(Section):
    """What a registered version carries."""

    replay_samples: Annotated[int, Field(ge=10, le=100_000)] = 2000
    """Held-out samples that travel with a version and are replayed when it is a canary (10..100000)."""


class SloParams(Section):
    """The service level that users were promised."""

    p99_ms: Annotated[Positive, turn()] = 100.0
    """Largest P99 latency at the gateway (ms, over 0)."""
    max_error_ratio: Annotated[Share, turn()] = 0.001
    """Largest share of failed requests (0..1)."""


class CacheParams(Section):
    """Answers kept for equal requests: in a replica's memory, in Redis, and on nodes that all replicas share."""

    memory_mb: Annotated[int, Field(ge=0, le=65_536)] = 0
    """Memory of one replica for them (MB, 0..65536; 0: no cache).

    Off unless wanted: a release is judged by what its engine does, and traffic that repeats would hide that; and
    where little repeats, each miss costs some 50 µs for nothing. 32 is plenty for 10,000 answers."""
    ttl_s: Annotated[float, Field(ge=1, le=86_400)] = 300.0
    """An answer is given again for about that long (s, 1..86400)."""
    stale_s: Annotated[float, Field(ge=0, le=86_400)] = 60.0
    """For so long after it an old answer is given where the engine has none (s, 0..86400)."""
    nodes: Annotated[int, Field(ge=0, le=16)] = 2
    """Redis servers that share the third level, if there is a cache (0..16)."""


class ServeParams(Section):
    """The model server: one replica is one process."""

    max_batch: Annotated[int, Field(ge=1, le=1024)] = 32
    """Most requests that share one run of the engine (1..1024)."""
    max_wait_ms: Annotated[float, Field(ge=0, le=1000)] = 0.0
    """Longest wait of an idle engine for a batch that is worth its run, as arrivals and runs are measured (ms, 0..1000;
    0: work-conserving)."""
    deadline_ms: Annotated[float, Field(ge=0, le=600_000)] = 2000.0
    """A realtime request that cannot be answered in that time gets 429 or 504 (ms, 0: none).

    429 and Retry-After at once where the queue tells that it would be late, 504 where it turned out late.

    The gateway waits as long for a request's last try; the header X-Deadline-Ms may lower it."""
    max_queue: Count = 512
    """Requests that may wait; one more gets 429 (1 or more)."""
    max_body_bytes: Annotated[int, Field(ge=1024)] = 1_048_576
    """Largest request body; a larger one gets 413 (bytes, 1024 or more)."""
    threads: Count = 1
    """Threads of the engine in one replica (1 or more)."""
    engine: Literal["auto", "onnxruntime", "openvino", "cuda", "tensorrt", "npu", "inductor"] = "auto"
    """What runs the model: an engine, or auto: the one that was the fastest for it when it was sealed; inductor, whose
    model is code, only if it stands here."""
    drain_s: Positive = 10.0
    """Longest time that a stopping replica finishes its requests (s, over 0)."""
    cache: CacheParams = CacheParams()
    """Answers kept for equal requests."""
    history_events: Annotated[int, Field(ge=1, le=10_000)] = 500
    """Newest events that are kept of a user; older ones may be recommended again (1..10000)."""
    rotate_s: Annotated[float, Field(ge=1, le=86_400)] = 300.0
    """Age at which a journal of events joins the log's Parquet files (s, 1..86400)."""


class GatewayParams(Section):
    """What the one door of the service grants a client: the name of its token, else its address."""

    rate_rps: Annotated[int, Field(ge=0)] = 0
    """Requests a second of one client; one more gets 429 (requests/s, 0: no limit)."""
    burst: Annotated[int, Field(ge=0)] = 100
    """Requests that a client may be ahead of its rate (0 or more)."""
    concurrency: Annotated[int, Field(ge=0, le=65_535)] = 0
    """Requests of one client under way at once; one more gets 429 (0: no limit)."""
    read_s: Annotated[float, Field(ge=0.1, le=600)] = 10.0
    """Longest time for a request's head, and between two pieces of its body or of its answer (s, 0.1..600)."""
    tls_certificate: str | None = None
    """Path of a certificate chain, PEM; empty: plain HTTP."""
    tls_key: str | None = None
    """Path of its private key, PEM."""

    @model_validator(mode="after")
    def _whole_pair(self) -> GatewayParams:
        if (self.tls_certificate is None) != (self.tls_key is None):
            raise ValueError("tls_certificate and tls_key go together")
        return self


class DeployParams(Section):
    """How a version comes up."""

    replicas: Annotated[int, Field(ge=1, le=64), turn()] = 2
    """Replicas of a version (1..64)."""
    ready_timeout_s: Positive = 60.0
    """Longest wait for all replicas to be ready (s, over 0)."""
    autoscaling: str | None = "infra/kubernetes/hpa.yaml"
    """HorizontalPodAutoscaler that the champion's replicas follow (path, from the checkout); empty: none follow any.

    Pools have numbers of their own: with `pools.kinds` nothing follows it, but of two pools for realtime requests the
    one that is not needed sleeps; if empty, both stay awake."""


class PoolParams(Section):
    """Replicas of one kind. What is left empty is as `serve` and `deploy` have it."""

    name: Annotated[str, Field(pattern=r"^[a-z][a-z0-9_-]{0,31}$")]
    """What it is called in metrics, such as cpu or gpu."""
    requests: Literal["realtime", "batch"] = "realtime"
    """The class of requests that it serves; batch replicas take only processor time that nobody else wants."""
    replicas: Annotated[int, Field(ge=1, le=64)] | None = None
    """Replicas of a version in this pool (1..64)."""
    engine: Literal["auto", "onnxruntime", "openvino", "cuda", "tensorrt", "npu", "inductor"] | None = None
    """As serve.engine."""
    threads: Count | None = None
    """As serve.threads."""
    max_batch: Annotated[int, Field(ge=1, le=1024)] | None = None
    """As serve.max_batch."""
    devices: str | None = None
    """NVIDIA devices that its replicas see, as CUDA_VISIBLE_DEVICES has them."""
    price_per_hour: Annotated[float, Field(ge=0)] = 0.0
    """Price of a replica for an hour, in any currency (0 or more)."""


class PoolsParams(Section):
    """Where which requests go; without kinds all replicas are one pool, which serves all."""

    kinds: Annotated[tuple[PoolParams, ...], Field(strict=False)] = ()
    """At most two pools for realtime requests, that of low rates first, and one for batch requests."""
    low_rps: Positive = 100.0
    """Rate of realtime requests under which the first pool serves them again (requests/s, under high_rps)."""
    high_rps: Positive = 500.0
    """Rate from which on the second pool serves them (requests/s)."""
    dwell_s: Positive = 60.0
    """Time that the rate has to be under low_rps before they go back (s, over 0)."""
    batch_in_flight: Annotated[int, Field(ge=2, le=4096)] = 2
    """Batch requests at the replicas at once; more wait at the gateway, 10 s at most (2..4096).

    More of them fill larger batches, and cost users latency."""

    @model_validator(mode="after")
    def _few(self) -> PoolsParams:
        classes = [kind.requests for kind in self.kinds]
        if len({kind.name for kind in self.kinds}) < len(classes):
            raise ValueError("kinds need names of their own")
        if classes.count("realtime") > 2 or classes.count("batch") > 1 or (classes and "realtime" not in classes):
            raise ValueError("kinds: one or two for realtime requests, and at most one for batch requests")
        if self.low_rps >= self.high_rps:
            raise ValueError("low_rps must be under high_rps")
        return self


class CanaryParams(Section):
    """How a candidate gains traffic, and what stops it."""

    step_weights: Annotated[tuple[Share, ...], Field(min_length=1, strict=False), turn()] = (0.05, 0.25, 0.5)
    """Share of users on the canary in each step (rising, 0..1)."""
    interval_s: Positive = 10.0
    """Length of one step (s, over 0); a step without enough requests is held."""
    max_holds: Annotated[int, Field(ge=0)] = 6
    """Times that a step may be held for want of requests before the canary is rolled back (0 or more)."""
    min_requests: Count = 50
    """Requests on the canary below which a step is not judged (1 or more)."""
    replay_rate_rps: Annotated[float, Field(ge=0, le=10_000)] = 50.0
    """Rate at which held-out samples are replayed as live traffic (requests/s, 0: none)."""
    max_p99_ratio: Annotated[float, Field(ge=1)] = 2.0
    """Largest P99 of the canary over the champion's, once over a tenth of the SLO (1 or more)."""
    max_metric_drop: Share = 0.2
    """Largest relative loss of the online metric against the champion (0..1), beyond chance (95 %)."""

    @model_validator(mode="after")
    def _rising(self) -> CanaryParams:
        if list(self.step_weights) != sorted(set(self.step_weights)) or self.step_weights[0] <= 0:
            raise ValueError("step_weights must rise from above 0, each larger than the one before")
        return self


class ChaosParams(Section):
    """What users may notice of an injected fault."""

    rate_rps: Annotated[float, Field(gt=0, le=10_000)] = 50.0
    """Rate of the traffic under which faults are injected (requests/s, over 0)."""
    duration_s: Positive = 8.0
    """Length of one experiment (s, over 0)."""
    max_failed_ratio: Share = 0.001
    """Largest share of failed requests during a fault (0..1)."""
    max_p99_ms: Positive = 500.0
    """Largest P99 during a fault (ms, over 0)."""
    max_recovery_s: Positive = 15.0
    """Longest time until all replicas are ready again (s, over 0)."""


class PromoteParams(Section):
    """What happens to the version that a promotion replaces."""

    warm_s: Annotated[float, Field(ge=0, le=86_400)] = 30.0
    """Time that the replaced version's replicas stay warm for a rollback (s, 0..86400)."""


class StackParams(Section):
    """Ports of the local stack, all on 127.0.0.1."""

    gateway_port: Port = 18080
    """nginx: the service."""
    airflow_port: Port = 18081
    """Airflow: web UI and REST."""
    mlflow_port: Port = 18082
    """MLflow: runs and registry."""
    prometheus_port: Port = 18083
    """Prometheus."""
    alertmanager_port: Port = 18084
    """Alertmanager."""
    metrics_port: Port = 18085
    """nginx: the gateway's numbers, for Prometheus."""
    page_port: Port = 18086
    """The live page of the service."""
    autoscaler_port: Port = 18087
    """The autoscaler: Alertmanager's webhook, and its numbers."""
    replica_port: Port = 18100
    """First port of the replicas; the following ones are taken in turn."""

    @model_validator(mode="after")
    def _distinct(self) -> StackParams:
        ports = list(self.model_dump().values())
        if len(set(ports)) != len(ports):
            raise ValueError("every port must be given once only")
        return self


class Params(Section):
    """The whole of `params.yaml`."""

    workload: Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$"), turn()] = "ranker"
    """What is trained and served: a folder of slipway/workloads."""
    platform: Literal["local"] = "local"
    """Where the service runs."""
    ingest: IngestParams = IngestParams()
    """Stage `ingest`."""
    validate_: ValidateParams = Field(ValidateParams(), alias="validate")
    """Stage `validate`."""
    train: TrainParams = TrainParams()
    """Stage `train`."""
    compress: CompressParams = CompressParams()
    """Stage `compress`."""
    evaluate: EvaluateParams = EvaluateParams()
    """Stage `evaluate`."""
    register_: RegisterParams = Field(RegisterParams(), alias="register")
    """Stage `register`."""
    slo: SloParams = SloParams()
    """The promise that canary and chaos hold a version to."""
    serve: ServeParams = ServeParams()
    """The model server."""
    gateway: GatewayParams = GatewayParams()
    """What the gateway grants a client."""
    deploy: DeployParams = DeployParams()
    """Step `deploy`."""
    pools: PoolsParams = PoolsParams()
    """Pools of replicas, and which requests go to which."""
    canary: CanaryParams = CanaryParams()
    """Step `canary`."""
    chaos: ChaosParams = ChaosParams()
    """Step `chaos`."""
    promote: PromoteParams = PromoteParams()
    """Step `promote`."""
    stack: StackParams = StackParams()
    """The local stack."""
    model: Section = Field(Section(), exclude=True)
    """The section of the chosen workload; in the file it bears the workload's name."""

    @property
    def scales(self) -> bool:
        """Whether the champion's replicas follow a policy; pools have numbers of their own."""
        return self.deploy.autoscaling is not None and not self.pools.kinds

    @property
    def pools_sleep(self) -> bool:
        """Whether of two pools for realtime requests the one that is not needed sleeps."""
        realtime = [kind for kind in self.pools.kinds if kind.requests == "realtime"]
        return self.deploy.autoscaling is not None and len(realtime) == 2

    @property
    def autoscales(self) -> bool:
        """Whether an autoscaler runs."""
        return self.scales or self.pools_sleep
