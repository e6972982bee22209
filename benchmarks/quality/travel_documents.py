"""Documents whose lists, counts and orders are known: a caravan's journal, written by a seed.

Each chapter reaches a town, meets a person with a trade, and buys a thing. The rest is weather, road and camp. Every
fact stands once, in prose, far from its neighbours; no chapter has a heading or a number.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from typing import Literal

TOWNS = ("Marlow", "Tessaly", "Brunn", "Okehart", "Vanders", "Silmere", "Corvane", "Dunhelm", "Ystrad", "Pellworth",
         "Garrick", "Amberley", "Norvik", "Lathom", "Quenby", "Fairhollow", "Zerrin", "Hestia", "Ulverton", "Rosmead",
         "Kelbrook", "Ithaca", "Wexcombe", "Jarrow")  # fmt: skip
PERSONS = ("Ilona Brandt", "Tobias Kerr", "Mina Sato", "Gregor Pahl", "Anya Volkova", "Henrik Dahl", "Leda Marsh",
           "Otto Winkler", "Priya Nair", "Samuel Osei", "Clara Fontaine", "Iskander Bey", "Ruth Abelson",
           "Piet de Vries",
           "Noor Haddad", "Jonas Lund", "Beatrix Holm", "Emil Kovac", "Greta Sorel", "Malik Farouk", "Vera Lindqvist",
           "Hugo Pereira", "Dora Castell", "Arjun Mehta")  # fmt: skip
TRADES = ("baker", "smith", "weaver", "ferryman", "doctor", "potter", "judge", "tanner", "beekeeper", "printer")
THINGS = ("brass lamp", "sack of barley", "wool blanket", "copper kettle", "leather saddle", "jar of honey",
          "sea chart",
          "wooden flute", "iron anchor", "silk scarf", "silver mirror", "barrel of cider", "clay oven", "glass lantern",
          "bundle of quills", "goat", "chess set", "pocket watch", "coil of rope", "crate of lemons", "violin",
          "bronze bell", "fur coat", "telescope")  # fmt: skip
ARRIVALS = ("Towards evening the caravan reached {town} and was let in through the eastern gate.",
            "After a long descent the walls of {town} came into view, and the caravan halted there.",
            "The caravan came to {town} at noon, while the market was still open.",
            "At last the road led the caravan into {town}, where the animals were watered.")  # fmt: skip
MEETINGS = ("In the square they met {person}, a {trade} who knew the roads well.",
            "They were received by {person}, the {trade} of the place.",
            "A {trade} by the name of {person} invited them to supper.")  # fmt: skip
PURCHASES = ("Before leaving, the captain bought a {thing} for {price} crowns.",
             "There the captain paid {price} crowns for a {thing}.",
             "The only purchase of that stay was a {thing}, for {price} crowns.")  # fmt: skip
SUBJECTS = ("The wind", "The oldest mule", "The driver of the second wagon", "The rain", "A thin fog", "The cook",
            "The youngest rider", "The road", "The river beside them", "The evening light", "A flock of crows",
            "The guide", "The left wheel", "The dust", "The dog")  # fmt: skip
VERBS = ("slowed everybody down", "was the talk of the camp", "changed its mood by the hour", "gave little comfort",
         "kept the others awake", "seemed to follow the wagons", "made the climb harder", "was better than expected",
         "turned out to be harmless", "had to be watched closely", "was soon forgotten", "needed patience")  # fmt: skip
WHERE = ("on the ridge", "below the old bridge", "between the pines", "along the dry fields", "near the ford",
         "behind the hill", "at the edge of the marsh", "on the stony path", "under the bare cliffs",
         "beside the broken fence", "in the narrow valley", "close to the burned mill")  # fmt: skip
WHEN = ("all morning", "until the lamps were lit", "for the better part of the day", "just before dawn",
        "while the bread was baking", "after the second halt", "long after midnight", "as on the day before",
        "for hours", "when nobody expected it")  # fmt: skip
PROSE = ("{subject} {verb} {where} {when}.", "{when}, {subject} {verb}.", "{where} {subject} {verb}, {when}.",
         "Nobody could say why {subject} {verb} {where}.",
         "It was said that {subject} {verb} {when}, and most agreed.")  # fmt: skip
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
           "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen", "twenty")  # fmt: skip
SENTENCES = 6
"""Sentences of a paragraph without facts."""

Score = Literal["list", "count", "order", "summary", "fact"]


@dataclass(frozen=True)
class Question:
    """A question, how it is scored, and what its answer has to name, in the text's order."""

    text: str
    score: Score
    gold: tuple[str, ...]


