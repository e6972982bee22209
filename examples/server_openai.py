"""OpenAI's client: a conversation, a tool, and a document that is uploaded once and asked about many times.

    zsmerge-llm serve --model smollm2
    pip install openai
    python server_openai.py

Each answer is followed by its usage: the tokens of the conversation, and the new ones that were read.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from openai import OpenAI

import zsmerge_llm

DOCUMENT = Path(zsmerge_llm.__file__).parent / "data" / "marigold.txt"
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string", "enum": ["Oslo", "Paris"]}}}
WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather in a city.",
        "parameters": {**PARAMETERS, "required": ["city"]},
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description="Talk to a server with OpenAI's client.")
    parser.add_argument("--url", default="http://localhost:8000/v1")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--file", type=Path, default=DOCUMENT)
    arguments = parser.parse_args()
    client, model = OpenAI(base_url=arguments.url, api_key="none"), arguments.model

    messages: list[Any] = []
    for text in ("What is the capital of France?", "And of Germany?"):
        messages.append({"role": "user", "content": text})
        stream = client.chat.completions.create(
            model=model, messages=messages, max_tokens=64, stream=True, stream_options={"include_usage": True}
        )
        answer = ""
        for event in stream:
            if event.choices and event.choices[0].delta.content:
                answer += event.choices[0].delta.content
            if event.usage:
                show(answer, event.usage)
        messages.append({"role": "assistant", "content": answer})

    asked: list[Any] = [{"role": "user", "content": "What is the weather in Paris?"}]
    called = client.chat.completions.create(
        model=model, messages=asked, tools=[WEATHER], tool_choice="required", parallel_tool_calls=False
    )
    (call,) = called.choices[0].message.tool_calls or []
    city = json.loads(call.function.arguments)["city"]
    print(f"  get_weather({city!r})")
    result = {"role": "tool", "tool_call_id": call.id, "content": f"It is sunny in {city}, 21 degrees."}
    asked += [called.choices[0].message.model_dump(exclude_none=True), result]
    said = client.chat.completions.create(model=model, messages=asked, tools=[WEATHER], tool_choice="none")
    show(said.choices[0].message.content, said.usage)

    text = {"text": arguments.file.read_text(encoding="utf-8")}
    document: Any = client.post("/documents", body=text, cast_to=object)  # PDFs: as a form, to /documents/file
    for text in ("Who is the captain of the Marigold?", "Who is the keeper of the lighthouse?"):
        said = client.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": text}],
            max_tokens=64,
            extra_body={"document_id": document["id"]},
        )
        show(said.choices[0].message.content, said.usage)


def show(text: str | None, usage: Any) -> None:
    """Print an answer and its usage."""
    new = usage.prompt_tokens - usage.prompt_tokens_details.cached_tokens
    print(f"{text}\n  [{usage.prompt_tokens} tokens, {new} of them new]")


if __name__ == "__main__":
    main()
