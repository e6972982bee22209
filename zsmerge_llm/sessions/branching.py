"""Where requests of one conversation are written differently, and what is gained by going back to such a point.

Two things make a template write a conversation differently from what was read. A client changes an earlier message:
coding agents put the newest text of their files before each question. And many templates leave out the reasoning of
earlier turns. In both cases a snapshot is taken where the texts part, so that the next time only what follows is read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

from zsmerge_llm.errors import InputError
from zsmerge_llm.language.chat_template import ChatTemplate, Tools
from zsmerge_llm.language.reasoning_history import answer_header, drops_reasoning, leaves_out_reasoning
from zsmerge_llm.sessions.prompt_builder import Continuation, PromptBuilder
from zsmerge_llm.sessions.session import Session, Snapshot
from zsmerge_llm.sessions.store import Store
from zsmerge_llm.sessions.transcript import Transcript
from zsmerge_llm.types import Message

SharedPrefix = Callable[[], int]
"""Returns how many messages a conversation shares with the session that begins most like it."""
MIN_SHARED_TOKENS = 64
"""A shorter prefix costs less to read than to keep."""


def branch_points(
    template: ChatTemplate, transcript: Transcript, tools: Tools, tokens: Sequence[int], seen: int, shared: int
) -> list[tuple[int, int]]:
    """Return where later requests may part from this one, as (messages, tokens), in the order they are read.

    Args:
        tokens: the prompt's ids, of which the first `seen` are read.
        shared: how many messages a session has in common with the request, if these are not all of the session's; 0.
    """
    messages, points = transcript.messages, []
    if 0 < shared < len(messages) and len(tokens) - seen >= MIN_SHARED_TOKENS:
        at = _tokens_of(template, messages, shared, tools, tokens)
        if at - seen >= MIN_SHARED_TOKENS:
            points.append((shared, at))
    if messages[-1]["role"] == "user" and drops_reasoning(template):
        header = template.encode(answer_header(template, messages))
        at = len(tokens) - len(header)
        if header and at > seen and list(tokens[at:]) == header:
            points.append((len(messages), at))
    return points


def before_dropped_reasoning(prompts: PromptBuilder, session: Session, continuation: Continuation) -> Snapshot | None:
    """Return the snapshot to go back to because the template leaves out what was reasoned behind it.

    None where it does not, or where more would be read again than is left out.

    continuation: of the conversation from the session's snapshot after an answer.
    """
    template, answer, transcript = continuation.template, continuation.snapshot, continuation.transcript
    known = (each for each in session.snapshots.values() if each.kind == "branch" and each.messages < answer.messages)
    branch = max(known, key=lambda each: each.messages, default=None)
    messages = transcript.messages
    if branch is None or transcript.digests[branch.messages] != branch.digest:
        return None
    if len(answer.tokens) - len(branch.tokens) < MIN_SHARED_TOKENS:
        return None
    if not leaves_out_reasoning(template, messages, branch.messages, continuation.tools):
        return None
    whole = prompts.following_ids(Continuation(template, branch, transcript, continuation.tools, None), messages)
    delta = prompts.following_ids(continuation, messages)
    if whole is None or delta is None:
        return None
    read_again = len(whole) - len(delta)
    left_out = len(answer.tokens) - len(branch.tokens) - read_again
    return branch if left_out >= max(read_again, MIN_SHARED_TOKENS) else None


def shared_prefix(store: Store, transcript: Transcript) -> SharedPrefix:
    """Return a `SharedPrefix` of a transcript. The sessions are searched at its first call, and only then."""

    @cache
    def search() -> int:
        found = store.longest_shared_prefix(transcript.digests)
        return 0 if found is None else found[1]

    return search


def reread_reason(store: Store, transcript: Transcript, name: str | None, shared: SharedPrefix) -> str:
    """Return why a conversation is not resumed though it is known; "" for a new one."""
    if transcript.document is not None:
        return "the document was read without these tools"
    # A greeting alone does not make a conversation a known one.
    first = 2 + (transcript.messages[0]["role"] == "system")
    if shared() >= first:
        return f"no snapshot of this conversation before message {shared() + 1} is left"
    if name is not None and name in store:
        return f"the messages and tools are not those of session {name!r}"
    return ""


def _tokens_of(template: ChatTemplate, messages: list[Message], count: int, tools: Tools, tokens: Sequence[int]) -> int:
    """Return how many tokens of a prompt the first `count` messages are; 0 where it does not show."""
    try:
        before = template.render(messages[:count], tools, add_generation_prompt=False)
        whole = template.render(messages, tools)
    except InputError:
        return 0
    if not whole.startswith(before):
        return 0
    ids, rest = template.encode(before), template.encode(whole[len(before) :])
    if list(tokens[: len(ids)]) == ids:
        return len(ids)
    at = len(tokens) - len(rest)
    return at if at > 0 and list(tokens[at:]) == rest else 0
