"""Chat templates: where a conversation's answers are in the text that a template renders, and their tokens.

Templates are programs by the tokenizers' authors. Some refuse a system turn, or consecutive turns by the same speaker;
some drop the reasoning of earlier answers (Qwen 3), or end the prompt with `<think>` (DeepSeek-R1).
"""

import datetime
import re
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

from tasks.data.rows import REPLACEMENT, RowError, listed
from tasks.data.tally import Tally
from tasks.instruct.formats import ASSISTANT, SYSTEM, USER, Message
from tasks.models.tokenization import tokenize_parts

Part = tuple[str, bool]  # a text; is it an answer?

REASONED = "</think>"
OPEN, CLOSE = (
    "\ufdd0",
    "\ufdd1",
)  # around the number of a control token named in a turn; noncharacters, so never in texts
# Templates that name the date (Llama 3.2's) get the one that Llama 3.1's has itself, or each day made other tokens.
TODAY = datetime.date(2024, 7, 26)
ASKED = re.compile(r"strftime_now\(\s*(?P<quote>['\"])(?P<format>.*?)(?P=quote)\s*\)")
PROBE = "\ufdd2"  # an answer that can be found again
CHANGED = (
    "conversations changed to suit the chat template: consecutive turns joined, system turns moved into the user's"
)
EARLIER = "earlier answers not learned, since the chat template changes them when more turns follow"


def stopping(tokenizer: Any, model: Any) -> Any:
    """The model, whose generation also stops where the chat template ends an answer.

    That needn't be the tokenizer's end of text: a base model's is `<|endoftext|>` beside a template of `<|im_end|>`.
    """
    settings = vars(model).get("generation_config")
    ends = Template(tokenizer).ends() if tokenizer.chat_template else []
    if settings is not None and ends:
        settings.eos_token_id = all_ends(tokenizer, settings)
    return model


def all_ends(tokenizer: Any, settings: Any) -> list[int]:
    """Every token that ends what is generated: the model's own ones, the tokenizer's and the chat template's."""
    own = settings.eos_token_id
    ends = Template(tokenizer).ends() if tokenizer.chat_template else []
    named = [*(own if isinstance(own, list) else [own]), tokenizer.eos_token_id, *ends]
    return list(dict.fromkeys(token for token in named if token is not None))


def notes(tokenizer: Any) -> list[str]:
    """What a reader of the results must know of the chat template."""
    if not tokenizer.chat_template:
        return ["prompts are Alpaca's, since the tokenizer has no chat template; nor has a model that is saved"]
    endless = not Template(tokenizer).ends()
    return ["the chat template ends an answer with no token, so where to stop isn't learned"] if endless else []


class _RefusedError(Exception):
    """A template's objection to a conversation that it doesn't accept."""


