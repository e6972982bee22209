"""SCBench's synthetic kinds (arXiv 2412.10319), generated: several questions about one text that was read before.

Key-value pairs, strings by prefix and suffix, chains of variables, and labels learned from many examples.
"""

from __future__ import annotations

import json
import string
from random import Random

from benchmarks.quality.generated import GeneratedSuite
from benchmarks.quality.ruler.tracking import VariableTracking
from benchmarks.quality.sources import Record, Sources, distinct, fit, random_uuid

AFFIX_LETTERS = 6
STRING_LETTERS = (20, 36)
LABELS = ("zorple", "brinka", "quimby", "fandle")
LABEL_LETTERS = ("abcdef", "ghijklm", "nopqr", "stuvwxyz")
"""The hidden rule: the first letter of an example's first word gives its label."""


def key_values(sources: Sources, seed: str, tokens: int, questions: int) -> Record:
    """Return a JSON object of random keys and values."""

    def build(size: int) -> Record:
        draw = Random(seed)
        keys = distinct(lambda: random_uuid(draw), max(size, questions))
        pairs = {key: random_uuid(draw) for key in keys}
        qa = [
            {
                "q": f'Key: "{key}". What is the value associated with this key?',
                "opening": f'The value associated with "{key}" is',
                "a": [pairs[key]],
                "metric": "all",
                "depth": keys.index(key) / len(keys),
            }
            for key in draw.sample(keys, questions)
        ]
        head = "Remember the following JSON object. I will ask for values by their keys."
        return {"context": f"{head}\n{json.dumps(pairs, indent=0)}", "qa": qa}

    return fit(build, tokens, sources.count)


def prefix_suffix(sources: Sources, seed: str, tokens: int, questions: int) -> Record:
    """Return a list of random strings; asked are some by their beginnings and ends."""

    def build(size: int) -> Record:
        draw = Random(seed)

        def make() -> str:
            return "".join(draw.choices(string.ascii_lowercase, k=draw.randint(*STRING_LETTERS)))

        found = distinct(make, max(size, questions))
        qa = [
            {
                "q": f'Which string of the list begins with "{text[:AFFIX_LETTERS]}" and ends with '
                f'"{text[-AFFIX_LETTERS:]}"?',
                "opening": "The string is",
                "a": [text],
                "metric": "all",
                "depth": found.index(text) / len(found),
            }
            for text in draw.sample(found, questions)
        ]
        head = "Remember the following list of strings. I will ask for strings by how they begin and end."
        return {"context": "\n".join([head, *found]), "qa": qa}

    return fit(build, tokens, sources.count)


def chains(sources: Sources, seed: str, tokens: int, questions: int) -> Record:
    """Return variables in noise, one chain of assignments for each question."""
    return VariableTracking(chains=questions, hops=2).record(sources, seed, tokens, questions)


def many_shot(sources: Sources, seed: str, tokens: int, questions: int) -> Record:
    """Return examples of phrases with labels by a rule that is not told; asked are the labels of others."""
    words = [[word for word in sources.words if word[0] in letters] for letters in LABEL_LETTERS]

    def build(size: int) -> Record:
        draw = Random(seed)

        def example(label: int) -> str:
            return " ".join([draw.choice(words[label]), *draw.sample(sources.words, 3)])

        rules = [draw.randrange(len(LABELS)) for _ in range(size)]
        shots = [f"Phrase: {example(rule)}\nLabel: {LABELS[rule]}" for rule in rules]
        qa = []
        for rule in (draw.randrange(len(LABELS)) for _ in range(questions)):
            others = [label for label in LABELS if label != LABELS[rule]]
            qa.append(
                {
                    "q": f"Give the label of this phrase by the same rule.\nPhrase: {example(rule)}",
                    "opening": "Label:",
                    "a": [LABELS[rule]],
                    "options": [LABELS[rule], *others],
                }
            )
        head = "Here are phrases with their labels. Learn the rule."
        return {"context": "\n\n".join([head, *shots]), "qa": qa}

    return fit(build, tokens, sources.count)


TASKS = {"kv": key_values, "prefix_suffix": prefix_suffix, "vt": chains, "many_shot": many_shot}

records = GeneratedSuite("scbench", TASKS).records
