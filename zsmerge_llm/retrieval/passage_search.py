"""What a compressed cache no longer holds is looked up in the text itself, and read once more before the question.

Text is cheap to keep, keys and values are not: a token takes some 4 bytes as text and 10,000 and more in a cache. So a
turn whose cache loses something looks for those passages of what was said before that share the question's rarest words
(BM25), and reads a fixed number of their tokens again, as a part of the question's message. Nobody has to know before
what will be asked, and what is read for a turn does not grow with the conversation.

The search finds words, not meanings. Where no passage shares enough with the question it finds nothing: small models
answer from whatever stands before a question (benchmarks/LOG.md). About a document the cache itself is asked then
(`glance`). What the system says is held for ever, but models heed it less the further behind it is: it is said again.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from zsmerge_llm.language.chat_template import ChatTemplate
from zsmerge_llm.retrieval.query_probe import LONGEST, question, question_start
from zsmerge_llm.types import Message

Search = Callable[[str, int], list[str]]
"""What is asked, and how many tokens of passages at most → the passages."""
TOKENS = 256
"""How many are read again at most, unless a user sets another number."""
WORDS = 80
"""Words after which a passage ends with the next sentence."""
TIGHT = 4
"""Tokens of the budget for each word of a passage, where that makes passages shorter: one has to fit in whole."""
ROOT = 5
"""Letters of a word that tell it from others: "compresses" and "compressed" are the same to the search."""
TERM = "[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|\\w+"
"""What is searched for: words, and single characters of scripts that write no spaces."""
SHARED = 0.35
"""How much of what a question says one of the passages that fit best has to share, each word counted by how rare it is;
the others half as much. Where an answer is found without this, 1 to 3 % share less, and 77 % of what fits best to
a question about another text does (benchmarks/LOG.md)."""
BEST = 3
"""Passages among which one has to share so much."""
UNKNOWN = 0.5
"""What a word counts for that no passage has, of what the rarest would: it may be just the asker's way to put it."""
ASKING = frozenset(
    re.findall(
        TERM,
        "above according along another answer aside besides called can could describe different document else example "
        "explain give kind know many may mean means meant mention might much name named names passage please query "
        "question refer referred referring say sort tell term terms text type use used usual usually want way would",
    )
)
"""Words that ask, beside those that every English text has: they say nothing about what is asked."""
HEADING = 12
"""Words that a paragraph has to have to be a passage of its own."""
END = "[.!?][\"')\u201d]*\\s+|[\u3002\uff01\uff1f]\\s*|\\n(?![a-z])\\s*"
"""Where a sentence, a line or, with two line ends, a paragraph ends; a line that goes on in small letters does not."""
OPENING = "Remember this part of the text:"


def tail(recalled: int) -> int:
    """Tokens at a prompt's end that hold its `recalled` ones and the question behind them, however it is put."""
    return recalled + 2 * LONGEST if recalled else 0


