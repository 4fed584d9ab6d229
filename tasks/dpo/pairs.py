"""Pairs of answers to tune on, from the demo, files or the hub, and which of them are held out."""

import hashlib
import json
from collections.abc import Sequence

from tasks.data import split
from tasks.data.split import HubSet, Kind, Split
from tasks.dpo import demo
from tasks.dpo.formats import Pair, pair
from tasks.instruct.conversations import hash_of
from tasks.instruct.formats import Message

HUB = {
    "ultrafeedback": HubSet("trl-lib/ultrafeedback_binarized", test="test"),
    "hh-rlhf": HubSet("Anthropic/hh-rlhf", test="test"),
    "orca-dpo": HubSet("Intel/orca_dpo_pairs"),
}
HUB["hub"] = HUB["ultrafeedback"]


def name_of(one: Pair) -> bytes:
    """A hash that identifies a pair; it begins with the prompt's, so that all pairs of a prompt are on one side."""
    return _hash(one.prompt, one.chosen.context)[:8] + hash_of(one.chosen) + hash_of(one.rejected)


def _hash(messages: Sequence[Message], context: str) -> bytes:
    return hashlib.sha256(json.dumps([[one[:2] for one in messages], context]).encode()).digest()


KIND = Kind("pairs", pair, name_of, demo.rows, HUB)


def check_source(data: str) -> None:
    """Raises ValueError if `data` isn't a source."""
    split.check_source(KIND, data)


def read(data: str) -> Split[Pair]:
    """All pairs of a source: see `split.read`."""
    return split.read(KIND, data)
