"""Answers follow their grammar or schema, whatever the model prefers and however small `max_tokens` is."""

from __future__ import annotations

import json
import re
from functools import cache
from typing import Any

import jsonschema
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support.chat import make_llm
from tests.support.templates import byte_level, sentencepiece
from zsmerge_llm import LLM, SamplingParams
from zsmerge_llm.config import CacheConfig
from zsmerge_llm.engine.engine import Engine
from zsmerge_llm.errors import ConfigError, InputError
from zsmerge_llm.kvcache.cache import Cache
from zsmerge_llm.language.grammar import Grammar, GrammarCompiler

NAMES = ("a", "name", "größe", "名前", "x y", "né/e", 'q"uote')
WORDS = ("", "red", "blau grün", "中文", "🙂", "it's", "a\\b", "tab\t")
PATTERNS = {
    r"^[a-z]{3}-\d{2}$": "abc-12",
    r"^(foo|bar)+$": "foo",
    r"^\+?[1-9][0-9]{0,5}$": "1",
    r"^é*ü$": "ü",
    r"^x*y$": "y",
}


@cache
def model() -> LLM:
    """A random model with a byte-level vocabulary."""
    return make_llm("smollm2", cache=CacheConfig.full())


Pair = tuple[dict[str, Any], Any]  # a schema and a short value for it


def leaves() -> st.SearchStrategy[Pair]:
    words = st.lists(st.sampled_from(WORDS), min_size=1, max_size=4, unique=True)
    bounds = st.tuples(st.integers(-50, 50), st.integers(0, 2000))
    return st.one_of(
        st.just(({"type": "string"}, "")),
        st.integers(1, 6).map(lambda n: ({"type": "string", "minLength": n, "maxLength": n + 3}, "a" * n)),
        st.sampled_from([*PATTERNS.items()]).map(lambda p: ({"type": "string", "pattern": p[0]}, p[1])),
        st.just(({"type": "integer"}, 0)),
        bounds.map(lambda b: ({"type": "integer", "minimum": b[0], "maximum": b[0] + b[1]}, b[0])),
        st.just(({"type": "number"}, 0)),
        st.just(({"type": "boolean"}, True)),
        st.just(({"type": ["string", "null"]}, None)),
        words.map(lambda w: ({"enum": w}, min(w, key=lambda text: len(json.dumps(text))))),
        st.sampled_from(WORDS).map(lambda w: ({"const": w}, w)),
    )


def nodes(children: st.SearchStrategy[Pair]) -> st.SearchStrategy[Pair]:
    fields = st.dictionaries(st.sampled_from(NAMES), st.tuples(children, st.booleans()), min_size=1, max_size=4)
    return st.one_of(
        fields.map(_object),
        st.tuples(children, st.integers(0, 2)).map(
            lambda c: ({"type": "array", "items": c[0][0], "minItems": c[1], "maxItems": 4}, [c[0][1]] * c[1])
        ),
        st.lists(children, min_size=1, max_size=3).map(
            lambda c: ({"anyOf": [schema for schema, _ in c]}, min((v for _, v in c), key=lambda v: len(written(v))))
        ),
    )


def _object(fields: dict[str, tuple[Pair, bool]]) -> Pair:
    schema = {
        "type": "object",
        "properties": {name: pair[0] for name, (pair, _) in fields.items()},
        "required": [name for name, (_, needed) in fields.items() if needed],
    }
    return schema, {name: pair[1] for name, (pair, needed) in fields.items() if needed}


