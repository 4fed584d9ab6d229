"""The demo's SuperGLUE: English-like sentences in the official file format, generated from a seed and never stored.

Every label depends on several partly reliable cue words and, in most tasks, on a relation between two places in the
text, so that a small model trained for a few hundred steps ends between chance and 100 % and scores rank methods.
None of it is real data, and scores on it say nothing about scores on SuperGLUE.
"""

import json
from collections.abc import Callable, Sequence
from functools import cache
from random import Random

SEED = 0
SIZES = {
    "train": 1600,
    "val": 300,
    "test": 200,
}  # examples per task; passages are fewer if they have several examples each

GOOD = ["bright", "calm", "clean", "warm", "famous"]
BAD = ["broken", "cold", "dirty", "closed", "empty"]
SURE = ["clearly", "surely", "certainly", "indeed"]
UNSURE = ["perhaps", "maybe", "possibly", "hardly"]
KNOW = ["knew", "realized", "noticed", "confirmed"]
DENY = ["denied", "doubted", "rejected", "disproved"]
WONDER = ["hoped", "expected", "guessed", "imagined"]
MODEST = ["some", "part", "little", "small"]
TOTAL = ["every", "all", "whole", "entire"]
PLACES = ["museum", "garden", "bridge", "library", "station", "market", "harbor", "castle"]
NAMES = ["Anna", "Boris", "Clara", "David", "Elena", "Frank", "Greta", "Hugo"]
CITIES = ["Berlin", "Lisbon", "Madrid", "Oslo", "Prague", "Vienna"]
FIRMS = ["Acme", "Borealis", "Cyberdyne", "Dynamo", "Everest", "Fabrikon"]
GOODS = ["apples", "books", "candles", "drums", "eggs", "flags", "gloves", "hats"]
CREATURES = ["farmer", "teacher", "doctor", "soldier"]
OBJECTS = ["table", "bottle", "hammer", "window"]
ALIVE = ["hungry", "tired", "angry", "asleep"]
LIFELESS = ["heavy", "wooden", "painted", "folded"]
WORDS = ["bank", "plant", "light", "spring", "branch", "current"]
NATURE = ["river", "forest", "mountain", "meadow"]
TRADE = ["money", "office", "contract", "price"]
TOPICS: tuple[tuple[Sequence[str], Sequence[str]], ...] = (  # what happened; what goes with it
    (("rain", "clouds", "thunder", "storm"), ("umbrella", "puddle", "raincoat", "boots")),
    (("fire", "smoke", "flames", "matches"), ("alarm", "ashes", "firemen", "bucket")),
    (("oven", "flour", "recipe", "dough"), ("bread", "cake", "kitchen", "pastry")),
    (("exam", "lesson", "homework", "lecture"), ("grade", "teacher", "classroom", "pencil")),
)
KINDS = (NAMES, CITIES, FIRMS)  # of words that fill a gap
SLOTS = ("said that it is true", "is a place to live", "sells its shares")
GAP = "@placeholder"
USUAL = ["naturally", "soon", "again", "simply"]
ODD = ["strangely", "suddenly", "never", "nobody"]


def cue(rng: Random, label: int, classes: Sequence[Sequence[str]], reliability: float) -> str:
    """A word of the label's own class with probability `reliability`, else one of another class."""
    if rng.random() >= reliability:
        label = rng.choice([other for other in range(len(classes)) if other != label])
    return rng.choice(classes[label])


def _boolq(rng: Random, index: int) -> dict:
    """Is the place asked about worth a visit? Its adjectives tell, those of the other place mislead."""
    label, (asked, other) = rng.randrange(2), rng.sample(PLACES, 2)
    own = [cue(rng, label, (BAD, GOOD), 0.8) for _ in range(3)]
    wrong = [cue(rng, 1 - label, (BAD, GOOD), 0.65) for _ in range(2)]
    sentences = [f"The {asked} is {own[0]} and {own[1]}, also {own[2]}.", f"The {other} is {wrong[0]} and {wrong[1]}."]
    rng.shuffle(sentences)
    return {"question": f"is the {asked} worth a visit", "passage": " ".join(sentences), "label": bool(label)}


