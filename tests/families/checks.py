"""What becomes of one family: its tiny model on the compressed cache, against transformers with its own cache."""

from __future__ import annotations

import logging
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tests.families.tiny_configs import tiny_config, tiny_text_config
from tests.support.tiny_models import randomized, tokens
from zsmerge_llm.config import CacheConfig
from zsmerge_llm.cpu.decoder_layers import decoder_layers
from zsmerge_llm.cpu.step_capture import capture_step, step_forms
from zsmerge_llm.engine.engine import Engine
from zsmerge_llm.engine.prompt_lookup import MAX_DRAFT_TOKENS
from zsmerge_llm.errors import UnsupportedModelError
from zsmerge_llm.models.loader import read_config
from zsmerge_llm.models.model_classes import generating_class
from zsmerge_llm.sessions.identity import Fingerprint
from zsmerge_llm.sessions.session import Session, Snapshot, load_session

Verdict = Literal["supported", "refused", "fails", "not built"]
PROMPT, NEW, LONG, SLOTS = 45, 6, 300, 64
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Row:
    """What became of a family. exact, compressed, batch, session: whether the check passed; None: not reached.

    step: "compiled", or why a decode step runs as transformers wrote it. reason: of a refusal or a failure.
    """

    family: str
    model: str
    kind: str
    verdict: Verdict
    exact: bool | None = None
    compressed: bool | None = None
    batch: bool | None = None
    session: bool | None = None
    step: str = ""
    reason: str = ""


def tiny_model(config: Any, seed: int = 0) -> PreTrainedModel:
    """Return a random model in float32 whose attention is far from uniform."""
    torch.manual_seed(seed)
    kind = generating_class(config)
    return randomized(kind.from_config(config, dtype=torch.float32, attn_implementation="eager").eval())


def check_family(family: str) -> Row:
    """Build a family's tiny model and try everything a user relies on."""
    try:
        model, expected = generating_model(family)
    except UnsupportedModelError as error:
        return Row(family, "", "", "refused", reason=str(error))
    except Exception as error:  # whatever a config of defaults makes of transformers
        return Row(family, "", "", "not built", reason=f"needs more: {_first_line(error)}")
    row = Row(family, type(model).__name__, describe(model), "supported")
    try:
        engine = Engine(model, compile=False)
        if engine.layers.recurrent and not {"linear", "conv"} & set(row.kind.split()):
            row = replace(row, kind=f"{row.kind}, recurrent")
        engine.close()
    except UnsupportedModelError as error:
        return replace(row, verdict="refused", reason=str(error))
    except Exception as error:
        return replace(row, verdict="fails", reason=f"engine: {_first_line(error)}")
    if expected is None:
        return replace(row, verdict="not built", reason="needs more: it generates nothing from text alone")
    for name, check in CHECKS.items():
        try:
            check(model, expected)
        except UnsupportedModelError as error:
            return replace(row, verdict="refused", reason=str(error))
        except Exception as error:
            return replace(row, **{name: False}, verdict="fails", reason=f"{name}: {_first_line(error)}")
        row = replace(row, **{name: True})
    return replace(row, step=step_kind(model))


def generating_model(family: str) -> tuple[PreTrainedModel, Expected | None]:
    """Return a tiny model and what it generates; its language model alone where the whole needs more than text.

    Where neither generates, the whole model, or else the language model, and None.

    Raises:
        UnsupportedModelError: neither can be made, and a folder with this config is refused.
    """
    built: list[PreTrainedModel] = []
    errors: list[Exception] = []
    for config in (tiny_config, tiny_text_config):
        try:
            built.append(tiny_model(config(family)))
            return built[-1], Expected(built[-1])
        except Exception as error:
            errors.append(error)
    if not built:
        with tempfile.TemporaryDirectory() as folder:
            tiny_config(family).save_pretrained(folder)
            read_config(Path(folder), family)
        raise errors[0]
    return built[0], None


class Expected:
    """Logits of transformers' own generation, with its own cache: greedy, float32 [NEW, vocab], and its tokens."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.prompt = tokens(PROMPT)
        ids = torch.tensor([self.prompt])
        with torch.inference_mode():
            found: Any = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=NEW,
                min_new_tokens=NEW,
                do_sample=False,
                output_logits=True,
                return_dict_in_generate=True,
            )
        self.tokens: list[int] = found.sequences[0, PROMPT:].tolist()
        self.logits = torch.cat(found.logits).float()
        if not torch.isfinite(self.logits).all():
            raise ValueError("its logits are not finite")


def check_exact(model: PreTrainedModel, expected: Expected) -> None:
    """While all fits, logits equal transformers', whatever the chunk, and so they do token by token."""
    for config, chunk in ((CacheConfig.full(), 64), (CacheConfig(slots=SLOTS, recent=8, stage=4), 7)):
        engine = Engine(model, config, chunk=chunk, compile=False)
        cache = engine.new_cache()
        found = [engine.read(cache, expected.prompt)]
        found += [engine.read(cache, [token]) for token in expected.tokens[:-1]]
        engine.close()
        _assert_close(torch.stack(found), expected.logits, f"chunks of {chunk}")


