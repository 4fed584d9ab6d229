"""From a conversation to tokens, and which of them are answers: by a chat template, or else by Alpaca's prompt."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from tasks.instruct.conversations import ASSISTANT, Conversation, Message

# Taori et al., 2023, stanford_alpaca/train.py
PREAMBLE = "Below is an instruction that describes a task. "
PREAMBLE_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
)
REQUEST = "Write a response that appropriately completes the request."

Part = tuple[str, bool]  # text, is it an answer?


def parts(conversation: Conversation, tokenizer: Any) -> list[Part]:
    """The texts of a conversation one after the other, by the chat template if the tokenizer has one.

    Raises:
        ValueError: the tokenizer's chat template can't do it.
    """
    return _templated(conversation, tokenizer) if tokenizer.chat_template else alpaca(conversation)


def alpaca(conversation: Conversation) -> list[Part]:
    """Alpaca's prompt; later turns and a system message, which it hasn't got, go on in its manner."""
    found: list[Part] = []
    prompt, context = "", conversation.context
    if conversation.messages[0].role != "system":
        prompt = (PREAMBLE_WITH_INPUT if context else PREAMBLE) + REQUEST
    for role, content in conversation.messages:
        if role == ASSISTANT:
            found += [(f"{prompt}\n\n### Response:", False), (content, True)]
            prompt = ""
        elif role == "system":
            prompt += content
        else:
            prompt += f"\n\n### Instruction:\n{content}" + (f"\n\n### Input:\n{context}" if context else "")
            context = ""
    return found


def _templated(conversation: Conversation, tokenizer: Any) -> list[Part]:
    messages = [{"role": role, "content": content} for role, content in _with_context(conversation)]
    found: list[Part] = []
    done = ""
    for number, message in enumerate(messages):
        if message["role"] == ASSISTANT:
            prompt = _render(tokenizer, messages[:number], add_generation_prompt=True)
            whole = _render(tokenizer, messages[: number + 1], add_generation_prompt=False)
            if not (prompt.startswith(done) and whole.startswith(prompt)):
                raise ValueError(
                    f"the chat template of {tokenizer.name_or_path} changes earlier turns when later ones come, so the "
                    "answers in a conversation of several turns can't be told apart: give single turns"
                )
            found += [(prompt[len(done) :], False), (whole[len(prompt) :], True)]
            done = whole
    return found


def _with_context(conversation: Conversation) -> list[Message]:
    messages = list(conversation.messages)
    if conversation.context:
        first = next(number for number, one in enumerate(messages) if one.role == "user")
        messages[first] = Message("user", f"{messages[first].content}\n\n{conversation.context}")
    return messages


def _render(tokenizer: Any, messages: list[dict[str, str]], **given: bool) -> str:
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, **given)
    except Exception as error:  # a template is a program of the tokenizer's author, and refuses in its own ways
        roles = ", ".join(message["role"] for message in messages)
        raise ValueError(f"the chat template of {tokenizer.name_or_path} refuses {roles}: {error}") from error


def encode(conversations: Sequence[Conversation], tokenizer: Any) -> list[tuple[np.ndarray, np.ndarray]]:
    """Of each conversation its tokens, (n,) int32, and which of them are answers, (n,) bool.

    Prompts and answers are tokenised apart, as they are when an answer is generated. Where no chat template does
    so, an answer ends with the end-of-text token, and a text begins with the token that the model's texts do.
    """
    split = [parts(one, tokenizer) for one in conversations]
    texts = [text for one in split for text, _ in one]
    encoded = iter(tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"])
    begin, end = ([], []) if tokenizer.chat_template else (_beginning(tokenizer), [tokenizer.eos_token_id])
    return [_joined(begin, [(next(encoded), is_answer) for _, is_answer in one], end) for one in split]


def _beginning(tokenizer: Any) -> list[int]:
    first = tokenizer("")["input_ids"][:1]
    return first if first == [tokenizer.bos_token_id] else []


def _joined(begin: list[int], tokens: list[tuple[list[int], bool]], end: list[int]) -> tuple[np.ndarray, np.ndarray]:
    ids, answers = list(begin), [False] * len(begin)
    for part, is_answer in tokens:
        whole = [*part, *end] if is_answer else part
        ids += whole
        answers += [is_answer] * len(whole)
    answers[0] = False  # nothing comes before it that it could be predicted from
    return np.array(ids, dtype=np.int32), np.array(answers)
