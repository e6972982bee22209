"""Replies of several replicas as one: lists of what is kept, and figures for Prometheus."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from prometheus_client import generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from zsmerge_llm.server.replicas.pool import Replica

TIERS = ("device", "host", "disk")


def merge_lists(lists: Iterable[Sequence[Mapping[str, Any]]]) -> list[Mapping[str, Any]]:
    """Return the union of several lists of sessions, the most recently used first.

    A session that several replicas know is listed as the one has it that holds it nearest to its model or, where all
    hold it alike, used it last.
    """
    found: dict[str, Mapping[str, Any]] = {}
    for each in (each for listed in lists for each in listed):
        known = found.get(each["id"])
        if known is None or _rank(each) > _rank(known):
            found[each["id"]] = each
    return sorted(found.values(), key=lambda each: -each["used_at"])


def _rank(listed: Mapping[str, Any]) -> tuple[int, int]:
    return -TIERS.index(listed["tier"]), listed["used_at"]


def merge_metrics(texts: Mapping[int, str], replicas: Sequence[Replica]) -> bytes:
    """Return the figures of all replicas, each with the label `replica`, and which of them answer.

    texts: by the number of the replica, in Prometheus' text format.
    """
    return generate_latest(_Merged(texts, replicas))


class _Merged(Collector):
    def __init__(self, texts: Mapping[int, str], replicas: Sequence[Replica]) -> None:
        self._texts = texts
        self._replicas = replicas

    def collect(self) -> Iterator[Metric]:
        merged: dict[str, Metric] = {}
        for number, text in self._texts.items():
            for family in text_string_to_metric_families(text):
                metric = merged.setdefault(family.name, Metric(family.name, family.documentation, family.type))
                metric.samples += [
                    sample._replace(labels={**sample.labels, "replica": str(number)}) for sample in family.samples
                ]
        yield from merged.values()
        answers = GaugeMetricFamily("zsmerge_replica_up", "Whether a replica answers", labels=["replica"])
        restarts = CounterMetricFamily(
            "zsmerge_replica_restarts", "How often a replica was started again", labels=["replica"]
        )
        for replica in self._replicas:
            answers.add_metric([str(replica.number)], replica.answers)
            restarts.add_metric([str(replica.number)], replica.restarts)
        yield answers
        yield restarts
