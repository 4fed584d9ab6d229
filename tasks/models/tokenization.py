"""Tokenizers: from a folder, a package or the hub, or trained on the task's own texts."""

import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import transformers
from tokenizers import decoders, pre_tokenizers, processors, trainers

from tasks.models import packaged
from tasks.models.damage import check_settings, is_out_of_memory, reason_of, said_in_a_sentence
from tasks.models.loading import digest, is_folder, on_hub, quiet
from tasks.models.source import Source

# texts are tokenised one at a time; the tokenizers' threads would only cause warnings in forked processes
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

SPECIAL_TOKENS = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")  # RoBERTa's, ids 0..3 as in its own vocabulary
BEFORE = ("\n", ":")  # put before a text to see what it is after another one: a tokenizer may drop one of them
FILES = (  # what most tokenizers are made of
    *("tokenizer.json", "tokenizer_config.json", "vocab.json", "vocab.txt", "merges.txt", "tokenizer.model"),
    *("chat_template.jinja", "special_tokens_map.json", "added_tokens.json"),
    *("spiece.model", "spm.model", "sentencepiece.bpe.model"),
)
OTHERS = (  # those of single architectures, and of newer versions of the libraries: tokenizer.4.0.0.json
    *("*.model", "*.spm", "*.tiktoken", "*.codes", "*.bpe", "*.py", "*.tokenizer", "*/*.jinja"),
    *("tokenizer.*.json", "*vocab*.json", "word_*.json", "byte_maps.json", "emoji.json", "normalizer.json"),
    *("dict.txt", "tekken.json"),
)


def load_tokenizer(name: str, trust_remote_code: bool = False) -> tuple[Any, str]:
    """A tokenizer and its name in a record, which includes the revision.

    Raises:
        ValueError: nothing with that name can be loaded, or it has no vocabulary.
    """
    if name in packaged.PACKAGED:
        path, digest_of_it = packaged.locate(name)
        revision, said = None, f"{name} ({digest_of_it[:23]})"
    elif is_folder(name):
        path, revision, said = name, None, f"{name} (sha256:{digest(Path(name), _files(Path(name)))[:16]})"
    else:
        (path, revision), said = on_hub("tokenizer", name), name
    way_out = "--tokenizer with a folder that has a tokenizer.json, or a hub id"
    with said_in_a_sentence("tokenizer", name, way_out, folder=path if is_folder(path) else None), quiet():
        if is_folder(path):
            check_settings(Path(path), "tokenizer_config.json")
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            path, revision=revision, trust_remote_code=trust_remote_code
        )
    if len(tokenizer) <= len(tokenizer.all_special_tokens):  # transformers makes an empty one if files are missing
        raise ValueError(f"{name!r} has a model but no tokenizer: give {way_out}")
    if tokenizer.pad_token is None:  # causal models come without one
        tokenizer.pad_token = _stand_in(tokenizer)
    return tokenizer, said


def notes(tokenizer: Any) -> list[str]:
    """What a reader of the results must know of a tokenizer."""
    # transformers marks what it warns of, and that is silenced: Mistral's tokenizers of before its version 5
    wrong = getattr(getattr(tokenizer, "backend_tokenizer", None), "fix_mistral_regex", None) is False
    way_out = "give --tokenizer with a folder of it, loaded with fix_mistral_regex=True and saved"
    return [f"the tokenizer splits words by a pattern that its publisher has corrected: {way_out}"] if wrong else []


def unknown(tokenizer: Any, ids: np.ndarray) -> list[str]:
    """A note on what the tokenizer has no token for, if there is any in the texts that became `ids`."""
    token = tokenizer.get_vocab().get(tokenizer.unk_token)  # `unk_token_id` recurses without end where it isn't there
    if token in (None, tokenizer.eos_token_id, tokenizer.bos_token_id):  # GPT-2's, which knows all bytes
        return []
    count = int((ids == token).sum())
    what = f"{tokenizer.unk_token}, which stands for all that the tokenizer doesn't know"
    return [f"{count:,} of {len(ids):,} tokens are {what}"] if count else []


def _files(folder: Path) -> list[str]:
    """All files that a tokenizer may be made of: those of `FILES`, then the less usual ones."""
    others = sorted(str(path.relative_to(folder)) for pattern in OTHERS for path in folder.glob(pattern))
    return list(dict.fromkeys([*FILES, *others]))


def tokenize(tokenizer: Any, texts: Any, others: Any = None, **given: Any) -> Any:
    """What a tokenizer of transformers returns for texts, or pairs of them.

    Raises:
        ValueError: it can't encode one of them: its vocabulary lacks an entry.
    """
    try:
        return tokenizer(texts, others, **given)
    except Exception as error:  # Rust's are of no kind of their own
        if is_out_of_memory(error):
            raise
        raise ValueError(
            f"the tokenizer of {tokenizer.name_or_path[-100:]!r} can't encode all of the texts "
            f"({reason_of(error).rstrip('.')}): give --tokenizer with a whole one"
        ) from error


