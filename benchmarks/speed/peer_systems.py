"""zsmerge-llm, llama.cpp, transformers and OpenVINO GenAI behind one interface, for `peers`.

Each is used through the API that its users call, greedy, past the end token. A library is imported when its system is
made, so that a process that measures one does not load the others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

SLOTS = 1024
"""Tokens that zsmerge-llm and OpenVINO GenAI keep of a conversation; the others keep all."""
CHUNK = 512
"""Tokens that a pass of llama.cpp, OpenVINO GenAI or continuous batching reads at most, as ours."""
OnToken = Callable[[], bool]
"""Called as soon as a token is there; returns whether to go on."""


@dataclass(frozen=True)
class Setting:
    """What a system is made from.

    source: a model folder, a GGUF file (llama.cpp) or a folder of OpenVINO IR. format: of the weights; only zsmerge-llm
    converts them. context: the most tokens of a conversation. compile: whether zsmerge-llm waits until its decode step
    is compiled and kept for later processes.
    """

    source: str
    format: str
    threads: int
    context: int
    compile: bool = False


class System(Protocol):
    """A loaded model."""

    packages: Sequence[str]

    def __init__(self, setting: Setting) -> None: ...

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text."""

    def answer(self, ids: list[int], tokens: int, on_token: OnToken) -> None:
        """Read a prompt and generate so many tokens, or fewer if `on_token` says so."""

    def answers(self, prompts: list[list[int]], tokens: int) -> int:
        """Answer several prompts of one length at the same time; return how many tokens were generated."""


class ZSMerge:
    """zsmerge-llm: several conversations are threads whose decode steps are batched."""

    packages = ("torch", "transformers")

    def __init__(self, setting: Setting) -> None:
        import torch

        from zsmerge_llm import LLM, CacheConfig, SamplingParams

        torch.set_num_threads(setting.threads)
        quantization = None if setting.format == "bf16" else setting.format
        self.llm = LLM(
            setting.source,
            cache=CacheConfig(slots=SLOTS),
            dtype="bfloat16",
            device="cpu",
            quantization=quantization,
            compile=setting.compile or "auto",
        )
        self.engine = self.llm.engine
        self.sampling = SamplingParams

    def encode(self, text: str) -> list[int]:
        return list(self.llm.tokenizer.encode(text))

    def answer(self, ids: list[int], tokens: int, on_token: OnToken) -> None:
        sampling = self.sampling(max_tokens=tokens, ignore_eos=True, lookup=False)
        for _ in self.engine.stream(self.engine.new_cache(), ids, sampling):
            if not on_token():
                break

    def answers(self, prompts: list[list[int]], tokens: int) -> int:
        with ThreadPoolExecutor(len(prompts)) as pool:
            counts = [TokenCount() for _ in prompts]
            list(pool.map(self.answer, prompts, [tokens] * len(prompts), counts))
        return sum(count.tokens for count in counts)


class TokenCount:
    """Counts tokens; an `OnToken` that never ends the answer."""

    def __init__(self) -> None:
        self.tokens = 0

    def __call__(self) -> bool:
        self.tokens += 1
        return True


class LlamaCpp:
    """llama.cpp by llama-cpp-python. Its class knows one conversation; several go through `llama_decode` as a batch."""

    packages = ("llama-cpp-python",)

    def __init__(self, setting: Setting) -> None:
        from llama_cpp import Llama

        threads = {"n_threads": setting.threads, "n_threads_batch": setting.threads}
        self.llm = Llama(setting.source, n_ctx=setting.context, n_batch=CHUNK, verbose=False, **threads)

    def encode(self, text: str) -> list[int]:
        return list(self.llm.tokenize(text.encode(), add_bos=False))

    def answer(self, ids: list[int], tokens: int, on_token: OnToken) -> None:
        self.llm.reset()  # else a prompt that begins as the one before is not read again
        for number, _ in enumerate(self.llm.generate(ids, temp=0.0), start=1):
            if not on_token() or number == tokens:
                break

    def answers(self, prompts: list[list[int]], tokens: int) -> int:
        import llama_cpp

        rows, length = len(prompts), len(prompts[0])
        params = self.llm.context_params
        params.n_seq_max, params.n_ctx, params.kv_unified = rows, rows * (length + tokens), True
        params.n_batch = params.n_ubatch = CHUNK
        context = llama_cpp.llama_init_from_model(self.llm.model, params)
        batch, sampler = llama_cpp.llama_batch_init(CHUNK, 0, 1), llama_cpp.llama_sampler_init_greedy()

        def decode(entries: list[tuple[int, int, int, bool]]) -> list[int]:
            """Run a pass over (token, position, row, whether to sample); return what is sampled, in order."""
            batch.n_tokens = len(entries)
            for at, (token, position, row, sampled) in enumerate(entries):
                batch.token[at], batch.pos[at], batch.logits[at] = token, position, sampled
                batch.n_seq_id[at], batch.seq_id[at][0] = 1, row
            if llama_cpp.llama_decode(context, batch) != 0:
                raise RuntimeError("llama_decode failed")
            places = [at for at, entry in enumerate(entries) if entry[3]]
            return [llama_cpp.llama_sampler_sample(sampler, context, at) for at in places]

        entries = [
            (token, position, row, position == length - 1)
            for row, prompt in enumerate(prompts)
            for position, token in enumerate(prompt)
        ]
        newest = [token for at in range(0, len(entries), CHUNK) for token in decode(entries[at : at + CHUNK])]
        for step in range(tokens - 1):
            newest = decode([(token, length + step, row, True) for row, token in enumerate(newest)])
        llama_cpp.llama_sampler_free(sampler)
        llama_cpp.llama_batch_free(batch)
        llama_cpp.llama_free(context)
        return rows * tokens


