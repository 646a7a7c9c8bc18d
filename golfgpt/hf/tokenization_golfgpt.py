"""A golfgpt tokenizer for transformers."""

from __future__ import annotations

import os
import shutil
from typing import Any

from sentencepiece import SentencePieceProcessor
from transformers import PreTrainedTokenizer

from golfgpt.data.tokenizer import Tokenizer


class GolfGPTTokenizer(PreTrainedTokenizer):
    """golfgpt's tokenizer with the interface of transformers: the same ids and the same text. The literal "<s>" in a
    text is text. With add_special_tokens, the default, BOS is put first, as before every document in training. BOS is
    also EOS, because that of the next document ends one."""

    vocab_files_names = {"vocab_file": "tokenizer.model"}  # noqa: RUF012
    model_input_names = ["input_ids", "attention_mask"]  # noqa: RUF012

    def __init__(self, vocab_file: str, **kwargs: Any):
        self.vocab_file = vocab_file
        self.golf = Tokenizer.from_file(vocab_file)
        self.sentencepiece = SentencePieceProcessor(model_proto=self.golf.model_bytes)
        bos = self.sentencepiece.id_to_piece(self.golf.bos_id)
        pad = bos if self.golf.pad_id < 0 else self.sentencepiece.id_to_piece(self.golf.pad_id)
        defaults = {"bos_token": bos, "eos_token": bos, "pad_token": pad, "special_tokens_pattern": "bos"}
        super().__init__(**defaults | {"split_special_tokens": True, "padding_side": "right"} | kwargs)

    @property
    def vocab_size(self) -> int:
        return self.golf.vocab_size

    def get_vocab(self) -> dict[str, int]:
        return {self.sentencepiece.id_to_piece(i): i for i in range(self.golf.vocab_size)}

    def _tokenize(self, text: str, **kwargs: Any) -> list[str]:
        return [self.sentencepiece.id_to_piece(i) for i in self.golf.encode(text)]

    def _convert_token_to_id(self, token: str) -> int:
        return self.sentencepiece.piece_to_id(token)

    def _convert_id_to_token(self, index: int) -> str:
        return self.sentencepiece.id_to_piece(index)

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """Their text. Special tokens have none."""
        return self.golf.decode([self.sentencepiece.piece_to_id(token) for token in tokens])

    def _decode(self, token_ids: int | list[int], skip_special_tokens: bool = False, **kwargs: Any) -> str:
        """The text of ids; without `skip_special_tokens`, BOS is shown."""
        ids = [token_ids] if isinstance(token_ids, int) else [int(i) for i in token_ids]
        if skip_special_tokens:
            return self.golf.decode(ids)
        out, start = [], 0
        for i in [*(i for i, token in enumerate(ids) if token == self.golf.bos_id), len(ids)]:
            out += self.golf.decode(ids[start:i]), self.bos_token if i < len(ids) else ""
            start = i + 1
        return "".join(out)

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str]:
        file = os.path.join(
            save_directory, f"{filename_prefix}-tokenizer.model" if filename_prefix else "tokenizer.model"
        )
        if os.path.abspath(file) != os.path.abspath(self.vocab_file):
            shutil.copyfile(self.vocab_file, file)
        return (file,)