def check_compressed(model: PreTrainedModel, expected: Expected) -> None:
    """Far more tokens than slots are read in constant memory."""
    engine = Engine(model, CacheConfig(slots=SLOTS, recent=8, stage=4), chunk=32, compile=False)
    cache = engine.new_cache()
    engine.read(cache, tokens(LONG // 2))
    nbytes = cache.nbytes
    logits = engine.read(cache, tokens(LONG // 2, seed=1))
    engine.close()
    assert cache.nbytes == nbytes, f"memory grows from {nbytes} to {cache.nbytes} bytes"
    assert torch.isfinite(logits).all(), "logits are not finite"


def check_batch(model: PreTrainedModel, expected: Expected) -> None:
    """The rows of a padded batch are read as each is alone."""
    engine = Engine(model, CacheConfig(slots=SLOTS, recent=8, stage=4), chunk=32, compile=False)
    rows = [tokens(length, seed=length) for length in (5, 41, 90)]
    cache = engine.new_cache(rows=len(rows))
    engine.read_batch(cache, rows)
    together = engine.read_batch(cache, [[7], [8], [9]])
    alone = []
    for row, token in zip(rows, (7, 8, 9), strict=True):
        own = engine.new_cache()
        engine.read(own, row)
        alone.append(engine.read(own, [token]))
    engine.close()
    _assert_close(together, torch.stack(alone), "rows of a batch")


def check_session(model: PreTrainedModel, expected: Expected) -> None:
    """A cache that was saved and loaded gives the same next logits, bit for bit."""
    engine = Engine(model, CacheConfig(slots=SLOTS, recent=8, stage=4), chunk=32, compile=False)
    cache = engine.new_cache()
    engine.read(cache, tokens(100))
    snapshot = Snapshot("0" * 64, 1, tokens(100), cache.clone(), "answer")
    session = Session("it", Fingerprint("", "", "", ""), snapshots={snapshot.digest: snapshot})
    session.prefix_digests = ("1" * 64, snapshot.digest)
    with tempfile.TemporaryDirectory() as folder:
        again = load_session(session.save(Path(folder) / "it")).cache.clone()
    own, loaded = engine.read(cache, tokens(20, seed=2)), engine.read(again, tokens(20, seed=2))
    engine.close()
    assert torch.equal(own, loaded), "logits differ after loading"


CHECKS = {"exact": check_exact, "compressed": check_compressed, "batch": check_batch, "session": check_session}


def step_kind(model: PreTrainedModel) -> str:
    """Return "compiled" where a decode step's layers can be exported, else why they run as transformers wrote them."""
    engine = Engine(model, CacheConfig.full(), compile=False)
    try:
        layers = decoder_layers(model, len(engine.specs))
        for form in step_forms(MAX_DRAFT_TOKENS):
            capture_step(model, layers, form)
    except UnsupportedModelError as error:
        return f"eager: {error}"
    finally:
        engine.close()
    return "compiled"


def describe(model: PreTrainedModel) -> str:
    """Name what is special about an architecture, from its configuration."""
    config = model.config.get_text_config()
    settings = config.to_dict()
    kinds = [kind.replace("_attention", "") for kind in dict.fromkeys(settings.get("layer_types") or ())]
    if not kinds:
        kinds = ["sliding" if settings.get("sliding_window") else "full"]
    found = [" + ".join(kinds)]
    given = {name for name, value in settings.items() if value}
    if given & {"num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"}:
        found.append("experts")
    if "kv_lora_rank" in given:
        found.append("latent keys")
    if any("sinks" in name for name, _ in model.named_parameters()):
        found.append("sinks")
    if "mrope_section" in str(settings.get("rope_parameters")):
        found.append("M-RoPE")
    if "num_kv_shared_layers" in given:
        found.append("shared KV")
    if "alibi" in given:
        found.append("ALiBi")
    return ", ".join(found)


@contextmanager
def quiet() -> Iterator[None]:
    """Silence what transformers says about configurations that nobody has trained."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _assert_close(found: Tensor, wanted: Tensor, what: str) -> None:
    off = float((found - wanted).abs().max() / wanted.abs().max().clamp(min=1))
    assert off <= TOLERANCE, f"{what}: logits are off by {off:.2g} of the largest"


def _first_line(error: BaseException) -> str:
    """Return what an error says in a line; where it wraps another one, the last line says more."""
    lines = str(error).strip().splitlines() or [""]
    text = lines[-1].strip() if lines[0].endswith(":") else lines[0]
    return text if isinstance(error, AssertionError) else f"{type(error).__name__}: {text}"