@dataclass(frozen=True)
class TravelDocument:
    """A journal and the questions about it."""

    text: str
    questions: tuple[Question, ...]


def travel_document(seed: int, chapters: int, paragraphs: int) -> TravelDocument:
    """Return a journal of so many chapters, each with so many paragraphs without facts."""
    draw = random.Random(seed)
    towns, persons, things = (draw.sample(names, chapters) for names in (TOWNS, PERSONS, THINGS))
    trades = [draw.choice(TRADES) for _ in persons]
    parts: list[str] = []
    for town, person, trade, thing in zip(towns, persons, trades, things, strict=True):
        facts = [
            draw.choice(ARRIVALS).format(town=town),
            draw.choice(MEETINGS).format(person=person, trade=trade),
            draw.choice(PURCHASES).format(thing=thing, price=draw.randint(3, 90)),
        ]
        prose = [_paragraph(draw) for _ in range(paragraphs)]
        places = sorted(draw.sample(range(paragraphs), len(facts)))
        for place, fact in zip(places, facts, strict=True):
            prose[place] = f"{fact} {prose[place]}"
        parts += prose
    asked = draw.randrange(chapters)
    questions = (
        Question("List all the towns that the caravan reached.", "list", tuple(towns)),
        Question(
            "In which order did the caravan reach the towns? Name them from first to last.", "order", tuple(towns)
        ),
        Question("How many towns did the caravan reach? Answer with a number.", "count", (str(chapters),)),
        Question("List all the persons whom the caravan met.", "list", tuple(persons)),
        Question("List everything that the captain bought.", "list", tuple(things)),
        Question("Summarize the whole journey.", "summary", (*towns, *persons, *things)),
        Question(f"What is the trade of {persons[asked]}?", "fact", (trades[asked],)),
    )
    return TravelDocument("\n\n".join(parts), questions)


def _paragraph(draw: random.Random) -> str:
    sentences = []
    for _ in range(SENTENCES):
        words = {name: draw.choice(each) for name, each in
                 (("subject", SUBJECTS), ("verb", VERBS), ("where", WHERE), ("when", WHEN))}  # fmt: skip
        form = draw.choice(PROSE)
        if not form.startswith("{subject}"):
            words["subject"] = words["subject"][0].lower() + words["subject"][1:]
        sentence = form.format(**words)
        sentences.append(sentence[0].upper() + sentence[1:])
    return " ".join(sentences)


def score(question: Question, answer: str) -> float:
    """Return how much of the gold answer an answer gives, from 0 to 1.

    list: F1 of the names, where another name of the same kind is a wrong one. order: share of the pairs of the gold
    order that the answer has both of, in that order (Kendall's pairs, missing ones wrong). count: 1 for the right
    number. summary: share of the names. fact: 1 where it is named.
    """
    said = answer.lower()
    found = [name for name in question.gold if name.lower() in said]
    if question.score == "count":
        return float(_first_number(said) == int(question.gold[0]))
    if question.score == "order":
        places = [said.find(name.lower()) for name in question.gold]
        pairs = [(a, b) for at, a in enumerate(places) for b in places[at + 1 :]]
        return sum(0 <= a < b for a, b in pairs) / len(pairs)
    if question.score == "list":
        others = next(names for names in (TOWNS, PERSONS, THINGS) if question.gold[0] in names)
        wrong = sum(name.lower() in said for name in others if name not in question.gold)
        return 2 * len(found) / (len(question.gold) + len(found) + wrong)
    return len(found) / len(question.gold)


def _first_number(text: str) -> int | None:
    for word in re.findall(r"\w+", text):
        if word.isdigit() or word in NUMBERS:
            return int(word) if word.isdigit() else NUMBERS.index(word)
    return None
