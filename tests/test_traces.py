import gzip
from pathlib import Path

import pytest

from distserve import traces
from distserve.errors import WorkloadError
from distserve.traces import Arrival

AZURE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:17:03.9799600,4808,10
2023-11-16 18:17:04.0319600,3180,8
2023-11-16 18:17:04.0000000,110,0
"""
MOONCAKE = """{"timestamp": 27482, "input_length": 6955, "output_length": 52, "hash_ids": [46, 47]}

{"timestamp": 30535, "input_length": 6472, "output_length": 26, "hash_ids": [46]}
"""


def test_our_csv() -> None:
    trace = traces.parse("arrival,prompt_tokens,output_tokens,app\n0.5,10,3,chat\n0.75,7,1,\n", "f")
    assert trace.arrivals == (Arrival(0.5, 10, 3, "chat"), Arrival(0.75, 7, 1))
    assert trace.timed


def test_a_file_without_arrivals_is_not_timed() -> None:
    trace = traces.parse("output_tokens, prompt_tokens\n3, 10\n", "f")
    assert trace.arrivals == (Arrival(0.0, 10, 3),)
    assert not trace.timed


def test_our_jsonl_and_other_columns() -> None:
    trace = traces.parse('{"arrival": 1, "prompt_tokens": 4, "output_tokens": 2.0, "ttft": null}\n', "f")
    assert trace.arrivals == (Arrival(1.0, 4, 2),)


def test_what_bench_writes_can_be_replayed() -> None:
    text = "arrival,prompt_tokens,output_tokens,ttft,tpot,status\n0.0,10,3,,,refused\n0.125,10,3,0.100000,0.010000,ok\n"
    assert [arrival.arrival for arrival in traces.parse(text, "f").arrivals] == [0.0, 0.125]


def test_a_recording_is_sorted_and_its_unanswered_requests_get_a_length() -> None:
    head = "arrival,prompt_tokens,output_tokens,ttft,tpot,status,max_tokens\n"
    rows = ["1700000003.5,10,30,0.1,0.02,ok,64", "1700000001.25,20,10,0.1,0.02,ok,64", "1700000002.25,7,0,,,refused,64"]
    trace = traces.parse(head + "\n".join([*rows, "1700000004.25,9,0,,,cancelled,5"]), "f")
    assert [(r.prompt_tokens, r.output_tokens) for r in trace.arrivals] == [(20, 10), (7, 20), (10, 30), (9, 5)]
    assert [r.arrival for r in trace.arrivals] == [0.0, 1.0, 2.25, 3.0]
    assert trace.notes == (
        "2 of 4 requests were not answered; they are taken to want the mean of 20 tokens, or as few as they asked for",
    )
    nobody = traces.parse(head + "\n".join(rows[2:]), "f")
    assert [(r.prompt_tokens, r.output_tokens) for r in nobody.arrivals] == [(7, 1)]


def test_mooncake_in_seconds_as_recorded() -> None:
    trace = traces.parse(MOONCAKE, "f")
    assert trace.arrivals == (Arrival(27.482, 6955, 52), Arrival(30.535, 6472, 26))
    assert trace.notes == ()


def test_azure_from_its_first_request_sorted_and_mended() -> None:
    trace = traces.parse(AZURE, "f")
    assert [(r.prompt_tokens, r.output_tokens) for r in trace.arrivals] == [(4808, 10), (110, 1), (3180, 8)]
    assert [r.arrival for r in trace.arrivals] == pytest.approx([0, 0.02004, 0.052], abs=1e-5)
    assert len(trace.notes) == 2


def test_azure_of_2024_names_the_time_zone() -> None:
    text = "TIMESTAMP,ContextTokens,GeneratedTokens\n2024-05-10 00:00:00.5+00:00,1,1\n2024-05-10 00:00:02+00:00,1,1\n"
    assert [r.arrival for r in traces.parse(text, "f").arrivals] == [0.0, 1.5]


@pytest.mark.parametrize("data", [AZURE.encode(), b"\xef\xbb\xbf" + AZURE.encode(), gzip.compress(AZURE.encode())])
def test_files_may_be_gzipped_or_carry_a_byte_order_mark(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "trace").write_bytes(data)
    assert len(traces.read(tmp_path / "trace").arrivals) == 3


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "no requests"),
        ("arrival,prompt_tokens,output_tokens\n", "no requests"),
        ("a,b\n1,2\n", r"columns a, b .*prompt_tokens.*Mooncake.*Azure"),
        ("prompt_tokens,output_tokens\n5,x\n", r"f:2: output_tokens 'x' must be a whole number.*correct the line"),
        ("prompt_tokens,output_tokens\n5,1\n5,nan\n", r"f:3: output_tokens 'nan'"),
        ("prompt_tokens,output_tokens\n5,-1\n", r"f:2: output_tokens '-1'"),
        ("prompt_tokens,output_tokens\n5,1.5\n", r"f:2: output_tokens '1.5'"),
        ("prompt_tokens,output_tokens\n5,inf\n", r"f:2: output_tokens 'inf'"),
        ("prompt_tokens,output_tokens\n0,5\n", r"f:2: prompt_tokens 0 must be at least 1"),
        ("prompt_tokens,output_tokens\n5\n", r"f:2: output_tokens is missing"),
        ("arrival,prompt_tokens,output_tokens\n0,1,1\nnan,1,1\n", r"f:3: arrival 'nan' must be finite"),
        ("arrival,prompt_tokens,output_tokens\n0,1,1\n-1,1,1\n", r"f:3: arrival '-1' must be finite and 0 or more"),
        ("arrival,prompt_tokens,output_tokens\n0,1,1\n,1,1\n", r"f:3: arrival is missing"),
        ("arrival,prompt_tokens,output_tokens\n2,1,1\n1,1,1\n", r"f:3: arrival 1 is before .*2.*sort the file"),
        ('{"prompt_tokens": 1, "output_tokens": true}', r"f:1: output_tokens True"),
        ('{"prompt_tokens": 1, "output_tokens": 1}\nhello', r"f:2: not a JSON object"),
        ('[{"prompt_tokens": 1}]', r"f:1: not a JSON object: write one object a line"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\nyesterday,1,1\n", r"f:2: TIMESTAMP 'yesterday' is no time"),
        ('prompt_tokens,output_tokens\n"5,1\n', r"not CSV"),
    ],
)
def test_a_wrong_file_names_line_value_and_cure(text: str, words: str) -> None:
    with pytest.raises(WorkloadError, match=words) as caught:
        traces.parse(text, "f")
    assert "\n" not in str(caught.value)


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(WorkloadError, match="No such file"):
        traces.read(tmp_path / "none.csv")
    with pytest.raises(WorkloadError, match="Is a directory"):
        traces.read(tmp_path)
    (tmp_path / "cut.gz").write_bytes(gzip.compress(AZURE.encode() * 100)[:60])
    with pytest.raises(WorkloadError, match="damaged gzip"):
        traces.read(tmp_path / "cut.gz")
    (tmp_path / "image").write_bytes(b"\x89PNG\xff\x00")
    with pytest.raises(WorkloadError, match="not a text file"):
        traces.read(tmp_path / "image")
