"""Documents of records, written by a seed: tables, logs, contracts, configurations, source code.

What tells one of their records from the others is an identifier: a number, a name with digits or underscores, an
address, a version, a time of day. Each question names the identifier of one record and asks for a value that stands in
it, and nowhere else.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from random import Random
from typing import NamedTuple

from benchmarks.quality.generated import GeneratedSuite
from benchmarks.quality.sources import Record, Sources, fit

NAMES = ("Anna", "Boris", "Clara", "Dmitri", "Elena", "Farid", "Greta", "Hugo")
SURNAMES = ("Stone", "Hill", "Marsh", "Berg", "Frost", "Lund", "Nair", "Pahl")
THINGS = ("bolt", "nut", "washer", "bracket", "hinge", "spring", "valve", "gasket", "bearing", "pulley")
COLOURS = ("red", "blue", "green", "black", "grey")
PARTIES = ("Supplier", "Customer", "Licensor", "Agent")
DUTIES = ("deliver", "notify", "indemnify", "reimburse", "inform")
SERVICES = ("auth", "billing", "search", "mailer", "cache")
OUTCOMES = ("completed", "failed", "timed out", "was retried")
VERBS = ("load", "merge", "split", "drop", "count", "check", "write", "scan")
NOUNS = ("batch", "index", "token", "page", "block", "record", "header", "queue")
TOWNS = ("Marlow", "Tessaly", "Brunn", "Okehart", "Silmere", "Corvane", "Dunhelm", "Ystrad")


class Entry(NamedTuple):
    """A record of a document, and questions that name it; the answer to each is `value`, which is a `noun`."""

    text: str
    noun: str
    value: str
    questions: tuple[str, ...]


Build = Callable[[Random, int, str], Entry]
"""A source of chance, a record's number, and its value → the record."""


def table_row(draw: Random, number: int, value: str) -> Entry:
    """Return a row of a table with commas."""
    item = f"{1000 + number}"
    row = f"{item},{draw.choice(THINGS)} M{draw.randint(2, 30)},{draw.choice(COLOURS)},{draw.randint(0, 500)},{value}"
    return Entry(row, "article number", value, (f"What is the article number of the item with id {item}?",))


def markdown_row(draw: Random, number: int, value: str) -> Entry:
    """Return a row of a Markdown table."""
    entry = table_row(draw, number, value)
    return Entry(f"| {entry.text.replace(',', ' | ')} |", entry.noun, entry.value, entry.questions)


def clause(draw: Random, number: int, value: str) -> Entry:
    """Return a numbered clause of a contract that speaks of another one."""
    own, other = (f"{1 + at // 6}.{1 + at % 6}" for at in (number, draw.randrange(120)))
    text = (
        f"{own} The {draw.choice(PARTIES)} shall {draw.choice(DUTIES)} the other party within {draw.randint(2, 90)} "
        f"days by form {value}, unless clause {other} applies.\n"
    )
    return Entry(
        text, "form", value, (f"Which form does clause {own} ask for?", f"By which form must it be done under {own}?")
    )


def log_line(draw: Random, number: int, value: str) -> Entry:
    """Return a line of a server's log."""
    clock = f"{number // 6 % 24:02d}:{number % 6 * 10 + draw.randrange(10):02d}:{draw.randrange(60):02d}"
    time, request = f"2026-11-{1 + number // 144:02d} {clock}", draw.randrange(10**6, 10**7)
    text = (
        f"{time} INFO {draw.choice(SERVICES)}: request {request} "
        f"{draw.choice(OUTCOMES)} in {draw.randint(3, 900)} ms, trace {value}"
    )
    return Entry(text, "trace", value, (f"Which trace has request {request}?", f"Which trace was logged at {time}?"))


def json_record(draw: Random, number: int, value: str) -> Entry:
    """Return a JSON object."""
    mail = f"user{number}@example.com"
    person = {"id": number, "name": f"{draw.choice(NAMES)} {draw.choice(SURNAMES)}", "email": mail, "badge": value}
    questions = (f"What is the badge of {mail}?", f"Which badge has the person with id {number}?")
    return Entry(json.dumps(person, indent=1), "badge", value, questions)