@dataclass(frozen=True)
class PassageSearch:
    """Puts passages of what was said before into the message that asks for them, and what the system says.

    tokens: how many of them at most. 0: none, ever.
    """

    template: ChatTemplate
    tokens: int

    def into(
        self, messages: list[Message], slots: int, heard: Sequence[int] = (), otherwise: Search | None = None
    ) -> list[Message]:
        """The messages, the last of them with what it asks for; unchanged where there is nothing.

        Only a user's message asks. Of a message that is longer than the `slots` of the cache, the end asks for what
        stands before; of any other, what is said again comes first. It takes up half of the cache at most. What the
        system says is said again as a whole if that takes no more than half of this, however little is asked for: from
        far behind, models do not heed it, even where the cache holds all of it. But not before a message longer than a
        question: it would not stand near what is asked, and what is said over and over is not heeded either.

        heard: ids of the conversation; where the last `slots` of them have what the system says, it is not repeated.
        otherwise: what else to ask where words find nothing.
        """
        *before, last = messages
        if last["role"] != "user" or not self.tokens:
            return messages
        content, start = last["content"], question_start(last["content"])
        size = len(self.template.encode(content))
        if size <= slots:
            start = 0
        most = min(self.tokens, slots // 2)
        guide = self._guide(before, most // 2)
        asked = content if size <= LONGEST else question(content)
        said = [*before[bool(guide) :], {**last, "content": content[:start]}]
        near = size <= LONGEST or start > 0
        again = f"{guide}\n\n" if guide and near and not self._stands(guide, heard[-slots:]) else ""
        most -= len(self.template.encode(again))
        found = self.passages(said, asked, most)
        again += block(found if found or otherwise is None else otherwise(asked, most))
        return [*before, {**last, "content": content[:start] + again + content[start:]}] if again else messages

    def _guide(self, messages: Sequence[Message], most: int) -> str:
        """What the system says, if it has `most` tokens at most."""
        guide = messages[0]["content"] if messages and messages[0]["role"] == "system" else ""
        return guide if len(self.template.encode(guide)) <= most else ""

    def _stands(self, text: str, tokens: Sequence[int]) -> bool:
        """Whether a text is in some tokens, but for spaces, which they do not always keep."""
        there = str(self.template.tokenizer.decode(list(tokens)))
        return "".join(text.split()) in "".join(there.split())

    def passages(self, said: Sequence[Message], asked: str, most: int) -> list[str]:
        """Those passages of what was said that fit best to what is asked, of `most` tokens together, in their order."""
        size = min(WORDS, max(HEADING, most // TIGHT))
        passages: list[str] = []
        for message in said:
            content, role = message["content"], message["role"]
            if role == "assistant" and passages and _words(content) < HEADING:  # is found by what it answers
                passages[-1] += f"\n\n{content}"
            else:
                passages += split(content, size)
        found: list[int] = []
        for index in ranked(passages, asked):
            cost = len(self.template.encode(passages[index] + "\n\n"))
            if cost <= most:
                found.append(index)
                most -= cost
            elif found:
                break
        return [passages[index] for index in sorted(found)]


def block(passages: Sequence[str]) -> str:
    """Passages as they stand before a question; "" for none."""
    return "\n\n".join([OPENING, *passages, ""]) if passages else ""


def split(text: str, size: int = WORDS) -> list[str]:
    """A text in passages: paragraphs, and those of more than `size` words in parts that end with a sentence or a line.
    Headings belong to what follows them, and a short end to what stands before it."""
    starts = [0]
    for end, closes in _ends(text, size):
        if _words(text[starts[-1] : end]) >= (HEADING if closes else size):
            starts.append(end)
    if len(starts) > 1 and _words(text[starts[-1] :]) < size // 2:
        starts.pop()
    passages = [text[start:end].strip() for start, end in zip(starts, [*starts[1:], len(text)], strict=True)]
    return [passage for passage in passages if _words(passage)]


def _ends(text: str, size: int) -> Iterator[tuple[int, bool]]:
    """Where sentences and lines end, and whether a paragraph does; what has no end for long is cut between words."""
    start = 0
    for found in re.finditer(END, text + "\n\n"):
        words = [start + each.end() for each in re.finditer(TERM, text[start : found.end()])]
        yield from ((end, False) for end in words[size - 1 : -size : size])
        yield found.end(), found[0].count("\n") > 1
        start = found.end()


def ranked(passages: Sequence[str], asked: str) -> list[int]:
    """Numbers of the passages that share enough with what is asked, those that share the rarest words first."""
    import bm25s  # takes a moment, and is not needed before something was lost

    sought, told = sorted(set(content(asked))), [terms(passage) for passage in passages]
    if not sought or not any(told):
        return []
    kinds = [set(passage) for passage in told]
    rarity = _rarity(sought, kinds)
    shared = [sum(rarity[term] for term in rarity.keys() & kind) for kind in kinds]
    least = SHARED * sum(rarity.values())
    index = bm25s.BM25()
    index.index(told, show_progress=False)
    order = (-index.get_scores(sought)).argsort(kind="stable").tolist()
    if max(shared[at] for at in order[:BEST]) < least:
        return []
    return [at for at in order if shared[at] >= least / 2]


def _rarity(sought: Sequence[str], kinds: Sequence[set[str]]) -> dict[str, float]:
    """BM25's weight of each term sought: the fewer passages have it, the more. kinds: the terms of each passage."""
    having = {term: sum(term in kind for kind in kinds) for term in sought}
    weight = {term: math.log1p((len(kinds) - having[term] + 0.5) / (having[term] + 0.5)) for term in sought}
    return {term: weight[term] if having[term] else UNKNOWN * weight[term] for term in sought}


def _words(text: str) -> int:
    return len(re.findall(TERM, text))


def terms(text: str) -> list[str]:
    """What a text is found by."""
    return [word[:ROOT] for word in re.findall(TERM, text.lower())]


def content(asked: str) -> list[str]:
    """What a question is about: its terms without the words that every text of its language has."""
    from bm25s import stopwords

    languages = [getattr(stopwords, name) for name in dir(stopwords) if name.startswith("STOPWORDS_")]
    words = re.findall(TERM, asked.lower())
    common = max(languages, key=lambda language: sum(word in language for word in words))
    return [word[:ROOT] for word in words if word not in common and word not in ASKING]