def beginning(tokenizer: Any) -> list[int]:
    """The token with which the model's texts begin, if its tokenizer puts one there."""
    first: list[int] = tokenize(tokenizer, "")["input_ids"][:1]
    return first if first == [tokenizer.bos_token_id] else []


def tokenize_parts(tokenizer: Any, texts: Sequence[str], continued: Sequence[bool], **given: Any) -> list[list[int]]:
    """The ids of consecutive texts, without control tokens around them.

    Many tokenizers put a space before a text (SentencePiece's do). Where a text is `continued` nobody wrote one: its
    ids are those that it has after other text.

    Raises:
        ValueError: see `tokenize`.
    """

    def ids(some: Sequence[str]) -> list[list[int]]:
        encoded = tokenize(tokenizer, list(some), add_special_tokens=False, verbose=False, **given)
        return encoded["input_ids"]

    found = ids(texts) if texts else []
    for before in BEFORE if any(continued) else ():
        first, letter, both = ids([before, "a", f"{before}a"])
        if both != [*first, *letter]:
            after = iter(ids([f"{before}{text}" for text, goes_on in zip(texts, continued, strict=True) if goes_on]))
            for place, goes_on in enumerate(continued):
                # a token may hold both what was put before and the beginning of the text
                if goes_on and (joined := next(after))[: len(first)] == first:
                    found[place] = joined[len(first) :]
            break
    return found


def _stand_in(tokenizer: Any) -> str:
    """The token to pad with: end-of-text, or another control token; any will do, since a mask covers it."""
    known = (tokenizer.eos_token, tokenizer.sep_token, tokenizer.unk_token, tokenizer.bos_token, tokenizer.cls_token)
    return next((token for token in known if token is not None), None) or tokenizer.convert_ids_to_tokens(0)


def with_ids_of(tokenizer: Any, model: Any) -> Any:
    """The model, with the tokenizer's begin and end of text in its configuration, or generation would never stop.

    A pretrained model's own ids stay if they include the tokenizer's: several ids may end a turn.
    """
    own = {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": tokenizer.bos_token_id}
    for said in filter(None, (model.config, vars(model).get("generation_config"))):
        for name, token in own.items():
            known = vars(said).get(name)
            if token is not None and token not in (known if isinstance(known, list) else [known]):
                setattr(said, name, token)
    return model


def choose_tokenizer(source: Source, name: str | None, train: Callable[[int], Any], published: str) -> tuple[Any, str]:
    """A model's tokenizer and its name in a record: the one named, else the model's own, else a trained one.

    Args:
        source: of the model.
        name: what the user asks for.
        train: trains one with a given number of entries, for a built-in model without a published one.
        published: where to get one, for the message.

    Raises:
        ValueError: the model has none, or it can't be loaded.
    """
    if name is None and not source.from_scratch:
        name = source.own_tokenizer
    if name is not None:
        return load_tokenizer(name, source.trust_remote_code)
    size = source.configuration.own_vocabulary
    if size is None:
        raise ValueError(
            f"{source.name} has no tokenizer of its own: give --tokenizer with a folder or a hub id ({published})"
        )
    tokenizer = train(size)
    return tokenizer, f"byte-level BPE trained on the task's training data, {len(tokenizer)} entries"


def train_tokenizer(texts: Iterable[str], vocabulary_size: int) -> Any:
    """A tokenizer like RoBERTa's, a byte-level BPE trained on texts; the same for the same texts."""
    return _like_roberta(byte_level_bpe(texts, vocabulary_size, SPECIAL_TOKENS, add_prefix_space=True))


def byte_level_bpe(
    texts: Iterable[str], vocabulary_size: int, special_tokens: Sequence[str], *, add_prefix_space: bool
) -> tokenizers.Tokenizer:
    """A byte-level BPE trained on texts; the special tokens have the first ids."""
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        min_frequency=2,
        special_tokens=list(special_tokens),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return bpe


def _like_roberta(bpe: tokenizers.Tokenizer) -> Any:
    begin, pad, end, unknown, mask = SPECIAL_TOKENS
    bpe.post_processor = processors.RobertaProcessing((end, 2), (begin, 0), trim_offsets=True, add_prefix_space=True)
    names = {"bos_token": begin, "cls_token": begin, "eos_token": end, "sep_token": end, "pad_token": pad}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, unk_token=unknown, mask_token=mask, **names)
