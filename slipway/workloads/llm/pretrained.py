"""The trained llm in the Hugging Face layout, for transformers and as a start of another training (`llm.weights`).

    python -m slipway.workloads.llm.pretrained FOLDER      from models/trained and data/ingest

Writes config.json, generation_config.json, model*.safetensors, tokenizer.json and tokenizer_config.json into FOLDER.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

from slipway import artifacts, trained
from slipway.errors import SlipwayError
from slipway.workloads.llm import corpus
from slipway.workloads.llm.tokenizer import TOKENIZER


def write(folder: Path, data: Path, out: Path) -> None:
    """Write what `train` left in `folder`, with the tokenizer of `data`, into the folder `out`, whole or not at all.

    Raises:
        ModelError: the trained model is missing, torn, or another workload's.
    """
    weights, about = trained.read(folder, "llm")
    held = corpus.load(data)
    model = DeepseekV3ForCausalLM(DeepseekV3Config.from_dict(about["config"]))
    model.load_state_dict({name: torch.from_numpy(value) for name, value in weights.items()})
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
