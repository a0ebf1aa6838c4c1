from typing import Any

import pytest

from distserve.sched.policy import AdmissionPolicy, ColocatedPolicy, DecodePolicy, PrefillPolicy


@pytest.mark.parametrize("policy", [PrefillPolicy, DecodePolicy, ColocatedPolicy, AdmissionPolicy])
def test_defaults_are_valid(policy: Any) -> None:
    policy()


@pytest.mark.parametrize(
    ("policy", "arguments", "message"),
    [
        (PrefillPolicy, {"max_batch_tokens": 0}, "max_batch_tokens must be at least 1, not 0: raise it"),
        (PrefillPolicy, {"max_batch_size": -1}, "max_batch_size must be at least 1, not -1"),
        (PrefillPolicy, {"lease": 0.0}, "lease must be above 0 and finite, not 0.0"),
        (PrefillPolicy, {"lease": float("inf")}, "never freed; give the seconds"),
        (PrefillPolicy, {"lease": float("nan")}, "lease must be above 0"),
        (DecodePolicy, {"max_batch_size": 0}, "max_batch_size must be at least 1"),
        (DecodePolicy, {"chunk_tokens": 0}, "chunk_tokens must be at least 1"),
        (DecodePolicy, {"watermark_blocks": -1}, "watermark_blocks must be at least 0"),
        (ColocatedPolicy, {"policy": "random"}, 'must be "chunked" or "prefill-first", not \'random\''),
        (ColocatedPolicy, {"chunk_tokens": 8, "max_batch_size": 9}, "raise chunk_tokens or lower max_batch_size"),
        (AdmissionPolicy, {"max_wait": 0}, "every request would be refused"),
        (AdmissionPolicy, {"max_requests": 0}, "max_requests must be at least 1"),
    ],
)
def test_a_bad_number_is_refused_with_the_cure(policy: Any, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        policy(**arguments)


def test_prefill_first_does_not_look_at_the_chunk() -> None:
    ColocatedPolicy(policy="prefill-first", chunk_tokens=1, max_batch_size=100)
