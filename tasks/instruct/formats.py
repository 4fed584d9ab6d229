"""From a row to a conversation, for the formats in which instruction data are published.

A row's format is recognised by its fields:

- `messages` (or `conversations`, `conversation`): turns of `role` and `content`, or of `from` and `value` (ShareGPT),
  texts by turns (LIMA), or pairs of `input` and `output` (Capybara), with or without a separate `system` text, and
  with or without the answer in a field of its own. A content may be a list of text parts.
- a question and an answer: `instruction` and `output` (Alpaca, with `input`, `system` and `history`), `instruction`,
  `context` and `response` (Dolly), `prompt` and `completion`, `question` and `answer` (GSM8K), `prompt` and `chosen`.
  Of several questions (`instruction` and `question`) the others belong to the first.

An assistant's turns are learned. What it says to a tool and what the tool answers are context, and so is a turn with
`weight` 0, or `train` or `loss` false. Rows whose answer is one to avoid (`label` or `kto_tag` false, KTO) are left
out.
"""

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from tasks.data.rows import Row, RowError, listed, short
from tasks.data.tally import Tally

USER, ASSISTANT, SYSTEM, TOOL, CALL = "user", "assistant", "system", "tool", "call"
NAMES = {  # the roles' names in published data; in lower case, with _ for spaces
    USER: ("user", "human", "prompter"),
    ASSISTANT: ("assistant", "gpt", "model", "bot", "chatbot", "ai", "chatgpt", "bard", "bing", "claude"),
    SYSTEM: ("system", "developer"),
    TOOL: ("tool", "function", "observation", "tool_response", "function_response", "ipython", "environment"),
    CALL: ("function_call", "tool_call"),
}
ROLES = {name: role for role, names in NAMES.items() for name in names}

LISTS = ("messages", "conversations", "conversation")
SPEAKERS, CONTENTS = ("role", "from"), ("content", "value")
CALLS = ("tool_calls", "function_call")  # what an assistant's turn says to a tool
TEXT_PARTS = ("text", "input_text", "output_text")
QUESTIONS = ("instruction", "prompt", "question", "query", "input")
ANSWERS = ("output", "completion", "response", "answer", "chosen")
CONTEXTS = ("input", "context")
SYSTEMS = ("system", "system_prompt")
MARKS = {"true": True, "1": True, "false": False, "0": False}  # of an answer, in a table; in lower case
FLAGS = ("train", "training", "loss")  # of a turn: false where it isn't to be learned
FORMATS = "messages; conversations; instruction and output or response; prompt and completion; question and answer"

WRITTEN_OUT = re.compile(r"""\s*\[\s*\{\s*['"](role|from|content|value)['"]\s*:""")  # in JSON or Python
NOT_ASKED = "turns left out, since they precede the user's first"


class Message(NamedTuple):
    """One turn."""

    role: str  # system | user | assistant | tool
    content: str
    learned: bool = True  # for an assistant's turn: it isn't just context


@dataclass(frozen=True)
class Conversation:
    """Turns, of which the last is an answer to learn."""

    messages: tuple[Message, ...]
    context: str = ""  # Alpaca's input, which belongs to the first user message
    where: str = field(default="", compare=False)  # its place, for messages

    @property
    def answer(self) -> str:
        """The assistant's last turn."""
        return self.messages[-1].content


def conversation(row: Row, tally: Tally) -> Conversation:
    """A row's conversation up to its last answer; the tally notes what is left out.

    Raises:
        RowError: the row has none of the known formats, or no answer.
    """
    if _is_false(row, "kto_tag") or ("completion" in row.value and _is_false(row, "label")):
        raise RowError(row.where, "its answer is marked as one to avoid, for preference tuning")
    name, answer = _first(row, LISTS), _first(row, ANSWERS)
    if name is not None and answer is not None and not _has_value(row, name):
        name = None  # rows of several formats in one file have the fields of all, most of them empty
    if name is not None and (answer is None or _listed(row, name)[-1].role == ASSISTANT):
        return answered(row, with_system(row, _listed(row, name)), tally)
    answers = turns(row, answer, ASSISTANT) if answer is not None else []
    if any(one.role == USER for one in answers):  # preference data, where each side is a whole conversation
        return answered(row, whole(row, answers), tally)
    asked = prompt(row) if answer is not None else None
    if asked is None:
        raise RowError(row.where, f"no known format ({FORMATS})", f" has the fields {listed(row.value)}")
    return answered(row, [*asked.messages, *answers], tally, asked.context)


