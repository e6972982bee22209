"""Session files that somebody has made on purpose: every part of one changed, and all checksums made right again."""

from __future__ import annotations

import copy
import hashlib
import json
import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from zsmerge_llm.sessions.file_format import CHECKSUM, FORMAT, METADATA, METADATA_DIGEST, NO_CHECKSUM

WRONG: list[Any] = [
    *(None, True, False, -1, 0, 1, 7, 2**31, 2**62, 10**400, 1.5, -0.5, math.nan, math.inf),
    *("", "x", "../../x", "\ud800", "\x1b[2J", [], [[]], [0], [None], {}, {"a": 1}),
]
"""Put in the place of each fact."""
ABSURD = {
    "F32": [math.nan, math.inf, -math.inf],
    "BF16": [0x7FC0, 0x7F80, 0xFF80],
    "I32": [-2, 2**31 - 1, -(2**31)],
    "U8": [255],
    "BOOL": [2, 255],
}
"""Put in the place of one number of each tensor; for bfloat16 as bits: NaN and both infinities."""
DTYPES = {"F32": np.float32, "BF16": np.uint16, "I32": np.int32, "U8": np.uint8, "BOOL": np.uint8}
CONTENT = ("keys", "values", "score", "cumulative_attention", "residual_keys", "residual_values", "queries", "logits")
"""Tensors whose numbers could as well be others: only a sealed file keeps them from being changed."""


@dataclass(frozen=True)
class Crafted:
    """A file. is_plausible: whether it is what another conversation could have left."""

    name: str
    content: bytes
    is_plausible: bool = False


@dataclass
class Parts:
    """A session file, taken apart. tensors: dtype, shape and bytes by name."""

    facts: Any
    tensors: dict[str, tuple[str, list[Any], bytes]]
    checksum: str = CHECKSUM
    header: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, path: Path) -> Parts:
        content = path.read_bytes()
        size = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + size])
        facts = json.loads(header.pop("__metadata__")[METADATA])
        data = content[8 + size :]
        tensors = {
            name: (each["dtype"], each["shape"], data[slice(*each["data_offsets"])]) for name, each in header.items()
        }
        return cls(facts, tensors)

    def copy(self) -> Parts:
        return Parts(copy.deepcopy(self.facts), dict(self.tensors))

    def array(self, name: str) -> np.ndarray:
        dtype, shape, data = self.tensors[name]
        return np.frombuffer(data, DTYPES[dtype]).reshape(shape).copy()

    def put(self, name: str, array: np.ndarray) -> None:
        self.tensors[name] = (self.tensors[name][0], list(array.shape), np.ascontiguousarray(array).tobytes())

    def write(self, text: str | None = None, entries: Callable[[dict[str, Any]], str] = json.dumps) -> bytes:
        """Return the bytes of the file, with right checksums. text, entries: other JSON of the facts, of the header."""
        text = json.dumps({"format": FORMAT, **self.facts}) if text is None else text
        digest = hashlib.sha256(text.encode(errors="replace")).hexdigest()
        header: dict[str, Any] = {
            "__metadata__": {METADATA: text, METADATA_DIGEST: digest, CHECKSUM: NO_CHECKSUM.decode()}
        }
        end = 0
        for name, (dtype, shape, data) in self.tensors.items():
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + len(data)]}
            end += len(data)
        written = entries({**header, **self.header}).encode()
        written += b" " * (-len(written) % 8)
        data = b"".join(data for *_, data in self.tensors.values())
        return with_checksum(len(written).to_bytes(8, "little") + written + data)


def with_checksum(content: bytes) -> bytes:
    """Return a file with the checksum of its content, however its JSON is spaced."""
    for start in (f'"{CHECKSUM}":"'.encode(), f'"{CHECKSUM}": "'.encode()):
        place = content.find(start) + len(start)
        if place >= len(start):
            plain = content.replace(start, f'"{CHECKSUM}":"'.encode(), 1)
            if plain is not content and len(plain) < len(content):  # the space goes behind the header
                size = int.from_bytes(content[:8], "little")
                plain = plain[: 8 + size - 1] + b" " + plain[8 + size - 1 :]
                place -= 1
            empty = plain[:place] + NO_CHECKSUM + plain[place + 64 :]
            return plain[:place] + hashlib.sha256(empty).hexdigest().encode() + plain[place + 64 :]
    return content


