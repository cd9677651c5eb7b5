"""The Hugging Face layout: what is saved is what a training starts from, and what does not fit is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from slipway import artifacts
from slipway.errors import ModelError
from slipway.params import Params, TrainParams
from slipway.training import survey
from slipway.workloads.llm import corpus, pretrained
from slipway.workloads.llm.model import make
from slipway.workloads.llm.params import LlmParams
from slipway.workloads.llm.training import LlmTask
from tests.llm import data
from tests.llm.test_training import TINY

TRAIN = TrainParams(batch_size=8, world_size=1)


@pytest.fixture(scope="module")
def ingested(tmp_path_factory: pytest.TempPathFactory) -> corpus.Corpus:
    place = tmp_path_factory.mktemp("corpus")
    return data.read(data.params(data.folder(place / "texts")), place / "out")


@pytest.fixture(scope="module")
def saved(ingested: corpus.Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("saved")
    torch.manual_seed(5)
    model = make(TINY, ingested.vocabulary, ingested.meta["end"])
    with torch.no_grad():
        model.model.layers[1].mlp.gate.e_score_correction_bias.normal_()
    data.export(model, ingested, place / "trained", TINY.context_length)
    pretrained.write(place / "trained", ingested.folder, place / "folder")
    return place / "folder"


def task(ingested: corpus.Corpus, folder: Path, **turned: Any) -> LlmTask:
    # Sizes of the folder count, so those that are said here may be others.
    return LlmTask(ingested.folder, TRAIN, LlmParams(weights=str(folder), context_length=16, **turned))


def test_a_plan_is_made_of_the_folders_model(ingested: corpus.Corpus, saved: Path) -> None:
    given = Params(workload="llm", train=TRAIN).model_copy(update={"model": task(ingested, saved).params})
    made = make(TINY, ingested.vocabulary, ingested.meta["end"])
    found = survey.survey(given, ingested.folder).model
    assert found.parameters == sum(weight.numel() for weight in made.parameters())


def test_a_training_starts_from_the_folder_with_the_loss_that_was_reached(ingested: corpus.Corpus, saved: Path) -> None:
    torch.manual_seed(5)
    model = make(TINY, ingested.vocabulary, ingested.meta["end"])
    with torch.no_grad():
        model.model.layers[1].mlp.gate.e_score_correction_bias.normal_()
    started = task(ingested, saved)
    again = started.model()
    batch = {name: torch.from_numpy(value) for name, value in started.epoch(0, 1)[0].items()}
    with torch.no_grad():
        assert again(**batch).item() == model(**batch).item()
    about = started.about()["started_from"]
    assert about == {"weights": str(saved), "sha256": artifacts.sha256(saved)}


def test_transformers_reads_the_folder_by_itself(ingested: corpus.Corpus, saved: Path) -> None:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(saved), AutoTokenizer.from_pretrained(saved)
    ids = tokenizer("one two three", return_tensors="pt")["input_ids"]
    assert ids[0].tolist() == ingested.tokenizer().encode(["one two three"])[0]
    assert model(input_ids=ids).logits.shape == (1, ids.shape[1], ingested.vocabulary)


def harmed(saved: Path, place: Path, **config: Any) -> Path:
    place.mkdir()
    for path in saved.iterdir():
        (place / path.name).write_bytes(path.read_bytes())
    raw = json.loads((place / "config.json").read_text())
    (place / "config.json").write_text(json.dumps({**raw, **config}))
    return place


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "llama"}, "model_type is 'llama'; this workload trains 'deepseek_v3'"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantized weights cannot be trained"),
        ({"vocab_size": 20}, "its vocabulary has 20 tokens, the data's .*; set ingest.tokenizer.file"),
        ({"max_position_embeddings": 8}, "takes at most 8 tokens; lower llm.context_length"),
        ({"num_hidden_layers": 3}, "its weights are not those of its config.json"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(
    ingested: corpus.Corpus, saved: Path, tmp_path: Path, config: dict[str, Any], message: str
) -> None:
    with pytest.raises(ModelError, match=message):
        task(ingested, harmed(saved, tmp_path / "folder", **config)).model()


def test_torn_or_missing_weights_and_another_tokenizer_are_refused(
    ingested: corpus.Corpus, saved: Path, tmp_path: Path
) -> None:
    folder = harmed(saved, tmp_path / "folder")
    other = json.loads((folder / "tokenizer.json").read_text())
    other["model"]["merges"] = other["model"]["merges"][:-1]
    (folder / "tokenizer.json").write_text(json.dumps(other))
    with pytest.raises(ModelError, match=r"not the tokenizer of the data; set ingest\.tokenizer\.file"):
        task(ingested, folder).model()
    (folder / "tokenizer.json").unlink()
    (weights,) = folder.glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ModelError, match="its weights cannot be read"):
        task(ingested, folder).model()
    weights.unlink()
    with pytest.raises(ModelError, match=r"holds no \*\.safetensors"):
        task(ingested, folder).model()
