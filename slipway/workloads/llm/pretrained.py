"""The trained llm in the Hugging Face layout, for transformers and as a start of another training (`llm.weights`).

    python -m slipway.workloads.llm.pretrained FOLDER      from models/trained and data/ingest

Writes config.json, generation_config.json, model*.safetensors, tokenizer.json and tokenizer_config.json into FOLDER.
"""

from __future__ import annotations

import argparse
import sys
import zipfile
from pathlib import Path

import numpy as np
import torch
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

from slipway import artifacts
from slipway.errors import ModelError, SlipwayError
from slipway.workloads.llm import corpus
from slipway.workloads.llm.tokenizer import TOKENIZER


def write(trained: Path, data: Path, out: Path) -> None:
    """Write the model of `trained`, with the tokenizer of `data`, into the folder `out`, whole or not at all.

    Raises:
        ModelError: the trained model is missing, torn, or another workload's.
    """
    about, held = artifacts.read_json(trained / "model.json"), corpus.load(data)
    if "config" not in about:
        raise ModelError(
            f"{trained}: no model of the workload llm; set `workload: llm` and run `python -m tasks.train`"
        )
    model = DeepseekV3ForCausalLM(DeepseekV3Config.from_dict(about["config"]))
    try:
        with np.load(trained / "weights.npz", allow_pickle=False) as stored:
            model.load_state_dict({name: torch.from_numpy(stored[name]) for name in stored.files})
    except (OSError, ValueError, RuntimeError, zipfile.BadZipFile) as error:
        raise ModelError(f"{trained}/weights.npz: torn or no model ({error}); run `python -m tasks.train`") from error
    tokens = held.tokenizer()
    with artifacts.writing(out) as beside:
        model.save_pretrained(beside)
        tokens.save(beside / TOKENIZER)
        end = tokens.tokenizer.id_to_token(tokens.end)
        known = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": end}
        artifacts.write_json(beside / "tokenizer_config.json", known)


def main() -> int:
    """Write the model of this workspace."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder that is made, or replaced")
    options = parser.parse_args()
    try:
        write(Path("models/trained"), Path("data/ingest"), options.folder)
    except SlipwayError as error:
        print(f"pretrained: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
