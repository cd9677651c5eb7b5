"""How texts are cut into tokens: byte-level BPE, trained on the corpus or given; the replica needs no more than this.

Source: Sennrich et al. 2016, arXiv:1508.07909 (BPE); Radford et al. 2019 (on bytes, so that no text is unknown).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers

from slipway.errors import DataError

TOKENIZER = "tokenizer.json"
END = "<|end|>"
ENDS = (END, "<|endoftext|>", "<\uff5cend\u2581of\u2581sentence\uff5c>", "<|end_of_text|>", "</s>", "<eos>")
"""What the end of a text is called; the first that a tokenizer knows counts. The third is DeepSeek's."""


@dataclass(frozen=True)
class Tokens:
    """A tokenizer and its end token."""

    tokenizer: Any
    end: int
    """Id of the token that ends a document."""

    @classmethod
    def load(cls, path: Path) -> Tokens:
        """Read a tokenizer.json.

        Raises:
            DataError: it is missing, torn, or knows no end of a text; names the file.
        """
        if not path.is_file():
            raise DataError(f"{path}: no such file; give the path of a tokenizer.json")
        try:
            made = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library's errors have no base but this
            raise DataError(f"{path}: no tokenizer that can be read ({error})") from error
        made.no_padding()
        made.no_truncation()
        ends = [number for number in map(made.token_to_id, ENDS) if number is not None]
        if not ends:
            raise DataError(f"{path}: has no token for the end of a text; known are {', '.join(ENDS)}")
        return cls(made, ends[0])

    @classmethod
    def train(cls, texts: Iterator[str], vocabulary: int) -> Tokens:
        """Train a byte-level BPE of at most `vocabulary` tokens; a small corpus gives fewer."""
        made = tokenizers.Tokenizer(tokenizers.models.BPE())
        made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        made.decoder = tokenizers.decoders.ByteLevel()
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=vocabulary,
            special_tokens=[END],
            initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        made.train_from_iterator(texts, trainer)
        end: Any = made.token_to_id(END)
        return cls(made, end)

    @property
    def vocabulary(self) -> int:
        """Number of tokens."""
        return int(self.tokenizer.get_vocab_size())

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, without an end token."""
        return [found.ids for found in self.tokenizer.encode_batch(list(texts), add_special_tokens=False)]

    def text(self, ids: Sequence[int]) -> str:
        """The text of ids; a character that is cut off becomes U+FFFD."""
        made: str = self.tokenizer.decode(list(ids), skip_special_tokens=False)
        return made

    def save(self, path: Path) -> None:
        """Write tokenizer.json."""
        self.tokenizer.save(str(path))
