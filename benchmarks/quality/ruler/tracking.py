"""RULER's variable tracking: a chain of assignments in noise; which variables have the first one's value?"""

from __future__ import annotations

import string
from dataclasses import dataclass
from random import Random

from benchmarks.quality.ruler.needles import NOISE
from benchmarks.quality.sources import Record, Sources, distinct, enumerated, fit, insert_at_random

INSTRUCTION = "Memorize and track the chain(s) of variable assignment hidden in the following text."
EXAMPLE_LINES = 5


@dataclass(frozen=True)
class VariableTracking:
    """`chains` chains of `hops` assignments behind the first one. Each chain can be asked for."""

    chains: int = 1
    hops: int = 4

    def record(self, sources: Sources, seed: str, tokens: int, questions: int) -> Record:
        """Return an example and a text of so many tokens together, and at most so many questions about the text."""

        def build(size: int) -> Record:
            draw = Random(seed)
            example = self._text(draw, EXAMPLE_LINES, 1, letters=3)
            text = self._text(draw, size, self.chains, letters=5)
            shown = example["qa"][0]
            solved = f"{example['context']}\nQuestion: {shown['q']} {shown['opening']} {shown['gold']}\n"
            return {"context": f"{solved}\n{text['context']}", "qa": text["qa"][:questions]}

        return fit(build, tokens, sources.count)

    def _text(self, draw: Random, size: int, chains: int, letters: int) -> Record:
        count = self.hops + 1
        names = distinct(lambda: "".join(draw.choices(string.ascii_uppercase, k=letters)), chains * count)
        values = distinct(lambda: str(draw.randint(10_000, 99_999)), chains)
        units, qa = [NOISE] * size, []
        for number, value in enumerate(values):
            own = names[number * count : (number + 1) * count]
            lines = [f"VAR {own[0]} = {value}"]
            lines += [f"VAR {own[at + 1]} = VAR {own[at]}" for at in range(self.hops)]
            units, depths = insert_at_random(draw, units, lines)
            qa.append(self._question(own, value, sum(depths) / len(depths)))
        return {"context": "\n".join([INSTRUCTION, "", *units]), "qa": qa}

    def _question(self, names: list[str], value: str, depth: float) -> Record:
        return {
            "q": f"Find all variables that are assigned the value {value} in the text above.",
            "opening": "Answer: According to the chain(s) of variable assignment in the text above, "
            f"{len(names)} variables are assigned the value {value}, they are:",
            "a": names,
            "gold": enumerated(names),
            "metric": "all",
            "depth": depth,
        }


TRACKING = {"vt": VariableTracking()}