class Transformers:
    """transformers' `generate`, with its default cache and SDPA: several conversations are one batch."""

    packages = ("transformers", "torch")

    def __init__(self, setting: Setting) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

        torch.set_num_threads(setting.threads)
        self.tokenizer = AutoTokenizer.from_pretrained(setting.source)
        self.model = AutoModelForCausalLM.from_pretrained(setting.source, dtype=torch.bfloat16)
        self.model.generation_config = GenerationConfig(do_sample=False, pad_token_id=0)  # no end token

    def encode(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text))

    def answer(self, ids: list[int], tokens: int, on_token: OnToken) -> None:
        self._generate([ids], tokens, stopping_criteria=[self._criterion(on_token)])

    def answers(self, prompts: list[list[int]], tokens: int) -> int:
        return int(self._generate(prompts, tokens)[:, len(prompts[0]) :].numel())

    def _generate(self, prompts: list[list[int]], tokens: int, **options: Any) -> Any:
        import torch

        ids = torch.tensor(prompts)
        mask = torch.ones_like(ids)
        return self.model.generate(ids, attention_mask=mask, max_new_tokens=tokens, **options)

    @staticmethod
    def _criterion(on_token: OnToken) -> Callable[..., Any]:
        import torch

        def ends(ids: Any, scores: Any, **_: Any) -> Any:
            return torch.full((len(ids),), not on_token())

        return ends


class TransformersContinuous(Transformers):
    """transformers' continuous batching, with a KV cache of the size that these conversations need."""

    def answers(self, prompts: list[list[int]], tokens: int) -> int:
        from transformers import ContinuousBatchingConfig

        pages = -(-(len(prompts[0]) + tokens) // 256) * len(prompts)
        config = ContinuousBatchingConfig(num_blocks=pages + 1, max_batch_tokens=CHUNK, allow_block_sharing=False)
        done = self.model.generate_batch(prompts, continuous_batching_config=config, max_new_tokens=tokens)
        if failed := [each.error for each in done.values() if each.error]:
            raise RuntimeError(failed[0])
        return sum(len(each.generated_tokens) for each in done.values())


class OpenVINO:
    """OpenVINO GenAI's continuous batching, with cache eviction. It keeps what it compiled beside the source."""

    packages = ("openvino-genai", "openvino")

    def __init__(self, setting: Setting) -> None:
        import openvino_genai as genai

        eviction = genai.CacheEvictionConfig(32, 128, SLOTS, genai.AggregationMode.NORM_SUM)
        scheduler = genai.SchedulerConfig()
        scheduler.cache_size = 1
        scheduler.max_num_batched_tokens = CHUNK
        scheduler.use_cache_eviction, scheduler.cache_eviction_config = True, eviction
        self.genai = genai
        self.tokenizer = genai.Tokenizer(setting.source)
        self.pipeline = genai.ContinuousBatchingPipeline(
            setting.source,
            self.tokenizer,
            scheduler,
            "CPU",
            INFERENCE_NUM_THREADS=setting.threads,
            CACHE_DIR=str(Path(setting.source) / "compiled"),
        )

    def encode(self, text: str) -> list[int]:
        tokens = self.tokenizer.encode(text, add_special_tokens=False)
        return [int(token) for token in tokens.input_ids.data[0]]

    def answer(self, ids: list[int], tokens: int, on_token: OnToken) -> None:
        status = self.genai.StreamingStatus

        class Streamer(self.genai.StreamerBase):  # type: ignore[misc, name-defined]
            def write(self, written: int | Sequence[int]) -> Any:
                go_on = True
                for _ in range(1 if isinstance(written, int) else len(written)):
                    go_on = on_token()
                return status.RUNNING if go_on else status.STOP

            def end(self) -> None:
                pass

        self._generate([ids], tokens, Streamer())

    def answers(self, prompts: list[list[int]], tokens: int) -> int:
        results = self._generate(prompts, tokens)
        return sum(len(ids) for result in results for ids in result.m_generation_ids)

    def _generate(self, prompts: list[list[int]], tokens: int, *streamer: Any) -> Any:
        import numpy
        import openvino

        config = self.genai.GenerationConfig(max_new_tokens=tokens, ignore_eos=True, do_sample=False)
        tensors = [openvino.Tensor(numpy.array([ids], dtype=numpy.int64)) for ids in prompts]
        return self.pipeline.generate(tensors, [config] * len(tensors), *streamer)


SYSTEMS: dict[str, type[System]] = {
    "zsmerge": ZSMerge,
    "llama.cpp": LlamaCpp,
    "transformers": Transformers,
    "transformers continuous": TransformersContinuous,
    "openvino": OpenVINO,
}


def versions(kind: str) -> dict[str, str]:
    """Return the versions of the packages that a system is made of."""
    return {package: version(package) for package in SYSTEMS[kind].packages}