def function(draw: Random, number: int, value: str) -> Entry:
    """Return a function of a program."""
    name = f"{draw.choice(VERBS)}_{draw.choice(NOUNS)}_{draw.choice(NOUNS)}_{number}"
    camel = "".join(part.title() for part in name.split("_"))
    text = (
        f"class {camel}(Task):\n"
        f'    """{draw.choice(VERBS).title()} each {draw.choice(NOUNS)} of a {draw.choice(NOUNS)}."""\n\n'
        f'    code = "{value}"\n\n\ndef {name}(source):\n    return {camel}(source).run()\n\n'
    )
    return Entry(
        text, "code", value, (f"What is the code of the task that `{name}` runs?", f"What is the code of {camel}?")
    )


def settings(draw: Random, number: int, value: str) -> Entry:
    """Return a section of a configuration file."""
    name = f"{draw.choice(SERVICES)}_worker_{number}"
    text = f"[{name}]\nthreads = {draw.randint(1, 64)}\ntimeout = {draw.randint(1, 300)}s\nsecret = {value}\n"
    return Entry(text, "secret", value, (f"What is the secret of {name}?",))


def release(draw: Random, number: int, value: str) -> Entry:
    """Return a section of a changelog."""
    version = f"{1 + number // 40}.{number // 4 % 10}.{number % 4}"
    text = (
        f"## {version}\n\n- The {draw.choice(NOUNS)} of a {draw.choice(NOUNS)} is no longer {draw.choice(COLOURS)} "
        f"({value}).\n- A {draw.choice(NOUNS)} can {draw.choice(VERBS)}.\n"
    )
    return Entry(
        text, "issue", value, (f"Which issue was fixed in version {version}?", f"Which issue was fixed in v{version}?")
    )


def host(draw: Random, number: int, value: str) -> Entry:
    """Return a line of a table of hosts."""
    address = f"10.{number // 250}.{number % 250}.{draw.randrange(1, 250)}"
    text = f"{address}  {draw.choice(SERVICES)}-{number}.example.org  rack {value}"
    return Entry(text, "rack", value, (f"In which rack is {address}?", f"Which rack does the host {address} stand in?"))


def departure(draw: Random, number: int, value: str) -> Entry:
    """Return a line of a timetable."""
    time = f"{number // 12:02d}:{number % 12 * 5 + draw.randrange(5):02d}"
    text = f"{time}  {draw.choice(TOWNS)} via {draw.choice(TOWNS)}, train {value}, platform {draw.randint(1, 12)}"
    return Entry(
        text, "train", value, (f"Which train leaves at {time}?", f"I want to leave at {time}. Which train is that?")
    )


RECORDS: dict[str, Build] = {
    "table": table_row, "markdown": markdown_row, "contract": clause, "log": log_line, "json": json_record,
    "code": function, "settings": settings, "changelog": release, "hosts": host, "timetable": departure,
}  # fmt: skip
COLUMNS = ("id", "item", "colour", "stock", "article")
OPENINGS = {"table": ",".join(COLUMNS), "markdown": f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}"}
"""What stands above the records."""


def _generated(kind: str, sources: Sources, seed: str, tokens: int, questions: int) -> Record:
    """Return a document of one kind of records, with questions about some of them."""

    def build(size: int) -> Record:
        draw = Random(seed)
        values = draw.sample(range(10**4, 10**5), max(size, questions))
        entries = [RECORDS[kind](draw, number, f"K{value}") for number, value in enumerate(values)]
        qa = [
            {
                "q": draw.choice(entries[at].questions),
                "a": [entries[at].value],
                "opening": f"The {entries[at].noun} is",
                "metric": "all",
                "depth": at / len(entries),
            }
            for at in draw.sample(range(len(entries)), questions)
        ]
        opening = [OPENINGS[kind]] if kind in OPENINGS else []
        return {"context": "\n".join([*opening, *(entry.text for entry in entries)]), "qa": qa}

    return fit(build, tokens, sources.count)


TASKS = {kind: partial(_generated, kind) for kind in RECORDS}

SUITE = GeneratedSuite("structured", TASKS)
records = SUITE.records
