"""From a conversation to tokens, and which of them are answers: by a chat template, or else by Alpaca's prompt.

The content of a conversation is text, whatever it looks like: `</s>` in an answer is four characters. Only the markup
of the template itself becomes control tokens.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from tasks.data.rows import RowError
from tasks.data.tally import Errors, Tally
from tasks.instruct.formats import ASSISTANT, SYSTEM, TOOL, USER, Conversation, Message
from tasks.instruct.templates import Part, Template
from tasks.models.tokenization import beginning, tokenize_parts

# Taori et al., 2023, stanford_alpaca/train.py
PREAMBLE = "Below is an instruction that describes a task. "
PREAMBLE_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
)
REQUEST = "Write a response that appropriately completes the request."

Encoded = tuple[np.ndarray, np.ndarray]  # tokens (n,) int32, which are answers (n,) bool


def alpaca(conversation: Conversation) -> list[Part]:
    """Alpaca's prompt; later turns, a system message and tools, which it doesn't have, follow in the same style."""
    found: list[Part] = []
    prompt, context = "", conversation.context
    if conversation.messages[0].role != SYSTEM:
        prompt = (PREAMBLE_WITH_INPUT if context else PREAMBLE) + REQUEST
    for role, content, learned in conversation.messages:
        if role == ASSISTANT:
            found += [(f"{prompt}\n\n### Response:", False), (content, learned)]
            prompt = ""
        elif role == SYSTEM:
            prompt += content
        elif role == TOOL:
            prompt += f"\n\n### Observation:\n{content}"
        else:
            prompt += f"\n\n### Instruction:\n{content}" + (f"\n\n### Input:\n{context}" if context else "")
            context = ""
    return found


def with_context(conversation: Conversation) -> list[Message]:
    """The turns, with Alpaca's input as part of the user's first."""
    messages = list(conversation.messages)
    if conversation.context:
        first = next(number for number, one in enumerate(messages) if one.role == USER)
        messages[first] = Message(USER, f"{messages[first].content}\n\n{conversation.context}")
    return messages


def encode(conversations: Sequence[Conversation], tokenizer: Any, tally: Tally) -> list[Encoded | None]:
    """The tokens of each conversation, and which of them are answers; None for one that the chat template refuses.

    Prompts and answers are tokenised separately, as when an answer is generated, but no space is put between them that
    isn't there. Without a chat template to do so, an answer ends with the end-of-text token, and a text begins with the
    token with which the model's texts begin.

    Raises:
        ValueError: the chat template refuses more than half of the conversations.
    """
    if not tokenizer.chat_template:
        return _plain([alpaca(one) for one in conversations], tokenizer)
    template, errors = Template(tokenizer), Errors()
    found: list[list[Part] | None] = []
    for one in conversations:
        try:
            found.append(template.parts(with_context(one), one.where, tally))
        except RowError as error:
            errors.add(error)
            tally.leave_out(error)
            found.append(None)
    errors.check("the data", len(conversations), "conversation")
    tokens = iter(template.tokens([parts or [] for parts in found]))
    return [
        _joined([], [(next(tokens), is_answer) for _, is_answer in parts], []) if parts else None for parts in found
    ]


def _plain(split: Sequence[Sequence[Part]], tokenizer: Any) -> list[Encoded | None]:
    texts = [text for parts in split for text, _ in parts]
    continued = [place > 0 for parts in split for place in range(len(parts))]
    tokens = iter(tokenize_parts(tokenizer, texts, continued, split_special_tokens=True))  # nothing is markup
    begin, end = beginning(tokenizer), [tokenizer.eos_token_id]
    return [_joined(begin, [(next(tokens), is_answer) for _, is_answer in parts], end) for parts in split]


def _joined(begin: list[int], tokens: Iterable[tuple[list[int], bool]], end: list[int]) -> Encoded:
    ids, answers = list(begin), [False] * len(begin)
    for part, is_answer in tokens:
        whole = [*part, *end] if is_answer else part
        ids += whole
        answers += [is_answer] * len(whole)
    answers[0] = False  # nothing before it to predict it from
    return np.array(ids, dtype=np.int32), np.array(answers)