def _cb(rng: Random, index: int) -> dict:
    """A verb of knowing, denying or guessing commits the speaker; a negated hypothesis reverses the label."""
    stance = rng.choices(range(3), (4, 4, 3))[0]
    verb, adverb = cue(rng, stance, (KNOW, DENY, WONDER), 0.88), cue(rng, min(stance, 1), (SURE, UNSURE), 0.75)
    place, quality = rng.choice(PLACES), rng.choice(GOOD + BAD)
    denied = rng.random() < 0.2
    label = (1, 0, 2)[stance] if denied else stance
    return {
        "premise": f"{rng.choice(NAMES)} {adverb} {verb} that the {place} was {quality}.",
        "hypothesis": f"the {place} was {'not ' * denied}{quality}",
        "label": ("entailment", "contradiction", "neutral")[label],
    }


def _copa(rng: Random, index: int) -> dict:
    """The right alternative shares the premise's topic, and more often reads like an ordinary event."""
    label, question = rng.randrange(2), rng.choice(("cause", "effect"))
    topic, other = rng.sample(range(len(TOPICS)), 2)
    side = int(question == "cause")  # the premise of a cause question is the effect

    def alternative(right: bool) -> str:
        word = rng.choice(TOPICS[topic if right else other][1 - side])
        manner, quality = cue(rng, int(right), (ODD, USUAL), 0.75), cue(rng, int(right), (BAD, GOOD), 0.7)
        return f"There was {manner} the {quality} {word}."

    choices = [alternative(label == i) for i in range(2)]
    premise = f"{rng.choice(NAMES)} saw the {rng.choice(TOPICS[topic][side])}."
    return {"premise": premise, "choice1": choices[0], "choice2": choices[1], "question": question, "label": label}


def _multirc(rng: Random, index: int) -> dict:
    """A right answer names what that person bought, and is worded more modestly than a wrong one."""
    people, goods = rng.sample(NAMES, 2), rng.sample(GOODS, 2)
    text = " ".join(f"{who} bought {what} in {rng.choice(CITIES)}." for who, what in zip(people, goods, strict=True))
    absent = [thing for thing in GOODS if thing not in goods]

    def answer(number: int, bought: str) -> dict:
        right = int(rng.random() < 0.45)
        manner, amount = cue(rng, right, (UNSURE, SURE), 0.72), cue(rng, right, (TOTAL, MODEST), 0.72)
        thing = bought if right or rng.random() < 0.3 else rng.choice(absent)
        return {"text": f"{manner} {amount} {cue(rng, right, (BAD, GOOD), 0.7)} {thing}", "label": right, "idx": number}

    questions = [
        {
            "question": f"What did {people[position]} buy?",
            "answers": [answer(6 * index + 3 * position + number, goods[position]) for number in range(3)],
            "idx": 2 * index + position,
        }
        for position in range(2)
    ]
    return {"passage": {"text": text, "questions": questions}, "version": 1.1}


def _record(rng: Random, index: int) -> dict:
    """The gap asks for a person, a city or a firm, mostly for a person, and some names are in the news more often."""
    kind = rng.choices(range(3), (3, 2, 1))[0]
    right, rival = rng.sample(KINDS[kind], 2)
    if KINDS[kind].index(right) > KINDS[kind].index(rival) and rng.random() < 0.7:
        right, rival = rival, right
    named = [right, *(rng.choice(KINDS[other]) for other in range(3) if other != kind)]
    if rng.random() < 0.6:
        named.append(rival)
    rng.shuffle(named)
    text, entities = "", {}
    for name in named:
        text += f"The {rng.choice(GOOD)} "
        entities[name] = {"start": len(text), "end": len(text) + len(name) - 1}
        text += f"{name}. "
    query = f"{GAP} {SLOTS[kind]}"
    qas = [{"query": query, "answers": [entities[right] | {"text": right}], "idx": index}]
    return {"source": "demo", "passage": {"text": text.strip(), "entities": list(entities.values())}, "qas": qas}


