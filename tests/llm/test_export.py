"""Laws of the llm's export: it answers as torch does, whatever the padding, and INT8 answers nearly so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from slipway.compression import engine
from slipway.workloads.llm import scoring
from slipway.workloads.llm.export import Export, replay
from slipway.workloads.llm.graph import LlmGraph
from slipway.workloads.llm.model import LanguageModel, configure, describe, make
from slipway.workloads.llm.schema import padded
from tests.llm import data
from tests.llm.test_training import TINY

VOCABULARY = 80
SIZES = TINY.model_copy(update={"layers": 3, "context_length": 12})
texts = st.lists(st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=12), min_size=1, max_size=5)


def weights(model: LanguageModel) -> dict[str, Any]:
    return {name: value.detach().numpy() for name, value in model.state_dict().items()}


def model(**turned: Any) -> LanguageModel:
    torch.manual_seed(3)
    made = make(SIZES.model_copy(update=turned), VOCABULARY, 0)
    made.train(False)
    with torch.no_grad():
        for name, value in made.state_dict().items():
            if not name.endswith("norm.weight"):
                value.normal_(std=0.3)
    return made


def about(made: LanguageModel) -> dict[str, Any]:
    return {**describe(made.config), "context_length": SIZES.context_length, "end": 0}


MODEL = model()
FP32 = engine.load(LlmGraph(weights(MODEL), about(MODEL)).build(), "fp32")
NAMES = ["next", "log_probs", "likelihood", "hits"]


def expected(made: LanguageModel, ids: list[int]) -> np.ndarray[Any, Any]:
    """Log-probabilities [T, V] after each token."""
    with torch.no_grad():
        logits = super(LanguageModel, made).forward(input_ids=torch.tensor([ids])).logits[0]
    found: np.ndarray[Any, Any] = logits.log_softmax(-1).numpy()
    return found


def hold(run: engine.Run, made: LanguageModel, batch: list[list[int]]) -> None:
    ids, best, likelihood, hits = run(NAMES, {"tokens": padded(batch)})
    for row, text in enumerate(batch):
        wanted = expected(made, text)
        np.testing.assert_allclose(best[row], np.sort(wanted[-1])[::-1][: best.shape[1]], atol=2e-4)
        np.testing.assert_allclose(wanted[-1][ids[row]], best[row], atol=2e-4)
        own = [wanted[at, token] for at, token in enumerate(text[1:])]
        np.testing.assert_allclose(likelihood[row], own + [0.0] * (likelihood.shape[1] - len(own)), atol=2e-4)
        right = [float(wanted[at].argmax() == token) for at, token in enumerate(text[1:])]
        assert hits[row].tolist() == right + [0.0] * (hits.shape[1] - len(right))


@settings(max_examples=15)
@given(batch=texts)
def test_the_export_answers_as_torch_does_whatever_stands_beside_it_in_the_batch(batch: list[list[int]]) -> None:
    hold(FP32, MODEL, batch)


@pytest.mark.parametrize(
    "turned",
    [
        {"q_lora_rank": None},
        {"dense_layers": 3},
        {"shared_experts": 2, "experts_per_token": 1},
        {"grouped": True, "experts": 8},
        {"rope_interleave": False},
    ],
)
def test_every_form_of_the_architecture_is_exported(turned: dict[str, Any]) -> None:
    grouped, apart = turned.pop("grouped", False), turned.pop("rope_interleave", True)
    made = model(**turned)
    if grouped or not apart:  # as checkpoints from elsewhere have it
        config = configure(SIZES.model_copy(update=turned), VOCABULARY, 0)
        config.rope_interleave = apart
        if grouped:
            config.n_group, config.topk_group, config.routed_scaling_factor = 4, 2, 2.5
        other = LanguageModel(config)
        other.load_state_dict(made.state_dict())
        made = other
        made.train(False)
    run = engine.load(LlmGraph(weights(made), about(made)).build(), "fp32")
    rng = np.random.default_rng(0)
    hold(run, made, [rng.integers(0, VOCABULARY, length).tolist() for length in (12, 5, 1, 12)])


def test_int8_is_smaller_and_likes_the_same_tokens() -> None:
    probe = LlmGraph(weights(MODEL), about(MODEL))
    run = engine.load(probe.build(probe=True), "probe")
    tokens = {"tokens": np.random.default_rng(0).integers(0, VOCABULARY, (64, 12))}
    ranges = engine.ranges(run, [name.removeprefix("range.") for name in probe.graph.probes], [tokens])
    built = LlmGraph(weights(MODEL), about(MODEL), ranges).build()
    # Norms, router, embedding and the graph itself stay; at this size they are a good part of it.
    assert len(built) < 0.7 * len(LlmGraph(weights(MODEL), about(MODEL)).build())
    whole, exact = (run(["likelihood"], tokens)[0] for run in (engine.load(built, "int8"), FP32))
    assert np.corrcoef(whole.ravel(), exact.ravel())[0, 1] > 0.98


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Export:
    """An export of a model that has learnt nothing, beside its data."""
    place = tmp_path_factory.mktemp("export")
    ingested = data.read(data.params(data.folder(place / "texts")), place / "out")
    torch.manual_seed(0)
    made = make(TINY, ingested.vocabulary, ingested.meta["end"])
    return data.export(made, ingested, place / "trained", TINY.context_length)


def test_scores_are_those_of_a_naive_loop_and_of_another_tokenizer_of_the_same_text(
    export: Export, tmp_path: Path
) -> None:
    export.files(tmp_path)
    run = engine.load(export.fp32(), "fp32")
    chosen = scoring.samples(export.data.folder, "test", 0, 0)
    found = scoring.score(run, chosen, tmp_path)
    for sample in (0, len(chosen) - 1):
        ids, logs = chosen.of(sample), []
        for at in range(0, len(ids) - 1, TINY.context_length - 1):
            (likelihood,) = run(["likelihood"], {"tokens": padded([ids[at : at + TINY.context_length]])})
            logs += likelihood[0, :-1].tolist()
        assert len(logs) == len(ids) - 1
        assert found["log_likelihood"][sample] == pytest.approx(np.mean(logs), rel=1e-4)
    perplexity = scoring.figures({"log_likelihood": float(found["log_likelihood"].mean())})["perplexity"]
    assert perplexity == pytest.approx(export.data.vocabulary, rel=0.1)  # it knows nothing
    assert (found["accuracy"] >= 0).all()
    assert (found["accuracy"] <= 1).all()
    assert sum(mask.sum() for mask in scoring.slices(chosen).values()) == 2 * len(chosen)

    text = (tmp_path / "tokenizer.json").read_text()
    (tmp_path / "tokenizer.json").write_text(text + "\n")  # another file, the same tokens: cut anew from the text
    again = scoring.score(run, chosen, tmp_path)
    np.testing.assert_allclose(again["log_likelihood"], found["log_likelihood"], rtol=0.05)
    header, rows = scoring.examples(run, chosen, tmp_path)
    assert {len(row) for row in rows} == {len(header)}


def test_windows_hold_every_held_out_token_once(export: Export) -> None:
    chosen = scoring.samples(export.data.folder, "validation", 0, 0)
    predicted = sum(len(chosen.of(sample)) - 1 for sample in range(len(chosen)))
    assert predicted == len(export.data.parts["validation"].tokens) - 1
    assert len(scoring.samples(export.data.folder, "validation", 3, 0)) == 3


def test_replayed_requests_are_held_out_texts_with_what_came_next(export: Export) -> None:
    held = export.data.parts["test"]
    tokens = export.data.tokenizer()
    whole = [tokens.text(held.of(document).tolist()) for document in range(len(held))]
    made = replay(export.data.folder, 50, 0)
    assert len(made) > 40
    for sample in made:
        assert any(sample["request"]["text"] + sample["truth"] in text for text in whole), sample
