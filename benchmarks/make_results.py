"""Write benchmarks/RESULTS.md from the JSON files in benchmarks/results: one table a topic.

    python benchmarks/make_results.py [--check]

Every row names the commit, the date and the machine that its file records. --check writes nothing and exits with 1
where RESULTS.md is not what the files give.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
RESULTS = FOLDER / "results"
PAGE = FOLDER / "RESULTS.md"
LENGTHS = ("64", "1024", "4096", "7168", "16384", "32768")
PEER_FIGURES = ("first token, s", "token 32, s", "decoding behind 64", "decoding behind 4096", "reading 4096",
                "8 at once", "beside load")  # fmt: skip
HEAD = """# Measured results

This page is generated from `benchmarks/results/*.json` by `python benchmarks/make_results.py`. Each row names the
commit, the date and the machine of its run. Speeds of shared machines change by a factor of two from minute to minute,
so compare rows of one run only. NLL is the mean negative log-likelihood per token of the gold answer; lower is better.
A gap is the difference to the policy without a gap in the same group, paired over the same questions, with its 95 %
bootstrap interval. What was tried and why is in `docs/research/`.
"""

Row = Sequence[object]
Result = dict[str, Any]


def model_name(result: Result) -> str:
    return {"smollm2": "SmolLM2-135M", "smollm2-135m-instruct": "SmolLM2-135M"}.get(
        result["model"], result["model"].replace("qwen2.5-coder-0.5b-instruct", "Qwen2.5-Coder-0.5B")
    )


def number(value: float | None, digits: int = 0) -> str:
    return "" if value is None else f"{value:,.{digits}f}"


def decoding(result: Result) -> Iterator[Row]:
    for system, rates in result["rates"].items():
        yield model_name(result), system, *(number(rates.get(length), 1) for length in LENGTHS)


def batches(result: Result) -> Iterator[Row]:
    for way, rates in (("one batch", result["batch"]), ("threads", result["rows"])):
        for system, by_rows in rates.items():
            name = system if system.startswith("transformers") else f"zsmerge {system}"
            yield model_name(result), name, way, *(number(by_rows.get(rows), 1) for rows in ("1", "2", "4", "8", "16"))


def prefill(result: Result) -> Iterator[Row]:
    for system, rate in result["reading"].items():
        if rate:
            yield model_name(result), system, number(rate), number(result.get("reading_limit"))


def decoding_details(result: Result) -> Iterator[Row]:
    summary = result["summary"]
    for kind, answers in result["answers"].items():
        yield (
            model_name(result),
            kind,
            number(summary["floor_tokens_per_second"][kind]),
            number(100 * summary["share_of_the_roofline"][kind]),
            f"{answers['with'] / answers['without']:.2f}",
            result["same_as_eager"][kind],
            number(result["weight_bytes"][kind] / 1e6),
        )


def prefill_by_length(result: Result) -> Iterator[Row]:
    for row in result["speed"]:
        rates = (row["transformers"], row["zsmerge"], row["zsmerge_with_probe"])
        yield model_name(result), row["tokens"], *map(number, rates), f"{row['ratio']:.2f}"


def long_prefill(result: Result) -> Iterator[Row]:
    summary = result["summary"]
    growth, share = number(summary["peak_rss_growth_mb"], 1), f"{summary['late_over_early']:.2f}"
    yield model_name(result), result["short"]["tokens"], result["long"]["tokens"], share, growth


def geometry(result: Result) -> Iterator[Row]:
    for kind, lengths in result["measured"].items():
        for length, row in lengths.items():
            yield kind, number(int(length)), number(row["tokens_per_second"], 1), number(row["cache_bytes"] / 1e6)


def weights(result: Result) -> Iterator[Row]:
    for row in result["rows"]:
        ratios = ", ".join(f"{name} {ratio:.4f}" for name, ratio in (row["nll_ratio"] or {}).items())
        sizes = [number(row[key] / 1e6) for key in ("weight_bytes", "private_bytes", "peak_rss_while_loading")]
        yield model_name(result), row["mode"], *sizes, ratios


def grammars(result: Result) -> Iterator[Row]:
    for form, row in result.items():
        if isinstance(row, dict) and "share" in row:
            first, *later = row["begin_ms"]
            yield (
                model_name(result),
                form,
                f"{100 * row['share']:.1f}",
                f"{row['share'] * result['step_ms']:.2f}",
                number(first, 1),
                number(sum(later) / len(later), 1),
            )


def under_load(result: Result) -> Iterator[Row]:
    for condition, row in result["conditions"].items():
        shares = row["share_of_one_quiet_thread"]
        yield condition, *(number(shares[way], 2) for way in ("as chosen", "one thread", "all threads"))


def peers(result: Result) -> Iterator[Row]:
    figures = result["figures"]
    for system in dict.fromkeys(system for systems in figures.values() for system in systems):
        medians = [figures.get(name, {}).get(system, {}).get("median") for name in PEER_FIGURES]
        yield model_name(result), system, *(number(median, 1) for median in medians)


def turns(result: Result) -> Iterator[Row]:
    theirs = {row["turn"]: row for row in result["transformers"]}
    for row in result["zsmerge"]:
        if (turn := row["turn"]) in theirs:
            seconds = (row["first_token_seconds"], theirs[turn]["first_token_seconds"])
            sizes = number(row["prompt_tokens"]), number(row["cache_bytes"] / 1e6, 1), number(row["rss"] / 1e6)
            yield model_name(result), turn, *(f"{each:.2f}" for each in seconds), *sizes


def memory(result: Result) -> Iterator[Row]:
    for kind, lengths in result["bytes"].items():
        for length, row in lengths.items():
            yield model_name(result), kind, number(int(length)), *(number(row[k] / 1e6, 1) for k in ("peak", "cache"))


def planned_memory(result: Result) -> Iterator[Row]:
    for row in result["rows"]:
        kind = ", ".join([row["dtype"], *filter(None, [row["quantization"]]), *["compiled"] * row["compile"]])
        sizes = (number(row[name] / 1e6, 1) for name in ("planned", "measured", "workspace", "loading"))
        yield row["model"], kind, row["slots"], row["chunk"], *sizes, f"{row['planned'] / row['measured']:.3f}"


def restart(result: Result) -> Iterator[Row]:
    seconds = [f"{result[key]:.2f}" for key in ("reading_seconds", "first_load_seconds", "loading_seconds")]
    equal = "yes" if result["logits_bit_equal"] else "no"
    yield model_name(result), number(result["tokens"]), *seconds, number(result["file_bytes"] / 1e6, 1), equal


def long_text_nll(result: Result) -> Iterator[Row]:
    for layout, row in result["reading"].items():
        blocks = dict(zip(row["blocks"], row["nll"], strict=True))
        yield model_name(result), layout, *(number(blocks.get(block), 3) for block in (0, 1, 3, 7, 11, 15))


def long_chats(result: Result) -> Iterator[Row]:
    for name, chat in result["chats"].items():
        for asked in chat.get("asked", ()):
            yield name, chat["slots"], number(asked["tokens"]), f"{asked['right']} of {chat['questions']}"


def host_work(result: Result) -> Iterator[Row]:
    for row in result["turns"]:
        yield (
            result["case"],
            number(row["turn"]),
            number(row["tokens"]),
            *(number(row[key], 1) for key in ("cpu_ms", "clock_ms", "largest_cpu_ms_before")),
        )


def quality(*settings: str) -> Callable[[Result], Iterator[Row]]:
    """Return the rows of the tables of these settings."""

    def rows(result: Result) -> Iterator[Row]:
        for title, table in result["tables"].items():
            task, setting, budget = title.split(" / ")
            for row in table if setting in settings else ():
                gap = row.get("gap")
                yield (
                    result["model"],
                    task,
                    setting,
                    budget,
                    row["policy"],
                    f"{row['n']} ({row['documents']})",
                    number(row["nll"], 2),
                    "" if gap is None else "{:+.2f} [{:+.2f}, {:+.2f}]".format(gap["mean"], *gap["interval"]),
                    number(100 * row["exact"]),
                    ", ".join(f"{100 * row[score]:.1f}" for score in ("rouge1", "rouge2", "rougeL") if score in row),
                    number(row["cache_mb"], 1),
                )

    return rows


def suites(result: Result) -> Iterator[Row]:
    for title, cell in result["cells"].items():
        for name, row in cell.items():
            gaps = {figure: "{:+.2f} [{:+.2f}, {:+.2f}]".format(gap["mean"], *gap["interval"])
                    for figure, gap in row["gaps"].items()}  # fmt: skip
            yield (
                result["model"],
                *title.split(" / "),
                name,
                f"{row['n']} ({row['texts']})",
                number(row.get("score"), 2),
                number(row.get("of_full"), 2),
                gaps.get("score", ""),
                number(row["nll"], 2),
                gaps.get("nll", ""),
                number(row["reading_bytes"] / 1e6),
                number(row["seconds"], 1),
            )


def tool_conversations(result: Result) -> Iterator[Row]:
    for agent, counts in result["agents"].items():
        read_again = sum(count for how, count in counts["reuse"].items() if how == "new" or how.startswith("reread"))
        figures = [counts[name] for name in ("turns", "tool_calls", "leaked", "endless", "informed")]
        yield result["model"], agent, *figures, f"{read_again} of {sum(counts['reuse'].values())}"


def flat(result: Result) -> Iterator[Row]:
    """Yield every figure of a file that has no table of its own, as name and value."""

    def walk(name: str, value: Any) -> Iterator[Row]:
        if isinstance(value, dict):
            for key, each in value.items():
                yield from walk(f"{name}.{key}" if name else key, each)
        elif isinstance(value, int | float | str):
            yield name, f"{value:,.4g}" if isinstance(value, float) else value

    known = ("commit", "date", "machine", "environment")
    yield from walk("", {key: value for key, value in result.items() if key not in known})


def recall(by: str) -> Callable[[Result], Iterator[Row]]:
    """Return what makes the rows of a recall of evidence. by: what they differ in beside data and limit."""

    def rows(result: Result) -> Iterator[Row]:
        for row in result["rows"]:
            yield row["task"], row[by], row["limit"], row["questions"], number(row["recall"], 3), row["tokens"]

    return rows


def whole_documents(result: Result) -> Iterator[Row]:
    for name, row in result["rows"].items():
        scores = [number(row["scores"].get(kind), 2) for kind in WHOLE_DOCUMENT_SCORES]
        costs = [row[part][key] for part in ("document", "question") for key in ("read", "written")]
        yield result["model"], result["tokens"], name, result["questions"], *scores, *costs


WHOLE_DOCUMENT_SCORES = ("list", "order", "count", "summary", "fact")
QUALITY = ("model", "data", "setting", "budget", "policy", "questions (documents)", "NLL", "gap", "exact, %", "ROUGE-1, -2, -L", "cache, MB")  # noqa: E501  # fmt: skip
TOPICS: tuple[tuple[str, str, tuple[str, ...], Callable[[Result], Iterator[Row]]], ...] = (
    ("Decoding, tokens/s by tokens of history", "decode-and-prefill", ("model", "system", *LENGTHS), decoding),
    ("Beside its peers: cold start, then tokens/s of decoding, reading, eight conversations, and beside busy loops",
     "peers", ("model", "system", *PEER_FIGURES), peers),
    ("Decoding several conversations of 4,096 tokens, tokens/s of all together", "decode-and-prefill",
     ("model", "system", "how", "1", "2", "4", "8", "16"), batches),
    ("Decoding: bandwidth, prompt lookup, equality with eager mode", "decode-and-prefill",
     ("model", "format", "limit of weight bandwidth, tokens/s", "share of the roofline at 4,096 tokens, %",
      "prompt lookup over none", "same greedy text as eager", "weights, MB"), decoding_details),
    ("Prefill of 7,168 tokens, tokens/s", "decode-and-prefill",
     ("model", "system", "tokens/s", "limit of bfloat16 GEMM"), prefill),
    ("Prefill by length, tokens/s", "prefill",
     ("model", "tokens", "transformers", "zsmerge", "zsmerge, query probe", "zsmerge over transformers"),
     prefill_by_length),
    ("Prefill of a long text: last chunks over early chunks, growth of peak memory", "prefill",
     ("model", "short, tokens", "long, tokens", "late over early", "growth, MB"), long_prefill),
    ("One layer of LLaMA2-7B's shapes: decoding by history", "kv-cache-geometry",
     ("cache", "tokens of history", "tokens/s", "cache, MB"), geometry),
    ("Quantized weights", "quantized-weights",
     ("model", "weights", "weights, MB", "private memory, MB", "peak RSS while loading, MB", "NLL over bfloat16"),
     weights),
    ("Grammar-constrained decoding", "grammar-overhead",
     ("model", "grammar", "share of a step, %", "ms a token", "first answer, ms", "later answers, ms"), grammars),
    ("SmolLM2-135M decoding beside other programs and in a CPU quota, as a share of one quiet thread", "under-load",
     ("condition", "threads as chosen", "one thread", "as many as PyTorch"), under_load),
    ("A chat of 100 turns: seconds to the first token", "turns",
     ("model", "turn", "zsmerge", "transformers", "prompt tokens", "cache, MB", "RSS, MB"), turns),
    ("Host work of a turn without the model, ms", "host-work",
     ("case", "turn", "tokens of history", "CPU time", "wall time", "largest CPU time before"), host_work),
    ("Peak memory of prefill above the loaded model", "memory",
     ("model", "system", "tokens", "peak, MB", "cache, MB"), memory),
    ("Planned memory against the measured peak of a process", "planned-memory",
     ("model", "weights", "slots", "chunk", "planned, MB", "measured, MB", "workspace of it, MB", "while loading, MB",
      "planned over measured"), planned_memory),
    ("Saved sessions: prefill against loading, seconds", "restart",
     ("model", "tokens", "prefill", "first load", "later loads", "file, MB", "logits bit-equal"), restart),
    ("A book beyond the trained window: NLL of the block that ends at", "endurance",
     ("model", "positions", "4K", "8K", "16K", "32K", "48K", "64K"), long_text_nll),
    ("Long chats: right answers about the system message", "endurance",
     ("chat", "slots", "tokens of history", "right"), long_chats),
    ("Tool conversations of LangChain agents with one middleware or none", "tool-conversations",
     ("model", "agent", "turns", "calls", "answers that repeat the product", "turns without end",
      "answers with all results", "requests that read everything again"), tool_conversations),
    ("Quality: documents read before any question is known", "quality", QUALITY, quality("unknown")),
    ("Quality: a question known with its document, and follow-up questions", "quality", QUALITY,
     quality("known", "followup")),
    ("Quality: chats, asked right after the turn that holds the answer (first) and at the end (later)", "quality",
     QUALITY, quality("first", "later")),
    ("Quality: summaries", "quality", QUALITY, quality("summary")),
    ("Recall of evidence: does the text that is looked up hold the answer?", "evidence-recall",
     ("data", "searched by", "tokens at most", "questions", "recall", "tokens"), recall("search")),
    ("Recall of evidence for questions as prompts and conversations put them", "question-forms",
     ("data", "form", "tokens at most", "questions", "recall", "tokens"), recall("form")),
    ("Questions about whole documents", "whole-documents",
     ("model", "tokens", "contender", "questions", *WHOLE_DOCUMENT_SCORES, "read for the document", "written",
      "read for a question", "written"), whole_documents),
    ("Suites: long texts and conversations", "suite",
     ("model", "suite", "setting", "budget", "contender", "questions (texts)", "score", "of full", "gap", "NLL", "gap",
      "peak, MB", "reading, s"), suites),
)  # fmt: skip


def load(folder: Path = RESULTS) -> dict[str, Result]:
    """Return the runs of all files by name; a file of several runs gives one for each of its labels."""
    runs: dict[str, Result] = {}
    for path in sorted(folder.glob("*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        runs |= {path.stem: result} if "commit" in result else {f"{path.stem}-{key}": result[key] for key in result}
    return runs


def page(folder: Path = RESULTS) -> str:
    """Return RESULTS.md as text."""
    files = load(folder)
    known = {name for name in files for _, start, _, _ in TOPICS if name.startswith(start)}
    parts = [HEAD, *(table(title, columns, rows, files, start) for title, start, columns, rows in TOPICS)]
    parts += [table(name, ("figure", "value"), flat, files, name) for name in files if name not in known]
    return "\n".join(part for part in parts if part)


def table(
    title: str, columns: tuple[str, ...], rows: Callable[[Result], Iterator[Row]], files: dict[str, Result], start: str
) -> str:
    """Return one topic's section: the rows of all files whose name begins with `start`; empty without rows."""
    origin = ("commit", "date", "machine")
    lines = [
        [*row, *(result[key] for key in origin)]
        for name, result in files.items()
        if name.startswith(start)
        for row in rows(result)
    ]
    if not lines:
        return ""
    cells = [[*columns, *origin], ["---"] * (len(columns) + len(origin)), *lines]
    return f"## {title}\n\n" + "".join(f"| {' | '.join(map(str, each))} |\n" for each in cells)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare RESULTS.md with the files instead of writing it")
    if not parser.parse_args().check:
        PAGE.write_text(page(), encoding="utf-8")
    elif PAGE.read_text(encoding="utf-8") != page():
        sys.exit("RESULTS.md is out of date: run python benchmarks/make_results.py")


if __name__ == "__main__":
    main()