def _is_false(row: Row, name: str) -> bool:
    """Is it false, also as a table writes it, whose cells are texts, or as the number 0?"""
    mark = row.value.get(name)
    said = MARKS.get(mark.strip().lower(), mark) if isinstance(mark, str) else mark
    if said in (True, False, None):  # else it marks something else, and is a field that isn't used
        row.get(name)
    return said == 0


class Prompt(NamedTuple):
    """What comes before an answer."""

    messages: list[Message]
    context: str  # Alpaca's input, which belongs to the first user message


def prompt(row: Row) -> Prompt | None:
    """A row's turns, or its question with what belongs to it; None if it has neither.

    Raises:
        RowError: a field isn't what it must be.
    """
    name, question = _first(row, LISTS), _first(row, QUESTIONS)
    if name is not None and (question is None or _has_value(row, name)):
        return Prompt(with_system(row, _listed(row, name)), "")
    if question is None:
        return None
    earlier, asked = _history(row), turns(row, question, USER)
    context = _context(row, question, asked[-1].content)
    if context and earlier:  # it belongs to this question, which isn't the first
        asked[-1] = Message(USER, f"{asked[-1].content}\n\n{context}")
        context = ""
    return Prompt(with_system(row, [*earlier, *asked]), context)


def _context(row: Row, question: str, asked: str) -> str:
    """What belongs to a question: other questions, unless one of the two holds the other, and its context."""
    others = [name for name in QUESTIONS if name not in (question, *CONTEXTS) and isinstance(row.value.get(name), str)]
    apart = [name for name in others if row.value[name].strip() not in asked and asked.strip() not in row.value[name]]
    contexts = [name for name in CONTEXTS if name != question and row.has(name)]
    return "\n\n".join(text for text in map(row.text, [*apart, *contexts]) if text.strip())


def whole(row: Row, messages: Sequence[Message]) -> list[Message]:
    """A whole conversation in the place of an answer, after the row's system text; it begins with the row's prompt."""
    name = _first(row, QUESTIONS)
    if name is not None and row.has(name):
        said = [one.content for one in messages]
        asked = row.value[name] if isinstance(row.value[name], list) else [{"content": row.value[name]}]
        if all(isinstance(turn, dict) and turn.get("content", turn.get("value")) in said for turn in asked):
            row.get(name)
    return with_system(row, messages)


def turns(row: Row, name: str, role: str) -> list[Message]:
    """A field that is a text spoken by `role`, a turn, or a list of turns."""
    if isinstance(row.value.get(name), list):
        return _turns(row, name)
    if isinstance(row.value.get(name), dict):
        return [_message(row.row(name))]
    text = row.text(name)
    if WRITTEN_OUT.match(text):  # by a table, whose cells are texts: to learn it would be to learn JSON
        raise RowError(row.where, f"{name!r} holds turns written as a text: give a list of them")
    return [Message(role, text)]


def _first(row: Row, names: Iterable[str]) -> str | None:
    """The first name that is a field with something in it; else the first that is a field."""
    present = [name for name in names if name in row.value]
    return next((name for name in present if _has_value(row, name)), present[0] if present else None)


def _has_value(row: Row, name: str) -> bool:
    value = row.value.get(name)
    return value not in (None, [], {}) and not (isinstance(value, str) and not value.strip())


def with_system(row: Row, messages: Sequence[Message]) -> list[Message]:
    """Turns after a separate system text, if there is one that isn't among them already."""
    name = _first(row, SYSTEMS)
    text = row.text(name) if name is not None and row.has(name) else ""
    said = not text.strip() or any(one.role == SYSTEM and one.content.strip() == text.strip() for one in messages)
    return [*messages] if said else [Message(SYSTEM, text), *messages]