def written(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


SCHEMAS = st.recursive(leaves(), nodes, max_leaves=6).filter(lambda pair: "properties" in pair[0])


@pytest.mark.slow
@given(pair=SCHEMAS, few=st.integers(1, 60), seed=st.integers(0, 9))
@settings(max_examples=100, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
def test_answers_are_valid_under_random_schemas_also_within_few_tokens(pair: Pair, few: int, seed: int) -> None:
    schema, short = pair
    llm = model()
    wanted = {"type": "json_schema", "json_schema": {"name": "it", "schema": schema}}
    for limit in (128, few):
        params = SamplingParams(max_tokens=limit, temperature=1.0, seed=seed)
        result = llm.complete("Say it.", sampling=params, response_format=wanted)
        if llm.count_tokens(written(short)) <= limit or result.finish_reason == "stop":
            jsonschema.validate(json.loads(result.text), schema)
        else:
            assert result.finish_reason == "length"
            assert result.usage.completion_tokens <= limit


def answer(grammar: Grammar, limit: int | None = 64, seed: int = 0, **settings: Any) -> Any:
    params = SamplingParams(max_tokens=limit, temperature=1.0, seed=seed, **settings)
    return model().complete("Say it.", sampling=params, grammar=grammar)


@pytest.mark.parametrize("pattern", [r"yes|no", r"[0-9]{4}-[0-9]{2}-[0-9]{2}", r"(ab)*c", r"[a-zé]+!", r"a/b\?"])
def test_a_regular_expression_is_matched(pattern: str) -> None:
    for seed in range(5):
        assert re.fullmatch(pattern, answer(Grammar.regex(pattern), seed=seed).text)


def test_a_choice_and_a_lark_grammar_are_followed() -> None:
    assert answer(Grammar.choice("red", 'gr"ün', "blau")).text in ("red", 'gr"ün', "blau")
    assert re.fullmatch(r"\((\d,)*\d\)", answer(Grammar.lark('start: "(" (N ",")* N ")"\nN: /[0-9]/')).text)


@pytest.mark.parametrize("text", ["größer", "中文", "🙂🚀", 'a "b" \\ c'])
def test_unicode_is_not_escaped(text: str) -> None:
    assert answer(Grammar.json_schema({"const": text})).text == written(text)


def test_an_answer_under_a_recursive_schema_is_complete_within_max_tokens() -> None:
    tree = {"anyOf": [{"type": "array", "items": {"$ref": "#/$defs/tree"}, "minItems": 1}, {"type": "null"}]}
    schema = {"$ref": "#/$defs/tree", "$defs": {"tree": tree}}
    for limit in (4, 9, 30):
        jsonschema.validate(json.loads(answer(Grammar.json_schema(schema), limit).text), schema)


def test_objects_have_only_the_properties_of_their_schema() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "boolean"}}}
    assert set(json.loads(answer(Grammar.json_schema(schema)).text)) <= {"a", "b"}


def test_a_shortened_answer_has_the_finish_reason_length() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "string", "minLength": 200}}, "required": ["a"]}
    result = answer(Grammar.json_schema(schema), 12)
    assert (result.finish_reason, result.usage.completion_tokens) == ("length", 12)  # nothing valid is that short
    cut = answer(Grammar.json_schema({"type": "string", "minLength": 9}), 12)
    assert (cut.finish_reason, len(json.loads(cut.text)) >= 9) == ("length", True)  # valid, but not all of it


def test_an_answer_that_completes_at_the_last_token_has_the_finish_reason_stop() -> None:
    text = "redgreen"
    assert answer(Grammar.choice(text), model().count_tokens(text)).finish_reason == "stop"


def test_the_end_token_is_counted_only_if_it_is_generated() -> None:
    done = answer(Grammar.choice("yes"))
    assert done.usage.completion_tokens == model().count_tokens("yes")  # nothing can follow: no need to say so
    assert answer(Grammar.regex("(yes)+"), None).usage.completion_tokens % 2 == 0


def test_ignore_eos_does_not_exceed_the_grammar() -> None:
    assert answer(Grammar.regex("a?b"), ignore_eos=True).text in ("b", "ab")


@pytest.mark.parametrize(
    ("grammar", "part"),
    [
        (Grammar.regex("(?=a)b"), "look-around"),
        (Grammar.json_schema({"type": "array", "uniqueItems": True}), "uniqueItems"),
        (Grammar.lark("begin: /a/"), "start"),
        (Grammar.json_schema({"type": "nonsense"}), "nonsense"),
    ],
)
def test_a_grammar_that_cannot_be_enforced_is_refused_before_anything_is_read(grammar: Grammar, part: str) -> None:
    with pytest.raises(InputError, match=part):
        model().stream_complete("Say it.", grammar=grammar)


def test_a_schema_that_is_not_strict_may_have_keywords_that_cannot_be_enforced() -> None:
    described = {"name": "it", "strict": False, "schema": {"type": "array", "uniqueItems": True, "maxItems": 2}}
    result = model().complete("Say it.", response_format={"type": "json_schema", "json_schema": described})
    assert isinstance(json.loads(result.text), list)


