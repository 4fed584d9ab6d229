"""From a row to a pair of answers, for the formats in which preference data are published.

The answers are `chosen` and `rejected`: texts, turns, or lists of turns. What precedes them is

- `prompt` (or `instruction`, `question`), a text or turns, with Alpaca's `input`, `system` and `history`;
- `conversations` or `messages`, turns before a single one in each answer (LLaMA-Factory);
- or how both begin: whole conversations, as turns or as transcripts ("\\n\\nHuman: ...\\n\\nAssistant: ...", HH-RLHF),
  or texts without a prompt, which part at a word.

A prompt may be a transcript, too. An answer that looks like one is text, as is all else that is said in turns. Only
turns of the assistant after the prompt are learned.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from os.path import commonprefix

from tasks.data.rows import Row, RowError, listed
from tasks.data.tally import Tally
from tasks.instruct.formats import (
    ASSISTANT,
    ROLES,
    USER,
    Conversation,
    Message,
    Prompt,
    answered,
    prompt,
    turns,
    whole,
    with_system,
)

SIDES = ("chosen", "rejected")
TRANSCRIPT = re.compile(r"\s*Human:.*\n\nAssistant:", re.DOTALL)
SPEAKER = re.compile(r"(?:^|\n\n)(Human|Assistant):")

SAME = "chosen and rejected are the same"
APART = "chosen and rejected don't part at an answer to the same prompt"
NO_PROMPT = "no prompt (prompt, instruction or conversations, or how both chosen and rejected begin)"


@dataclass(frozen=True)
class Pair:
    """Two conversations that part at an answer."""

    chosen: Conversation
    rejected: Conversation

    @property
    def prompt(self) -> Sequence[Message]:
        """The turns that both begin with."""
        return _common(self.chosen.messages, self.rejected.messages)


def pair(row: Row, tally: Tally) -> Pair:
    """A row's pair; the tally notes what is left out.

    Raises:
        RowError: there are no two answers to one prompt, or they are the same.
    """
    sides = [turns(row, name, ASSISTANT) for name in SIDES]
    if sides[0] == sides[1]:
        raise RowError(row.where, SAME)
    asked, sides = _asked(row, sides)
    ends = [[*asked.messages, *side] for side in sides]
    both = _common(*ends)
    answers = [turns[len(both)] for turns in ends if len(turns) > len(both)]
    if not any(one.role == USER for one in both) or [one.role for one in answers] != [ASSISTANT, ASSISTANT]:
        raise RowError(row.where, APART)
    context = [one._replace(learned=False) if one.role == ASSISTANT else one for one in both]
    found = Pair(*(answered(row, [*context, *turns[len(both) :]], tally, asked.context) for turns in ends))
    if found.chosen == found.rejected:
        raise RowError(row.where, SAME)
    return found


def _common(some: Sequence[Message], others: Sequence[Message]) -> list[Message]:
    """The turns with which both begin."""
    return [one for one, _ in takewhile(lambda turns: turns[0] == turns[1], zip(some, others, strict=False))]


def _asked(row: Row, sides: list[list[Message]]) -> tuple[Prompt, list[list[Message]]]:
    """What precedes the answers, and the answers without it."""
    if any(side[0].role != ASSISTANT for side in sides):  # whole conversations
        return Prompt([], ""), [whole(row, side) for side in sides]
    asked, told = prompt(row), [_transcript(side[0].content) if len(side) == 1 else [] for side in sides]
    begin = "" if asked is None else asked.messages[-1].content.strip()
    if all(told) and all(side[0].content.strip().startswith(begin) for side in sides):
        return Prompt([], ""), [whole(row, side) for side in told]
    if asked is not None:
        return asked._replace(messages=_told(asked.messages)), sides
    return _begun(row, sides)


def _begun(row: Row, sides: list[list[Message]]) -> tuple[Prompt, list[list[Message]]]:
    """The same of texts without a prompt, which begin with it."""
    texts = [side[0].content for side in sides]
    begin = commonprefix(texts)
    length = len(begin.rstrip()) if begin[-1:].isspace() else begin.rfind(" ")
    if length < 1 or any(len(side) > 1 for side in sides):
        raise RowError(row.where, NO_PROMPT, f"; it has the fields {listed(row.value)}")
    asked = Prompt(with_system(row, [Message(USER, begin[:length].strip())]), "")
    return asked, [[Message(ASSISTANT, text[length:].strip())] for text in texts]


def _told(messages: Sequence[Message]) -> list[Message]:
    """The turns of a prompt; one that is a transcript, which the assistant continues, as what it tells."""
    told = [(one, _transcript(one.content)) for one in messages]
    return [turn for one, some in told for turn in (some if some and some[-1].role == USER else [one])]


def _transcript(text: str) -> list[Message]:
    """The turns of a transcript; the answer that a prompt asks for is none. Empty if the text isn't a transcript."""
    if not TRANSCRIPT.match(text):
        return []
    _, *parts = SPEAKER.split(text.strip())
    found = [Message(ROLES[name.lower()], said.strip()) for name, said in zip(parts[::2], parts[1::2], strict=True)]
    return found if found[-1].content else found[:-1]
