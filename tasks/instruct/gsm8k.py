"""GSM8K's score (Cobbe et al., 2021, arXiv 2110.14168): is the last number in a generated answer right?"""

import math
import re
from collections.abc import Sequence
from typing import Any

import torch
import transformers
from torch import nn

from tasks.instruct.templates import all_ends
from tasks.models.loading import quiet
from tasks.models.source import longest_sequence

MARK = "####"  # precedes the final number in the data set's own answers
NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?|-?\.\d+")
GENERATION_TOKENS = 8192  # per batch, prompts and answers
PADDING, TRIED = 8, 2  # tokens put before and made in a trial
SEEN = 0.25  # of the logits' spread, more than 16 bits round


def final_number(text: str) -> str | None:
    """The number after the last `####`, else the last number; "1,000.0" is "1000". None if there is none."""
    marked = NUMBER.findall(text.rpartition(MARK)[2]) if MARK in text else []
    found = marked[:1] or NUMBER.findall(text)[-1:]
    if not found:
        return None
    number = found[0].replace(",", "")
    return number.rstrip("0").rstrip(".") if "." in number else number


def exact_match(predictions: Sequence[str], references: Sequence[str]) -> float:
    """Share of the predictions whose final number is the reference's."""
    pairs = zip(predictions, references, strict=True)
    right = [final_number(one) is not None and final_number(one) == final_number(other) for one, other in pairs]
    return sum(right) / len(right)


@torch.no_grad()
def generate(model: nn.Module, tokenizer: Any, prompts: Sequence[Sequence[int]], new_tokens: int) -> list[str]:
    """What a model of transformers generates after each prompt, greedily, up to the end of its turn or `new_tokens`.

    The end is an end of text, the tokenizer's or the model's, or the token with which the chat template ends an answer;
    or that of the model's positions. In batches of prompts of similar length, padded on the left, with a key-value
    cache; one by one if the model mixes them, or where they leave fewer positions.
    """
    written: dict[int, str] = {}
    order = sorted(range(len(prompts)), key=lambda number: len(prompts[number]))
    positions = longest_sequence(model) or math.inf
    tries = len(order) > 1 and len(prompts[order[0]]) + PADDING + TRIED <= positions
    tokens = 0 if tries and _mixes(model, tokenizer, prompts[order[0]]) else GENERATION_TOKENS
    while order:
        longest = len(prompts[order[-1]])
        room = int(min(new_tokens, positions - longest))
        count = 1 if room < new_tokens else max(1, tokens // (longest + new_tokens))
        some = [order.pop() for _ in range(min(len(order), count))]
        out = _generate(model, tokenizer, [prompts[number] for number in some], room).sequences[:, longest:]
        written |= dict(zip(some, tokenizer.batch_decode(out, skip_special_tokens=True), strict=True))
    return [written[number] for number in range(len(prompts))]


def _mixes(model: Any, tokenizer: Any, prompt: Sequence[int]) -> bool:
    """Does a model answer a prompt otherwise beside a longer one? RWKV does: it knows no mask, and mixes its states."""
    beside = [*prompt, *prompt[:PADDING]]
    alone = _generate(model, tokenizer, [prompt], TRIED, output_logits=True).logits
    batched = _generate(model, tokenizer, [beside, prompt], TRIED, output_logits=True).logits
    pairs = [(ours[0].float(), theirs[1].float()) for ours, theirs in zip(alone, batched, strict=False)]
    return any(bool((ours - theirs).abs().max() > SEEN * ours.std()) for ours, theirs in pairs)


def _generate(model: Any, tokenizer: Any, prompts: Sequence[Sequence[int]], new_tokens: int, **options: bool) -> Any:
    """What transformers returns: sequences (prompts, longest prompt + new tokens), padded on the left, and more."""
    length = max(map(len, prompts))
    device, pad = next(model.parameters()).device, tokenizer.pad_token_id
    ids = torch.tensor([[pad] * (length - len(prompt)) + list(prompt) for prompt in prompts], device=device)
    mask = torch.tensor([[0] * (length - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
    # a published model's own configuration may penalise what was said before: 1.1 for a Qwen 2.5
    own, model.generation_config = model.generation_config, transformers.GenerationConfig()
    try:
        with quiet():
            return model.generate(
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=new_tokens,
                do_sample=False,
                num_beams=1,
                use_cache=True,
                eos_token_id=all_ends(tokenizer, own),
                pad_token_id=pad,
                return_dict_in_generate=True,
                **options,
            )
    finally:
        model.generation_config = own
