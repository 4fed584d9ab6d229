"""Conversations to tune on, from the demo, files or the hub, and which of them are held out."""

import hashlib
import json

from tasks.data import split
from tasks.data.split import HubSet, Kind, Split
from tasks.instruct import demo
from tasks.instruct.formats import Conversation, conversation

Conversations = Split[Conversation]

HUB = {
    "alpaca-gpt4": HubSet("vicgalle/alpaca-gpt4"),
    "alpaca": HubSet("tatsu-lab/alpaca", "dce01c9b08f87459cf36a430d809084718273017"),
    "openhermes-2.5": HubSet("teknium/OpenHermes-2.5", "05c3557e57b6dd1d0e0cb8369ba53b43e15fd10b"),
    "mathinstruct": HubSet("TIGER-Lab/MathInstruct", "b4fdc323a7be1379c9c7c0b67b1de72dfee2111a"),
    "gsm8k": HubSet("openai/gsm8k", "e53f048856ff4f594e959d75785d2c2d37b678ee", config="main", test="test"),
}
HUB["hub"] = HUB["alpaca-gpt4"]


def hash_of(one: Conversation) -> bytes:
    """A hash that identifies a conversation."""
    turns = [[role, content] if learned else [role, content, "context"] for role, content, learned in one.messages]
    return hashlib.sha256(json.dumps([turns, one.context]).encode()).digest()


KIND = Kind("conversations", conversation, hash_of, demo.rows, HUB)


def check_source(data: str) -> None:
    """Raises ValueError if `data` isn't a source."""
    split.check_source(KIND, data)


def read(data: str) -> Conversations:
    """All conversations of a source: see `split.read`."""
    return split.read(KIND, data)