def crafted(path: Path, seed: int = 0) -> Iterator[Crafted]:
    """Yield files made from the session at `path`: in all ways that follow."""
    origin, moment = Parts.of(path), random.Random(seed)
    yield Crafted("unchanged", origin.write(), True)
    for kind in (_facts, _numbers, _tensors, _together, _headers, _cut, _flipped):
        yield from kind(origin, moment)


def _facts(origin: Parts, moment: random.Random) -> Iterator[Crafted]:
    """Every fact is something else, or missing."""
    for place in _places(origin.facts):
        for value in WRONG:
            changed = origin.copy()
            _put(changed.facts, place, value)
            yield Crafted(f"{'.'.join(map(str, place))} = {str(value)[:20]!a}", changed.write())
        changed = origin.copy()
        _put(changed.facts, place, None, delete=True)
        yield Crafted(f"without {'.'.join(map(str, place))}", changed.write())


def _places(facts: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if place:
        yield place
    if isinstance(facts, dict):
        for key, value in facts.items():
            yield from _places(value, (*place, key))
    elif isinstance(facts, list) and facts and not isinstance(facts[0], str):
        yield from _places(facts[0], (*place, 0))


def _put(facts: Any, place: tuple[Any, ...], value: Any, delete: bool = False) -> None:
    for key in place[:-1]:
        facts = facts[key]
    if delete:
        del facts[place[-1]]
    else:
        facts[place[-1]] = value


def _numbers(origin: Parts, moment: random.Random) -> Iterator[Crafted]:
    """One number of a tensor is absurd, or all of them are turned round."""
    for name, (dtype, *_) in origin.tensors.items():
        is_plausible = name.rpartition(".")[2] in (*CONTENT, "document", "tokens", "accumulated_until", "multi_turn")
        for value in ABSURD.get(dtype, []):
            array, changed = origin.array(name), origin.copy()
            array.reshape(-1)[moment.randrange(array.size)] = value
            changed.put(name, array)
            yield Crafted(f"{name} with {value}", changed.write(), name == "document")
        for change in ("zeros", "reversed", "plus one", "half"):
            array, changed = origin.array(name), origin.copy()
            new = {
                "zeros": array * 0,
                "reversed": array.reshape(-1)[::-1].reshape(array.shape),
                "plus one": array + np.ones((), array.dtype),
                "half": (array * 0.5).astype(array.dtype),
            }[change]
            if (new == array).all():
                continue
            changed.put(name, new)
            yield Crafted(f"{name} {change}", changed.write(), is_plausible)


def _tensors(origin: Parts, moment: random.Random) -> Iterator[Crafted]:
    """A tensor has another dtype, shape, name or length, is missing, or there twice."""
    for name, (dtype, shape, data) in origin.tensors.items():
        changes: dict[str, tuple[str, list[Any], bytes] | None] = {
            "missing": None,
            "flat": (dtype, [math.prod(shape)], data),
            "with a dimension more": (dtype, [1, *shape], data),
            "of two rows": (dtype, [2 * shape[0], *shape[1:]], data * 2),
            "of no rows": (dtype, [0, *shape[1:]], b""),
            "without a shape": (dtype, [], data[: len(data) // math.prod(shape)]),
            "of half its length": (dtype, [*shape[:-1], shape[-1] // 2], data[: len(data) // 2]),
            "of 10^18 bytes": (dtype, [10**18], data),
            "of a negative shape": (dtype, [-1, *shape[1:]], data),
            "of broken shape": (dtype, [1.0, *shape[1:]], data),
            "of a shape that is a string": (dtype, ["1"], data),
            "of an unknown dtype": ("F7", shape, data),
            "of no dtype": (None, shape, data),  # type: ignore[dict-item]
        }
        for other in ("F64", "F32", "F16", "BF16", "I64", "I32", "I16", "U8", "BOOL", "F8_E4M3"):
            if other != dtype:
                changes[f"as {other}"] = (other, shape, data)
        for change, tensor in changes.items():
            changed = origin.copy()
            if tensor is None:
                del changed.tensors[name]
            else:
                changed.tensors[name] = tensor
            yield Crafted(f"{name} {change}", changed.write(), change == "missing" and name == "document")
        renamed = origin.copy()
        renamed.tensors["x" + name] = renamed.tensors.pop(name)
        yield Crafted(f"{name} renamed", renamed.write())
    extra = origin.copy()
    extra.tensors["extra"] = ("F32", [4], bytes(16))
    yield Crafted("a tensor more", extra.write())


def _together(origin: Parts, moment: random.Random) -> Iterator[Crafted]:
    """Facts and tensors change together, so that they agree: sizes that the model does not have."""

    def resized(change: Callable[[str, np.ndarray], np.ndarray], **spec: int) -> Parts:
        changed = origin.copy()
        for each in changed.facts["cache"]["specs"]:
            each.update(spec)
        for name in origin.tensors:
            changed.put(name, change(name.partition(".")[2], origin.array(name)))
        return changed

    def slots(capacity: int) -> Callable[[str, np.ndarray], np.ndarray]:
        def change(name: str, array: np.ndarray) -> np.ndarray:
            if name not in ("keys", "values", "multiplicity", "score", "cumulative_attention", "position"):
                return array
            return np.resize(array, (*array.shape[:2], capacity, *array.shape[3:]))

        return change

    heads = origin.facts["cache"]["specs"][0]["kv_heads"]
    per_head = ("keys", "values", "multiplicity", "score", "cumulative_attention", "position", "dropped")
    per_head = (*per_head, "residual_keys", "residual_values")
    yield Crafted("one KV head", resized(lambda n, a: a[:, :1] if n in per_head else a, kv_heads=1).write())
    more = resized(lambda n, a: np.repeat(a, 16, 1) if n in per_head else a, kv_heads=16 * heads)
    yield Crafted("sixteen times the KV heads", more.write())
    for size in (1, 2, 64):
        for dim, names in (("key_dim", ("keys", "residual_keys", "queries")), ("value_dim", ("values",))):
            part = resized(
                lambda n, a, names=names, size=size: np.resize(a, (*a.shape[:-1], size)) if n in names else a,
                **{dim: size},
            )
            yield Crafted(f"{dim} = {size}", part.write())
    for size in (1, 64):
        ring = resized(
            lambda n, a, size=size: np.resize(a, (1, size, *a.shape[2:])) if n == "queries" else a, query_heads=size
        )
        yield Crafted(f"query_heads = {size}", ring.write())
    for capacity in (1, 100, 60_000):
        changed = resized(slots(capacity))
        yield Crafted(f"{capacity} slots, and the configuration as it was", changed.write())
        changed.facts["cache"]["config"]["slots"] = max(capacity - changed.facts["cache"]["config"]["stage"], 1)
        yield Crafted(f"{capacity} slots", changed.write())
        changed.facts["cache"]["num_filled"] = [[capacity]] * len(changed.facts["cache"]["num_filled"])
        yield Crafted(f"{capacity} slots, all used", changed.write())
    for fewer in (1, 2):
        used = min(filled for (filled,) in origin.facts["cache"]["num_filled"])
        yield Crafted(f"{fewer} slots fewer than are used", resized(slots(used - fewer)).write())
    for tokens in (0, 1, 10):
        changed = origin.copy()
        changed.put("tokens", origin.array("tokens")[:tokens])
        changed.facts["tokens"] = tokens
        yield Crafted(f"{tokens} tokens", changed.write())
    for layers in (0, 1):
        changed = origin.copy()
        for name in ("specs", "num_filled"):
            changed.facts["cache"][name] = changed.facts["cache"][name][:layers]
        for name in origin.tensors:
            if name[0].isdigit() and int(name.partition(".")[0]) >= layers:
                del changed.tensors[name]
        yield Crafted(f"{layers} layers", changed.write())
    seen = origin.facts["cache"]["lengths"][0]
    for shift in (-1, 1, 1000, 2**31):
        changed = origin.copy()
        changed.facts["cache"]["lengths"] = [seen + shift]
        yield Crafted(f"{shift} more tokens read", changed.write())
        for index in range(len(origin.facts["cache"]["specs"])):
            changed.put(f"{index}.dropped", origin.array(f"{index}.dropped") + np.float32(shift))
        yield Crafted(f"{shift} more tokens read and dropped", changed.write(), abs(shift) == 1)
    wrong_maps = [[[5, 9.0]], [[5, 5.0], [4, 6.0]], [[10**6, 1.0]], [[4, 4.0], [8, 2.0]], [[8, 2.5]], [[3, -1.0]]]
    for knots in [*wrong_maps, [[1, 1.0]] * 1000, [[8]], [[8, "2"]], [["8", 2.0]], [8, 2.0], {}, [[8, math.nan]]]:
        changed = origin.copy()
        changed.facts["cache"]["position_maps"] = [knots]
        yield Crafted(f"positions {str(knots)[:30]}", changed.write())


def _headers(origin: Parts, moment: random.Random) -> Iterator[Crafted]:
    """The JSON is deep, says things twice, is no JSON, or announces what is not there."""
    whole, deep, number = origin.write(), "[" * 100_000, f'"format": {FORMAT}'
    plain = json.dumps({"format": FORMAT, **origin.facts})
    for name, text in {
        "deep": deep,
        "deep and closed": deep + "]" * 100_000,
        "deep objects": '{"format": 7, "a":' * 5000 + "1" + "}" * 5000,
        "a list": "[]",
        "a number": "6",
        "no format": "{}",
        "null": "null",
        "empty": "",
        "twice a name": plain[:-1] + ', "name": "other"}',
        "twice a fact of the cache": plain.replace('"lengths"', '"lengths": [0], "lengths"', 1),
        "another format": plain.replace(number, '"format": 6'),
        "format as text": plain.replace(number, f'"format": "{FORMAT}"'),
        "a long number": plain.replace(number, f'{number}, "n": ' + "1" * 10_000),
        "no end": plain[:-1],
        "lone surrogates": plain.replace('"name": "', '"name": "\ud800'),
    }.items():
        yield Crafted(f"facts: {name}", origin.write(text))
    for name, entries in {
        "empty": lambda header: "{}",
        "null": lambda header: "null",
        "a list": lambda header: "[]",
        "deep": lambda header: deep,
        "metadata null": lambda header: json.dumps({**header, "__metadata__": None}),
        "metadata a list": lambda header: json.dumps({**header, "__metadata__": []}),
        "metadata of numbers": lambda header: json.dumps({**header, "__metadata__": {METADATA: 1, METADATA_DIGEST: 2}}),
        "tokens null": lambda header: json.dumps({**header, "tokens": None}),
        "tokens a number": lambda header: json.dumps({**header, "tokens": 5}),
        "tokens twice": lambda header: json.dumps(header)[:-1] + ', "tokens": ' + json.dumps(header["tokens"]) + "}",
        "offsets of 10^18": lambda header: json.dumps(
            {**header, "tokens": {**header["tokens"], "data_offsets": [0, 10**18]}}
        ),
        "offsets that overlap": lambda header: json.dumps(
            {**header, "tokens": {**header["tokens"], "data_offsets": [0, 4 * header["tokens"]["shape"][0]]}}
        ),
        "negative offsets": lambda header: json.dumps(
            {**header, "tokens": {**header["tokens"], "data_offsets": [-4, 0]}}
        ),
        "offsets that are text": lambda header: json.dumps(
            {**header, "tokens": {**header["tokens"], "data_offsets": "0"}}
        ),
        "another key": lambda header: json.dumps(header)[:-1] + ', "x": {}}',
    }.items():
        yield Crafted(f"header: {name}", origin.write(entries=entries))
    for size in (0, 1, len(whole), 10**8, 10**18, 2**63, 2**64 - 1):
        yield Crafted(f"a header of {size} bytes", size.to_bytes(8, "little") + whole[8:])
    yield Crafted("more at the end", with_checksum(whole + bytes(64)))
    yield Crafted("no text", whole[:8] + b"\xff\xfe" + whole[10:])
    yield Crafted("zeros", bytes(len(whole)))


def _cut(origin: Parts, moment: random.Random) -> Iterator[Crafted]:
    """The file ends early; checksums are right."""
    whole = origin.write()
    size = 8 + int.from_bytes(whole[:8], "little")
    for end in [*range(0, 12), *(moment.randrange(size) for _ in range(30)), size, size + 1]:
        yield Crafted(f"cut at {end}", with_checksum(whole[:end]))
    for _ in range(20):
        end = moment.randrange(size, len(whole))
        yield Crafted(f"cut at {end}", with_checksum(whole[:end]))


def _flipped(origin: Parts, moment: random.Random) -> Iterator[Crafted]:
    """Some bytes are others; checksums are right."""
    whole = origin.write()
    size = 8 + int.from_bytes(whole[:8], "little")
    for _ in range(60):
        changed = bytearray(whole)
        place = moment.randrange(8, size)
        changed[place] ^= 1 << moment.randrange(8)
        yield Crafted(f"header byte {place} flipped", with_checksum(bytes(changed)))
    text = json.dumps({"format": FORMAT, **origin.facts})
    for _ in range(60):
        place = moment.randrange(len(text))
        letter = chr(moment.randrange(32, 127))
        yield Crafted(f"fact {place} is {letter}", origin.write(text[:place] + letter + text[place + 1 :]), True)
    for _ in range(60):
        changed = bytearray(whole)
        for place in moment.sample(range(size, len(whole)), moment.randrange(1, 20)):
            changed[place] ^= moment.randrange(1, 256)
        yield Crafted(f"bytes flipped at {place}", with_checksum(bytes(changed)), True)