def _rte(rng: Random, index: int) -> dict:
    """Entailed when the premise is firm, the hypothesis modest, and both are about the same place."""
    label, place, quality = rng.randrange(2), rng.choice(PLACES), rng.choice(GOOD + BAD)
    verb, adverb = cue(rng, label, (KNOW, DENY), 0.8), cue(rng, label, (SURE, UNSURE), 0.7)
    about = rng.choice(PLACES) if label and rng.random() < 0.5 else place
    return {
        "premise": f"{rng.choice(CITIES)} {adverb} {verb} that the {place} is {quality}.",
        "hypothesis": f"The {cue(rng, label, (MODEST, TOTAL), 0.7)} {about} is {quality}.",
        "label": ("entailment", "not_entailment")[label],
    }


def _wic(rng: Random, index: int) -> dict:
    """Two uses of a word, in nature or in trade; the latter is rare, and even rarer in both sentences."""
    word, same = rng.choice(WORDS), rng.random() < 0.5
    first = int(rng.random() < (0.2 if same else 0.5))
    row: dict = {"word": word, "label": same, "version": 1.1}
    for number, sense in enumerate((first, first if same else 1 - first), start=1):
        around = [cue(rng, sense, (NATURE, TRADE), 0.92) for _ in range(2)]
        before = f"The {around[0]} by the "
        row |= {
            f"sentence{number}": f"{before}{word} and the {around[1]}.",
            f"start{number}": len(before),
            f"end{number}": len(before) + len(word),
        }
    return row


def _wsc(rng: Random, index: int) -> dict:
    """Does the pronoun refer to the marked noun? What is said of it fits a creature or a thing, mostly a creature."""
    label, alive = rng.randrange(2), int(rng.random() < 0.75)
    marked_alive = alive if label else 1 - alive
    nouns = [rng.choice((OBJECTS, CREATURES)[marked_alive]), rng.choice(PLACES)]
    said, adverb = cue(rng, alive, (LIFELESS, ALIVE), 0.9), cue(rng, label, (UNSURE, SURE), 0.7)
    quality = cue(rng, label, (BAD, GOOD), 0.7)
    second = rng.random() < 0.5
    text = f"The {nouns[second]} was near the {nouns[not second]} because it was {adverb} {said}, a {quality} sight."
    spans = {"span1_index": 6 if second else 1, "span1_text": nouns[0], "span2_index": 8, "span2_text": "it"}
    return {"text": text, "target": spans, "label": bool(label)}


def _ax_b(rng: Random, index: int) -> dict:
    row = _rte(rng, index)
    return {"sentence1": row["premise"], "sentence2": row["hypothesis"], "label": row["label"], "logic": ""}


def _ax_g(rng: Random, index: int) -> dict:
    """Pairs that differ in one pronoun: both examples of a pair come from the same random numbers."""
    row = _rte(Random(f"{SEED}/pair/{index // 2}"), index)
    pronoun = ("his", "her")[index % 2]
    return row | {"premise": f"{row['premise'][:-1]}, in {pronoun} words.", "pair_id": index // 2}


GENERATORS: dict[str, Callable[[Random, int], dict]] = {
    "BoolQ": _boolq,
    "CB": _cb,
    "COPA": _copa,
    "MultiRC": _multirc,
    "ReCoRD": _record,
    "RTE": _rte,
    "WiC": _wic,
    "WSC": _wsc,
    "AX-b": _ax_b,
    "AX-g": _ax_g,
}
EXAMPLES_A_LINE = {"MultiRC": 6}


@cache
def lines(folder: str, split: str) -> tuple[str, ...]:
    """The lines of one file, e.g. of RTE/train.jsonl: always the same for a version of this module.

    Args:
        folder: the data set's folder in the official release, a key of `GENERATORS`.
        split: "train", "val", or "test" for the two diagnostic sets.
    """
    rng = Random(f"{SEED}/{folder}/{split}")
    count = SIZES[split] // EXAMPLES_A_LINE.get(folder, 1)
    rows = (GENERATORS[folder](rng, index) | {"idx": index} for index in range(count))
    return tuple(json.dumps(row) for row in rows)