def test_a_grammar_with_a_response_format_is_refused() -> None:
    with pytest.raises(ConfigError, match="not both"):
        model().complete("Say it.", grammar=Grammar.regex("a"), response_format={"type": "json_object"})


def test_json_mode_gives_an_object() -> None:
    result = model().complete("Say it.", response_format={"type": "json_object"}, sampling=SamplingParams(max_tokens=9))
    assert isinstance(json.loads(result.text), dict)


def test_forced_tokens_are_read_several_in_a_pass() -> None:
    llm = model()
    engine = llm.engine
    grammar = Grammar.json_schema(
        {"type": "object", "properties": {"größe": {"type": "integer"}}, "required": ["größe"]}
    )
    grammars = GrammarCompiler(llm.tokenizer, engine.vocab_size, engine.stop_ids)
    passes: list[int] = []
    params = SamplingParams(max_tokens=32)
    ids = llm.tokenizer("Say it.")["input_ids"]
    held = engine.new_cache()
    engine.read(held, ids)

    def note(model: torch.nn.Module, inputs: tuple[()], names: dict[str, Any]) -> None:
        passes.append(names["input_ids"].shape[1])

    with engine.model.register_forward_pre_hook(note, with_kwargs=True):
        said = [t for (t,) in engine.decode(held, [params], [ids], constraints=[grammars.constraint(grammar, 32)])]
    json.loads(llm.tokenizer.decode(said))
    assert max(passes) > 3
    assert len(passes) < held.seen - len(ids) <= len(said)
    fresh = engine.read(engine.new_cache(), [*ids, *said][: held.seen])
    torch.testing.assert_close(held.logits[0].float(), fresh, rtol=1e-3, atol=1e-3)


def test_each_row_of_a_batch_follows_its_own_grammar() -> None:
    llm = model()
    engine, grammars = llm.engine, GrammarCompiler(llm.tokenizer, llm.engine.vocab_size, llm.engine.stop_ids)
    forms = [Grammar.regex("[0-9]{3}"), None, Grammar.choice("yes"), Grammar.json_schema({"type": "boolean"})]
    params = [SamplingParams(max_tokens=5, ignore_eos=True)] * len(forms)
    caches = [engine.new_cache() for _ in forms]
    for held in caches:
        engine.read(held, [5, 6, 7])
    alone = [t for (t,) in engine.decode(caches[1].clone(), params[:1], [[]])]
    rows: list[list[int]] = [[] for _ in forms]
    limits = [form and grammars.constraint(form, 5) for form in forms]
    for step in engine.decode(Cache.stack(caches), params, [[]] * len(forms), constraints=limits):
        for row, token in zip(rows, step, strict=True):
            row += [] if token is None else [token]
    texts = [llm.tokenizer.decode(row) for row in rows]
    assert re.fullmatch("[0-9]{3}", texts[0])
    assert rows[1] == alone
    assert texts[2] == "yes"
    assert texts[3] in ("true", "false")
    batch = llm.batch_complete(["a", "b"], grammar=Grammar.regex("x|y"))
    assert {result.text for result in batch} <= {"x", "y"}


@pytest.mark.parametrize("tokenizer", [byte_level(), sentencepiece(), sentencepiece(False)])
def test_all_kinds_of_tokenizers_and_models_with_a_larger_vocabulary_work(tokenizer: Any) -> None:
    size = len(tokenizer) + 37
    grammars = GrammarCompiler(tokenizer, size, [tokenizer.eos_token_id])
    for limit in (None, 40):
        constraint = grammars.constraint(Grammar.json_schema({"const": {"größe": "né 中"}}), limit)
        said: list[int] = []
        while not constraint.done:
            said.append(constraint.accept(int(constraint.mask(torch.zeros(size)).argmax())))
        assert json.loads(tokenizer.decode(said)) == {"größe": "né 中"}


def test_the_engine_refuses_a_wrong_number_of_constraints() -> None:
    engine: Engine = model().engine
    held = engine.new_cache()
    engine.read(held, [5])
    with pytest.raises(InputError):
        next(engine.decode(held, [SamplingParams()], [[]], constraints=[None, None]))
