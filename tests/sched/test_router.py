from collections import Counter

import pytest

from distserve.sched.base import Load
from distserve.sched.policy import AdmissionPolicy
from distserve.sched.router import Candidate, Router


def prefill(
    name: str, num_queued_tokens: int = 0, tokens_per_second: float = 1000.0, num_running: int = 0
) -> Candidate:
    return Candidate(name, Load(num_queued_tokens=num_queued_tokens, num_running=num_running), tokens_per_second)


def decode(
    name: str, num_free: int = 100, num_queued: int = 0, num_queued_tokens: int = 0, num_running: int = 0
) -> Candidate:
    load = Load(num_queued, num_queued_tokens, num_running, num_free_blocks=num_free, num_blocks=100, block_size=16)
    return Candidate(name, load)


def test_nobody_there() -> None:
    router = Router()
    assert router.pick_prefill(10, []) is None
    assert router.pick_decode(10, []) is None


class TestPrefill:
    def test_shortest_queue(self) -> None:
        assert Router().pick_prefill(10, [prefill("a", 300), prefill("b", 200), prefill("c", 400)]) == "b"

    def test_shortest_wait_is_not_the_shortest_queue_where_speeds_differ(self) -> None:
        assert Router().pick_prefill(10, [prefill("slow", 300, 500.0), prefill("fast", 500, 2000.0)]) == "fast"

    def test_among_equal_waits_the_one_with_fewer_requests(self) -> None:
        assert Router().pick_prefill(10, [prefill("a", num_running=9), prefill("b", num_running=2)]) == "b"

    def test_equals_take_turns_by_name(self) -> None:
        router = Router()
        picks = [router.pick_prefill(10, [prefill("c"), prefill("a"), prefill("b")]) for _ in range(7)]
        assert picks == ["a", "b", "c", "a", "b", "c", "a"]

    def test_turns_go_on_when_the_last_picked_is_gone(self) -> None:
        router = Router()
        assert router.pick_prefill(10, [prefill("a"), prefill("b"), prefill("c")]) == "a"
        assert router.pick_prefill(10, [prefill("a"), prefill("b"), prefill("c")]) == "b"
        assert router.pick_prefill(10, [prefill("a"), prefill("c")]) == "c"

    def test_a_burst_between_two_reports_is_spread_by_tokens(self) -> None:
        router = Router()
        candidates = [prefill("a", 1000), prefill("b", 0)]
        picks = Counter(router.pick_prefill(100, candidates) for _ in range(30))
        assert picks == {"b": 20, "a": 10}

    def test_a_new_report_is_the_truth_again(self) -> None:
        router = Router()
        a, b = prefill("a"), prefill("b")
        assert [router.pick_prefill(5000, [a, b]) for _ in range(2)] == ["a", "b"]
        reported = prefill("b", 100)
        assert [router.pick_prefill(10, [a, reported]) for _ in range(5)] == ["b"] * 5
        assert router.wait(reported) == pytest.approx(0.15)


class TestDecode:
    def test_most_free_memory(self) -> None:
        assert Router().pick_decode(10, [decode("a", 30), decode("b", 50), decode("c", 40)]) == "b"

    def test_what_waits_there_has_been_promised_memory(self) -> None:
        busy = decode("a", 60, num_queued=4, num_queued_tokens=800)
        assert Router().pick_decode(10, [busy, decode("b", 50)]) == "b"

    def test_among_equals_the_one_with_fewer_requests(self) -> None:
        assert Router().pick_decode(10, [decode("a", num_running=5), decode("b", num_running=3)]) == "b"

    def test_a_burst_between_two_reports_is_spread_by_blocks(self) -> None:
        router = Router()
        candidates = [decode("a", 60), decode("b", 100)]
        picks = Counter(router.pick_decode(64, candidates) for _ in range(30))
        assert picks == {"b": 20, "a": 10}

    def test_one_without_room_is_picked_rather_than_none(self) -> None:
        assert Router().pick_decode(1000, [decode("a", 0)]) == "a"

    def test_its_turns_are_not_those_of_prefill(self) -> None:
        router = Router()
        assert router.pick_prefill(10, [prefill("p1"), prefill("p2")]) == "p1"
        assert router.pick_decode(10, [decode("a"), decode("b")]) == "a"
        assert router.pick_prefill(10, [prefill("p1"), prefill("p2")]) == "p2"


class TestAdmission:
    POLICY = AdmissionPolicy(max_requests=10, max_queued_tokens=5000, max_wait=2.0)

    def test_lets_in_what_will_have_its_turn_in_time(self) -> None:
        admission = Router(self.POLICY).admit(100, [prefill("a", 1900)], num_requests=5, mean_seconds=3.0)
        assert admission.retry_after is None

    def test_refuses_where_even_the_shortest_queue_is_too_long(self) -> None:
        candidates = [prefill("a", 4000, 1000.0), prefill("b", 800, 250.0)]
        admission = Router(self.POLICY).admit(100, candidates, num_requests=5, mean_seconds=3.0)
        assert admission.retry_after == pytest.approx(3.2 - 2.0), "the wait falls by a second each second"
        assert admission.reason == "prompts wait 3.2 s, the limit is 2"

    def test_refuses_where_too_many_tokens_wait(self) -> None:
        candidates = [prefill("a", 2400, 4000.0), prefill("b", 2400, 4000.0)]
        admission = Router(self.POLICY).admit(1000, candidates, num_requests=5, mean_seconds=3.0)
        assert admission.retry_after == pytest.approx(800 / 8000)
        assert admission.reason == "4800 prompt tokens wait, the limit is 5000"

    def test_a_prompt_above_the_limit_is_let_in_when_nothing_waits(self) -> None:
        router = Router(self.POLICY)
        assert router.admit(9000, [prefill("a", 0)], num_requests=0, mean_seconds=3.0).retry_after is None
        admission = router.admit(9000, [prefill("a", 100)], num_requests=1, mean_seconds=3.0)
        assert admission.retry_after == pytest.approx(0.1), "when those 100 are done"

    def test_refuses_where_too_many_requests_are_served(self) -> None:
        admission = Router(self.POLICY).admit(10, [prefill("a")], num_requests=12, mean_seconds=4.0)
        assert admission.retry_after == pytest.approx(3 / (12 / 4.0)), "three must end, at the rate of Little's law"

    def test_the_limit_that_takes_longest_decides(self) -> None:
        admission = Router(self.POLICY).admit(10, [prefill("a", 4000)], num_requests=10, mean_seconds=50.0)
        assert admission.retry_after == pytest.approx(5.0)
        assert "requests are being served" in admission.reason

    def test_counts_what_was_sent_since_the_last_report(self) -> None:
        router = Router(self.POLICY)
        candidates = [prefill("a")]
        admitted = 0
        while router.admit(500, candidates, num_requests=0, mean_seconds=1.0).retry_after is None:
            assert router.pick_prefill(500, candidates) == "a"
            admitted += 1
        assert admitted == 5, "the sixth would wait 2.5 s"

    def test_without_instances_only_the_number_of_requests_counts(self) -> None:
        router = Router(self.POLICY)
        assert router.admit(10, [], num_requests=9, mean_seconds=1.0).retry_after is None
        assert router.admit(10, [], num_requests=10, mean_seconds=1.0).retry_after == pytest.approx(0.1)
