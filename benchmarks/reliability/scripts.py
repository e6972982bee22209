"""What the users of the soak say: conversations that follow a fixed number of scripts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from zsmerge_llm import LLM, SamplingParams

SYSTEM = "You know all there is to know about islands, lighthouses and their keepers. " * 3
TOPICS = ("harbour", "lighthouse", "island", "keeper", "captain", "storm", "signal", "chart")


@dataclass(frozen=True)
class Script:
    """What a user says in one conversation, and how the answers are sampled."""

    system: str | None
    questions: tuple[str, ...]
    sampling: SamplingParams


def make_scripts(count: int, turns: int = 6, max_tokens: int = 8) -> list[Script]:
    """Return scripts that differ from their first question on; half are sampled, each with a seed of its own."""
    scripts = []
    for number in range(count):
        topics = [TOPICS[(number + turn) % len(TOPICS)] for turn in range(turns)]
        questions = [
            f"{number}.{turn}: tell me about the {topic} of island {number}." for turn, topic in enumerate(topics)
        ]
        sampled = {"temperature": 0.8, "seed": number} if number % 2 else {}
        system = SYSTEM if number % 3 else None
        scripts.append(Script(system, tuple(questions), SamplingParams(max_tokens=max_tokens, **sampled)))
    return scripts


@dataclass
class Conversation:
    """One conversation that follows a script.

    Attributes:
        points: tokens that were read at the end of each turn's prompt.
        repeatable: whether the last turn can be taken again: only the two newest points of a conversation are kept.
        acts: what was done with it, for a report.
    """

    script: Script
    answers: Sequence[str]
    namespace: str | None = None
    name: str | None = None
    points: list[int] = field(default_factory=lambda: [0])
    repeatable: bool = False
    acts: list[str] = field(default_factory=list)

    @property
    def turn(self) -> int:
        """How many turns have been answered."""
        return len(self.points) - 1

    @property
    def is_over(self) -> bool:
        return self.turn == len(self.script.questions)

    def messages(self) -> list[dict[str, Any]]:
        """Return the messages up to the next question, with the answers of the single thread."""
        said: list[dict[str, Any]] = []
        if self.script.system is not None:
            said.append({"role": "system", "content": self.script.system})
        for question, answer in zip(self.script.questions, self.answers, strict=False):
            said += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            if len(said) // 2 > self.turn:
                break
        return [*said[: 2 * self.turn + (self.script.system is not None)], *self._question()]

    def branch(self, name: str) -> Conversation:
        """Return a conversation that has said the same, under another name."""
        return Conversation(self.script, self.answers, self.namespace, name, list(self.points))

    def _question(self) -> list[dict[str, Any]]:
        return [{"role": "user", "content": self.script.questions[self.turn]}]


def single_thread_answers(llm: LLM, script: Script) -> list[str]:
    """Answer a script, turn by turn."""
    conversation = Conversation(script, answers := [])
    for _ in script.questions:
        result = llm.chat(conversation.messages(), sampling=script.sampling)
        answers.append(result.text)
        conversation.points.append(result.usage.prompt_tokens)
    return answers
