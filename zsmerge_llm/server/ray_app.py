"""The server as a Ray Serve application: replicas on the machines of a cluster, requests routed by conversation.

```yaml
applications:
  - name: zsmerge-llm
    import_path: zsmerge_llm.server.ray_app:application
    args: {model: smollm2, replicas: "2", sessions_dir: /shared/chats}
```

Or `serve run zsmerge_llm.server.ray_app:application model=smollm2 replicas=2 sessions_dir=/shared/chats`. Needs the
extra `ray`, and API keys in the variable ZSMERGE_API_KEYS or `insecure=true`.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, MutableMapping
from typing import Any

from ray import serve
from ray.serve import Application
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from zsmerge_llm.errors import ConfigError
from zsmerge_llm.server.replicas.routing import conversation_key
from zsmerge_llm.server.settings import KEYS, ServerSettings, environment_keys, responses_folder

MOST_CONVERSATIONS = 10_000
"""Conversations that Ray knows to be held by one replica."""


@serve.deployment(max_ongoing_requests=256)
class Replica:
    """One `LLM`, and its server without a port: requests and replies are ASGI messages."""

    def __init__(self, model: str, settings: ServerSettings, llm: dict[str, Any]) -> None:
        from zsmerge_llm import LLM
        from zsmerge_llm.server.app import create_app

        loaded = LLM(model, **llm)
        loaded.warm_up()
        self._app = create_app(loaded, settings, loopback_only=False)

    @serve.multiplexed(max_num_models_per_replica=MOST_CONVERSATIONS)
    async def hold(self, key: str) -> str:
        """Let Ray know that this replica holds a conversation."""
        return key

    async def answer(self, scope: MutableMapping[str, Any], body: bytes) -> AsyncIterator[MutableMapping[str, Any]]:
        """Yield the messages of the reply to a request. Where its reader is gone, the answer stops."""
        await self.hold(serve.get_multiplexed_model_id())
        sent: asyncio.Queue[MutableMapping[str, Any]] = asyncio.Queue()
        received: asyncio.Queue[MutableMapping[str, Any]] = asyncio.Queue()
        received.put_nowait({"type": "http.request", "body": body, "more_body": False})
        answering = asyncio.ensure_future(self._app({**scope, "app": self._app}, received.get, sent.put))
        answering.add_done_callback(lambda _: sent.put_nowait({"type": "end"}))
        try:
            while (message := await sent.get())["type"] != "end":
                yield message
        finally:
            received.put_nowait({"type": "http.disconnect"})
            answering.cancel()


@serve.deployment(max_ongoing_requests=1_000, ray_actor_options={"num_cpus": 0})
class Router:
    """Hands each request to the replica that holds its conversation."""

    def __init__(self, replicas: Any) -> None:
        self._replicas = replicas.options(method_name="answer", stream=True)

    async def __call__(self, request: Request) -> Response:
        """Answer a request."""
        body = await request.body()
        try:
            content = json.loads(body)
        except (ValueError, RecursionError):
            content = None
        key = conversation_key(request.url.path, request.query_params, request.headers, content)
        scope = {
            name: request.scope[name] for name in ("type", "method", "path", "raw_path", "query_string", "headers")
        }
        messages = self._replicas.options(multiplexed_model_id=key).remote(scope, body)
        start = await anext(messages)
        headers = {name.decode(): each.decode() for name, each in start["headers"]}
        return StreamingResponse(_bodies(messages), start["status"], headers)


async def _bodies(messages: Any) -> AsyncIterator[bytes]:
    async for message in messages:
        yield message.get("body", b"")


def application(args: dict[str, str]) -> Application:
    """Return the application.

    args: `model`; `replicas`, 1 by default; `sessions_dir`, a folder or an fsspec URL that all machines share;
        `num_gpus` of each replica, 0 by default; `insecure`, "true" to serve everybody without keys; and other settings
        of `LLM` that are text. API keys are those of the variable ZSMERGE_API_KEYS.

    Raises:
        ConfigError: there are no API keys. Ray decides which machines reach its proxies.
    """
    llm: dict[str, Any] = dict(args)
    model, replicas, gpus = llm.pop("model"), int(llm.pop("replicas", 1)), float(llm.pop("num_gpus", 0))
    insecure = str(llm.pop("insecure", False)).lower() == "true"
    kept = responses_folder(llm.get("sessions_dir"))
    settings = ServerSettings(api_keys=tuple(environment_keys()), responses_dir=kept)
    if not (settings.api_keys or insecure):
        raise ConfigError(
            f"Ray's proxies may be reached from other machines, so the application needs API keys: put some into the "
            f"variable {KEYS} (separated by commas), or serve everybody with insecure=true."
        )
    deployed = Replica.options(num_replicas=replicas, ray_actor_options={"num_gpus": gpus})  # type: ignore[attr-defined]
    return Router.bind(deployed.bind(model, settings, llm))  # type: ignore[attr-defined]
