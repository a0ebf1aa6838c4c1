"""What a scrape shows: names that vLLM's dashboards know, and a histogram of our own that counts like any other."""

from __future__ import annotations

import random
import re
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from distserve.request import FinishReason
from distserve.serve.telemetry import TPOT, Telemetry


def scrape(telemetry: Telemetry) -> dict[tuple[str, str], float]:
    """Samples by (name, `le` label)."""
    text, kind = telemetry.render()
    assert "text/plain" in kind
    families = text_string_to_metric_families(text.decode())
    return {(s.name, s.labels.get("le", "")): s.value for family in families for s in family.samples}


def test_the_gaps_are_a_histogram_like_any_other() -> None:
    telemetry = Telemetry("model")
    rng = random.Random(1)
    gaps = [rng.choice([*TPOT, rng.random(), 1000.0]) for _ in range(500)]
    for gap in gaps:
        telemetry.gap.observe(gap)
    found = scrape(telemetry)
    name = "vllm:inter_token_latency_seconds"
    for bound in TPOT:
        assert found[f"{name}_bucket", str(float(bound))] == sum(gap <= bound for gap in gaps)
    assert found[f"{name}_bucket", "+Inf"] == found[f"{name}_count", ""] == 500
    assert abs(found[f"{name}_sum", ""] - sum(gaps)) < 1e-6


def test_a_request_that_ended_is_in_every_histogram_of_its_kind() -> None:
    telemetry = Telemetry("model")
    telemetry.observe_end(FinishReason.STOP, num_prompt=10, num_output=5, latency=2.0, after_first=1.0)
    found = scrape(telemetry)
    assert found["vllm:request_time_per_output_token_seconds_sum", ""] == 0.25
    assert found["vllm:e2e_request_latency_seconds_sum", ""] == 2.0
    assert found["vllm:request_prompt_tokens_sum", ""] == 10
    assert found["vllm:request_success_total", ""] == 1


def test_one_token_has_no_time_per_output_token() -> None:
    telemetry = Telemetry("model")
    telemetry.observe_end(FinishReason.LENGTH, num_prompt=10, num_output=1, latency=2.0, after_first=0.0)
    assert scrape(telemetry)["vllm:request_time_per_output_token_seconds_count", ""] == 0


def test_every_metric_is_documented() -> None:
    page = Path("docs/reference/metrics.md").read_text()
    families = text_string_to_metric_families(Telemetry("model").render()[0].decode())
    names = {family.name + ("_total" if family.type == "counter" else "") for family in families}
    named = set(re.findall(r"`((?:vllm|distserve):\w+)", page))
    assert named == names