def _history(row: Row) -> list[Message]:
    """Earlier questions with their answers: a list of pairs, as in Alpaca's data, or of turns."""
    pairs = row.get("history") or []
    if isinstance(pairs, list) and all(isinstance(turn, dict) for turn in pairs):
        return _turns(row, "history") if pairs else []
    if not isinstance(pairs, list) or not all(_is_pair(pair) for pair in pairs):
        raise RowError(row.where, "'history' must be a list of pairs of texts", f", got {short(pairs)}")
    return [Message(role, text) for pair in pairs for role, text in zip((USER, ASSISTANT), pair, strict=True)]


def _is_pair(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(isinstance(text, str) for text in value)


def _turns(row: Row, name: str) -> list[Message]:
    return [_message(turn) for turn in row.rows(name)]


def _listed(row: Row, name: str) -> list[Message]:
    """The turns of a whole conversation; without roles, the user's and the assistant's by turns."""
    said = row.get(name)
    if isinstance(said, list) and said and all(isinstance(text, str) for text in said):
        return [Message((USER, ASSISTANT)[place % 2], text) for place, text in enumerate(said)]
    found: list[Message] = []
    for turn in row.rows(name):
        is_pair = not turn.has("role") and turn.has("input") and turn.has("output")
        found += [Message(USER, turn.text("input")), Message(ASSISTANT, turn.text("output"))] if is_pair else []
        found += [] if is_pair else [_message(turn)]
    return found


def _message(turn: Row) -> Message:
    name = turn.text(_first(turn, SPEAKERS) or SPEAKERS[0])
    role = ROLES.get("_".join(name.lower().replace("-", " ").split()))
    if role is None:
        raise RowError(turn.where, f"unknown role {short(name)}", f": the roles are {', '.join(ROLES)}")
    calls = [turn.get(call) for call in CALLS if turn.value.get(call)]  # [] calls nothing
    content = _content(turn, _first(turn, CONTENTS) or CONTENTS[0], optional=bool(calls))
    content = "\n".join([*([content] if content else []), *(json.dumps(call, ensure_ascii=False) for call in calls)])
    if role == CALL:
        return Message(ASSISTANT, content, learned=False)
    learned = bool(content.strip()) and not calls and not _is_marked(turn)
    return Message(role, content, learned or role != ASSISTANT)


def _is_marked(turn: Row) -> bool:
    """Is an answer marked as context?"""
    weight = turn.get("weight")
    if not (weight is None or (isinstance(weight, int | float) and weight in (0, 1))):
        raise RowError(turn.where, "'weight' must be 0 or 1", f", got {short(weight)}")
    flags = [turn.get(name) for name in FLAGS if isinstance(turn.value.get(name), bool)]
    return weight == 0 or not all(flags)


def _content(turn: Row, name: str, *, optional: bool) -> str:
    """A turn's text, or that of its parts."""
    if optional and not turn.has(name):
        return ""
    if not isinstance(turn.value.get(name), list):
        return turn.text(name)
    return "".join(_part(turn.where, part) for part in turn.get(name))


def _part(where: str, part: Any) -> str:
    if isinstance(part, str):
        return part
    if isinstance(part, dict) and part.get("type", "text") in TEXT_PARTS and isinstance(part.get("text"), str):
        return part["text"]
    kind = part.get("type") if isinstance(part, dict) else None
    raise RowError(where, f"a part of its content isn't text but {short(kind or part)}")


def answered(row: Row, messages: Sequence[Message], tally: Tally, context: str = "") -> Conversation:
    """The turns up to the last answer, from the user's first; what the system says before it is kept.

    Raises:
        RowError: there is no answer.
    """
    asked = next((number for number, one in enumerate(messages) if one.role == USER), len(messages))
    before = [one for one in messages[:asked] if one.role == SYSTEM]
    said = [*before, *messages[asked:]]
    answers = [number for number, one in enumerate(said) if one.role == ASSISTANT and one.learned]
    if not answers or not said[answers[-1]].content.strip():
        raise RowError(row.where, "no answer to learn")
    if len(said) < len(messages):
        tally.mend(NOT_ASKED, row.where, len(messages) - len(said))
    return Conversation(tuple(said[: answers[-1] + 1]), context, row.where)