class Template:
    """The chat template of a transformers tokenizer."""

    def __init__(self, tokenizer: Any):
        self._tokenizer, self._template = tokenizer, _dated(tokenizer.get_chat_template())
        added = {str(token): token for token in tokenizer.added_tokens_decoder.values()}
        names = {name for name, token in added.items() if token.special} | set(tokenizer.all_special_tokens)
        # reasoning is marked up in the answers themselves
        self._names = sorted(names - {"<think>", REASONED}, key=len, reverse=True)
        self._control = re.compile(f"({'|'.join(map(re.escape, self._names))})" if self._names else "((?!))")
        self._added = added
        self._known_to_go_on: dict[str, bool] = {}

    def parts(self, messages: Sequence[Message], where: str, tally: Tally) -> list[Part]:
        """The consecutive texts of a conversation; names of control tokens within turns are hidden.

        Raises:
            RowError: the template accepts the turns in no form.
        """
        hidden = [message._replace(content=self._hide(message.content)) for message in messages]
        refusal = ""
        for form in _forms(hidden):
            try:
                parts, skipped = self._split(form)
                _check_all_said(form, "".join(text for text, _ in parts))
            except _RefusedError as error:
                refusal = refusal or str(error)
                continue
            if form != hidden:
                tally.mend(CHANGED, where)
            if skipped:
                tally.mend(EARLIER, where, skipped)
            return parts
        raise RowError(where, f"the chat template refuses it ({refusal})")

    def tokens(self, conversations: Sequence[Sequence[Part]]) -> Iterator[list[int]]:
        """The ids of each text that `parts` returns, of one conversation after another."""
        texts = [text for parts in conversations for text, _ in parts]
        continued = [self._is_continued(parts, place) for parts in conversations for place in range(len(parts))]
        plain = [place for place, text in enumerate(texts) if OPEN not in text]
        encoded = tokenize_parts(self._tokenizer, [texts[n] for n in plain], [continued[n] for n in plain])
        known = dict(zip(plain, encoded, strict=True))
        return (
            known[place] if place in known else self._mixed(text, continued[place]) for place, text in enumerate(texts)
        )

    def ends(self) -> list[int]:
        """The control token with which an answer ends, which needn't be the tokenizer's end of text; empty if none.

        Some tokenizers don't call it special: then it is an added token that follows the answer.
        """
        try:
            _, _, end = self._render([Message(USER, "?"), Message(ASSISTANT, PROBE)]).partition(PROBE)
        except _RefusedError:
            return []
        found = self._control.search(end)
        follows = [found[0]] if found else [one for one in self._added if end.strip().startswith(one)]
        return [self._tokenizer.convert_tokens_to_ids(max(follows, key=len))] if follows else []

    # ---- the content of turns, and the template's markup

    def _hide(self, content: str) -> str:
        content = content.replace(OPEN, REPLACEMENT).replace(CLOSE, REPLACEMENT).replace(PROBE, REPLACEMENT)
        return self._control.sub(lambda match: f"{OPEN}{self._names.index(match[0])}{CLOSE}", content)

    def _is_continued(self, parts: Sequence[Part], place: int) -> bool:
        """Does a part continue a text, of the template or of a turn?"""
        before = parts[place - 1][0] if place else ""
        control = next((name for name in self._names if before.endswith(name)), None)
        return bool(before) and (control is None or self._goes_on_after(control))

    def _goes_on_after(self, control: str) -> bool:
        """Does a text go on after a control token? Some tokenizers treat what follows as the beginning of another."""
        if control not in self._known_to_go_on:
            begun, after = tokenize_parts(self._tokenizer, ["a", f"{control}a"], [False, False])
            self._known_to_go_on[control] = after[-len(begun) :] != begun
        return self._known_to_go_on[control]

    def _mixed(self, text: str, continued: bool) -> list[int]:
        """The ids of a text with hidden names: everything between the template's control tokens is text."""
        ids: list[int] = []
        pieces = self._control.split(text)  # text, name, text, ...
        for place, name in enumerate(pieces[1::2]):
            token = self._added.get(name)
            before, after = 2 * place, 2 * place + 2
            pieces[before] = pieces[before].rstrip() if token and token.lstrip else pieces[before]
            pieces[after] = pieces[after].lstrip() if token and token.rstrip else pieces[after]
        for place, piece in enumerate(pieces):
            if place % 2:
                ids.append(self._tokenizer.convert_tokens_to_ids(piece))
            else:
                ids += self._as_text(piece, self._goes_on_after(pieces[place - 1]) if place else continued)
        return ids

    def _as_text(self, piece: str, continued: bool) -> list[int]:
        shown = re.sub(f"{OPEN}(\\d+){CLOSE}", lambda match: self._names[int(match[1])], piece)
        return tokenize_parts(self._tokenizer, [shown], [continued], split_special_tokens=True)[0]

    # ---- where the answers are

    def _split(self, messages: Sequence[Message]) -> tuple[list[Part], int]:
        """The parts, and how many answers before the last one aren't learned."""
        answers = [number for number, one in enumerate(messages) if one.role == ASSISTANT and one.learned]
        parts: list[Part] = []
        done = ""
        for number in answers:
            prompt, answer = self._answer(messages, number)
            if not prompt.startswith(done):
                prompt, answer = self._answer(messages, answers[-1])
                return [(prompt, False), (answer, True)], len(answers) - 1
            parts += [(prompt[len(done) :], False), (answer, True)]
            done = prompt + answer
        return parts, 0

    def _answer(self, messages: Sequence[Message], number: int) -> tuple[str, str]:
        """What precedes an answer when it is generated, and the answer with its end."""
        before, content = messages[:number], messages[number].content
        prompt, whole = self._render(before, prompt=True), self._render(messages[: number + 1])
        if whole.startswith(prompt) and _holds(whole[len(prompt) :], content):
            return prompt, whole[len(prompt) :]
        # the template leaves the reasoning out, or an answer doesn't continue where the prompt ends
        head, _, end = self._render([*before, Message(ASSISTANT, PROBE)]).partition(PROBE)
        if not (prompt.startswith(head) or head.startswith(prompt)):
            raise _RefusedError("it changes what comes before an answer")
        if REASONED not in content:
            return head, f"{content}{end}"
        opened = prompt[len(head) :].strip()  # "<think>", which the prompt already contains
        return prompt, f"{content.lstrip().removeprefix(opened).lstrip() if opened else content}{end}"

    def _render(self, messages: Sequence[Message], *, prompt: bool = False) -> str:
        turns = [{"role": message.role, "content": message.content} for message in messages]
        try:
            return self._tokenizer.apply_chat_template(
                turns, chat_template=self._template, tokenize=False, add_generation_prompt=prompt
            )
        except Exception as error:  # templates refuse in different ways
            raise _RefusedError(listed(str(error).split() or [type(error).__name__], " ")[:100]) from error


def _dated(template: str) -> str:
    """A template in which it is always the same day."""
    return ASKED.sub(lambda asked: repr(TODAY.strftime(asked["format"])), template)


def _check_all_said(messages: Sequence[Message], text: str) -> None:
    """Some templates skip turns with a role that they don't know."""
    said = "".join(text.split())
    for role, content, _ in messages:
        if role != ASSISTANT and "".join(content.split()) not in said:
            raise _RefusedError(f"it leaves out what the {role} says")


def _holds(text: str, content: str) -> bool:
    """Does an answer with reasoning keep its reasoning?"""
    return REASONED not in content or "".join(content.split()) in "".join(text.split())


def _forms(messages: list[Message]) -> Iterator[list[Message]]:
    """The turns as they are; alternating; and without a system turn."""
    yield messages
    alternating = _alternating(messages)
    if alternating != messages:
        yield alternating
    if any(one.role == SYSTEM for one in messages):
        yield _alternating([one._replace(role=USER) if one.role == SYSTEM else one for one in messages])


def _alternating(messages: list[Message]) -> list[Message]:
    """Join consecutive turns by one speaker; tools speak as the user, and so does the system after the first turn."""
    own = [
        ASSISTANT if one.role == ASSISTANT else one.role if not n and one.role == SYSTEM else USER
        for n, one in enumerate(messages)
    ]
    pairs = zip(own, messages, strict=True)
    return [_joined(role, [message for _, message in some]) for role, some in groupby(pairs, key=lambda pair: pair[0])]


def _joined(role: str, messages: Sequence[Message]) -> Message:
    return Message(role, "\n\n".join(one.content for one in messages), all(one.learned for one in messages))
