"""A tokenizer of letters that fits the tiny architectures, and folders of them with it."""

import json
from pathlib import Path
from typing import Any

import tokenizers
import transformers
from architectures import VOCABULARY
from tokenizers import pre_tokenizers, processors

LETTERS = "abcdefghijklmnopqrstuvwxyz ?."
SPECIAL = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}  # ids 0 to 3


def letters(*, without: tuple[str, ...] = (), ends: bool = False) -> Any:
    """A token is a letter. `without` some of `SPECIAL`; `ends`: a text ends with </s>, a pair has one after each."""
    words = {word: number for number, word in enumerate([*SPECIAL.values(), *LETTERS])}
    assert len(words) <= VOCABULARY
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    if ends:
        backend.post_processor = processors.TemplateProcessing(
            single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 2)]
        )
    named = {name: token for name, token in SPECIAL.items() if name not in without}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **named)


def folder(path: Path, model: Any, tokenizer: Any, **config: Any) -> str:
    """A saved model with its tokenizer, values of its configuration replaced."""
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    values = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**values, **config}))
    return str(path)


def labelled(path: Path, texts: list[str]) -> str:
    """A file of texts with two classes in turn."""
    rows = [{"text": text, "label": number % 2} for number, text in enumerate(texts)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)
