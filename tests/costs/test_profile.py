"""Costs files: what ships is what was published, what is written is read back, what is wrong is said."""

from __future__ import annotations

import copy
import csv
import json
import math
import runpy
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from distserve.catalogue import model_spec
from distserve.costs import format
from distserve.costs.base import Engine
from distserve.costs.fit import DecodePoint, PromptPoint
from distserve.costs.latency import Host
from distserve.costs.memory import Accounting
from distserve.costs.profile import SHIPPED, Profile
from distserve.errors import PlanError, UsageError

ROOT = Path(__file__).parent.parent.parent
SCRIPT = runpy.run_path(str(ROOT / "scripts" / "costs.py"))
OPT = "facebook/opt-13b"
PROMPTS = [PromptPoint((n,) * k, 0.01 + 1e-4 * n * k + 1e-5 * (n % 7)) for k in (1, 4) for n in (16, 90, 500, 1500)]
DECODES = [DecodePoint(b, b * c, 0.02 + 1e-6 * b * c + 1e-5 * (c % 5)) for b in (1, 8, 64) for c in (17, 300, 900)]
FITTED = format.fitted(PROMPTS, DECODES)


def table(**entry: Any) -> dict[str, Any]:
    """A small file of one model at one tp."""
    return {
        "format": 1,
        "device": "a100-80g",
        "dtype": "float16",
        "date": "2026-11-22",
        "source": "a test",
        "engine": {"decode_step": {"per_step": 0.003}, "block_size": 16},
        "models": {OPT: {"1": copy.deepcopy(entry or FITTED)}},
    }


# -- what ships --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_files_are_what_the_script_writes(name: str) -> None:
    text = (ROOT / "src" / "distserve" / "data" / "costs" / f"{name}.json").read_text(encoding="utf-8")
    assert SCRIPT["written"](name, text) == text, "python scripts/costs.py"
    assert set(SCRIPT["FILES"]) == set(SHIPPED)


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_costs_answer_for_both_models(name: str) -> None:
    profile = Profile.load(name)
    for model, degrees in ((OPT, (1, 2, 4)), ("facebook/opt-66b", (2, 3, 4, 8))):
        costs = profile.costs(model.upper())
        assert costs.degrees() == tuple((tp, None) for tp in degrees)
        for tp in degrees:
            latency = costs.latency(tp, 1)
            assert 0 < latency.decodes(1, 1) < latency.decodes(64, 64 * 500)
            assert latency.knee() in (256, 512, 1024, 2048)


def test_fits_are_the_published_ones() -> None:
    """Milliseconds and tokens there, seconds here: LLMServe/DistServe, commits 0ec355c and 82831f1."""
    found = Profile.load("a100-80g-raw").models[OPT][1]
    assert found.prompts(100, 10_000) * 1000 == pytest.approx(16.456860431694288 + 9.264750660897617 + 0.064747857)
    assert found.decodes(94, 0) * 1000 == pytest.approx(19.934702624895458 + 94 * 0.03850697740828398)
    assert found.decodes(95, 0) * 1000 == pytest.approx(7.1661889468253595 + 95 * 0.15831096191764046)
    shipped = Profile.load("a100-80g-vllm-shipped").models[OPT][1]
    raw = Profile.load("a100-80g-vllm-raw").models[OPT][1]
    assert shipped.prompts(500, 1) == pytest.approx(1.4 * raw.prompts(500, 1))
    assert shipped.decodes(10, 5000) == pytest.approx(1.2 * raw.decodes(10, 5000))


def test_a_fit_that_bends_down_is_kept_and_still_grows() -> None:
    """vLLM's OPT-66B at tp 2 was published with a negative square: right as far as the model's prompts reach."""
    coefficients = Profile.load("a100-80g-vllm").costs("facebook/opt-66b").latency(2, 1).coefficients
    assert coefficients.prefill[0].per_square == pytest.approx(-5.08153476769e-09)
    times = [coefficients.prompts(n, n * n) for n in range(1, 2049)]
    assert times == sorted(times)
    assert times[0] > 0
    pieces = [coefficients.mixed(64, 64 * (2 * p + 64), 8, 4000) for p in range(0, 1984, 64)]
    assert min(pieces) > coefficients.decodes(8, 0)


def test_a_fit_that_gives_shorter_steps_for_prompts_the_model_takes_is_refused() -> None:
    entry = {"prefill": [[0.04, 2.7e-4, -1e-7]], "decode": [[1, 0.02, 0, 0]]}
    profile = Profile.from_dict(table(**entry), "x.json")
    with pytest.raises(PlanError, match="more than 1350 tokens, and the model takes 2048"):
        profile.costs(OPT)


def test_capacity_is_that_of_the_published_table() -> None:
    costs = {name: Profile.load(name).costs(OPT) for name in ("a100-80g", "a100-80g-vllm")}
    published = Path(__file__).with_name("kv_capacity_a100_80g.csv").read_text().splitlines()
    rows = [row for row in csv.DictReader(published) if row["model"] == OPT and (row["tp"], row["pp"]) == ("2", "1")]
    (tokens,) = [int(value) for row in rows for key, value in row.items() if "tokens" in key]
    assert costs["a100-80g"].kv_blocks(2, 1) == tokens // 16
    assert costs["a100-80g-vllm"].kv_blocks(2, 1) < tokens // 16
    with pytest.raises(PlanError, match="opt-66b at tp = 1 and pp = 1 does not fit a100-80g: each device lacks"):
        Profile.load("a100-80g").costs("facebook/opt-66b").kv_blocks(1, 1)


# -- notes -------------------------------------------------------------------------------------------------------------


def test_what_leaves_the_measured_range_is_said() -> None:
    costs = Profile.load("a100-80g").costs(OPT)
    assert costs.notes(10**6, 10**6, 10**6) == [], "nobody asked for a latency yet"
    costs.latency(1, 1)
    costs.latency(2, 2)
    assert costs.notes(49_152, 192, 49_152) == []
    tokens, batch, context = costs.notes(60_000, 193, 100_000)
    assert "60,000 prompt tokens in a step" in tokens
    assert tokens.endswith("measured up to 49,152 at tp = 1")
    assert batch.endswith(
        "193 sequences in a decode step, but the costs a100-80g were measured up to 192 at tp = 1, 192 at tp = 2"
    )
    assert context.endswith("up to 49,152 at tp = 1, 98,304 at tp = 2")


def test_an_unknown_range_is_said() -> None:
    costs = Profile.load("a100-80g").costs("facebook/opt-66b")
    costs.latency(8, 1)
    assert costs.notes(1, 1, 1) == ["nobody says up to what sizes the costs a100-80g were measured at tp = 8"]


def test_costs_that_miss_their_own_points_say_so() -> None:
    found = table()
    found["models"][OPT]["1"]["error"]["decode"]["left_out_mean"] = 0.08
    found["models"][OPT]["1"]["error"]["decode"]["left_out_max"] = 0.3
    costs = Profile.from_dict(found, "mine.json").costs(OPT)
    costs.latency(1, 1)
    (note,) = costs.notes(1, 1, 1)
    assert note == (
        "the costs mine.json at tp = 1 miss decode steps that they have not seen by 8% on average, 30% at worst"
    )


# -- measured points ---------------------------------------------------------------------------------------------------


def test_a_measured_file_is_written_and_read_back(tmp_path: Path) -> None:
    path = tmp_path / "costs.json"
    path.write_text(format.text(table()))
    assert json.loads(path.read_text()) == json.loads(json.dumps(table()))
    profile = Profile.load(path)
    entry = profile.contents.entries[OPT][1, None]
    for point in PROMPTS:
        assert entry.coefficients.prompts(*point.composition(False)) == pytest.approx(point.seconds)
    for step in DECODES:
        assert entry.coefficients.decodes(step.batch, step.context) == pytest.approx(step.seconds)
    assert entry.measured_to == format.Limits(6000, 64, 57_600)
    assert entry.prefill_error is not None
    assert entry.prefill_error.left_out_mean is not None
    costs = profile.costs(OPT)
    assert costs.engine.decode_step == Host(0.003)
    assert costs.latency(1, 1).decodes(8, 2400) == pytest.approx(0.003 + 0.02 + 1e-6 * 2400)


def test_text_has_a_line_for_each_row() -> None:
    lines = format.text(table()).splitlines()
    assert sum("[[" in line for line in lines) == len(PROMPTS)
    assert max(map(len, lines)) < 120


def test_points_alone_are_fitted() -> None:
    alone = {key: FITTED[key] for key in ("prefill_points", "decode_points")}
    found = Profile.from_dict(table(**alone), "x").contents.entries[OPT][1, None]
    whole = Profile.from_dict(table(), "x").contents.entries[OPT][1, None]
    assert found.coefficients == whole.coefficients
    assert found.measured_to == whole.measured_to


def test_a_pipeline_that_was_measured_goes_before_the_division_by_layers() -> None:
    found = table()
    by_degree = found["models"][OPT]
    by_degree["1x2"] = {"prefill": [[0.5, 1e-4, 0]], "decode": [[1, 0.5, 0, 0]]}
    costs = Profile.from_dict(found, "x").costs(OPT)
    assert costs.latency(1, 2).decodes(1, 1) == pytest.approx(0.003 + 0.5)
    assert costs.latency(1, 1).decodes(1, 1) < 0.1
    assert costs.latency(1, 4).pp == 4
    assert costs.degrees() == ((1, None), (1, 2))
    with pytest.raises(
        PlanError, match="do not know tp = 2, pp = 1 of facebook/opt-13b: they know tp = 1, tp = 1, pp = 2"
    ):
        costs.latency(2, 1)


def test_a_device_that_the_catalogue_does_not_know() -> None:
    found = table() | {"device": "cpu", "machine": {"memory": 64 * 2**30, "link_bandwidth": 1e10}}
    costs = Profile.from_dict(found, "x").costs(OPT)
    assert costs.kv_blocks(1, 1) > 0
    assert costs.assumed_cluster(2).intra_node_bandwidth == 1e10
    found["machine"].pop("memory")
    with pytest.raises(PlanError, match=r"the costs x are of the device cpu, .* must say memory"):
        Profile.from_dict(found, "x").costs(OPT)


def test_a_model_that_the_catalogue_does_not_know() -> None:
    found = table()
    found["models"] = {"mine": found["models"][OPT]}
    assert Profile.from_dict(found, "x").costs("mine", spec=model_spec(OPT)).spec == model_spec(OPT)


# -- what is wrong is said ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "device", "words"),
    [
        (
            "Qwen/Qwen3-8B",
            None,
            "a100-80g are for facebook/opt-13b, facebook/opt-66b, not for Qwen/Qwen3-8B: give its own",
        ),
        (OPT, "h100-80g", "a100-80g are of the device a100-80g, not of h100-80g: give its own"),
    ],
)
def test_costs_of_something_else(model: str, device: str | None, words: str) -> None:
    with pytest.raises(PlanError, match=words):
        Profile.load("a100-80g").costs(model, device=device)
    assert Profile.load("a100-80g").costs(OPT, device="A100-80G").name == "a100-80g"


@pytest.mark.parametrize(
    ("name", "words"),
    [("a100-80", "did you mean a100-80g?"), ("mine.json", "give a file, or one of a100-80g, ")],
)
def test_files_that_are_not_there(name: str, words: str) -> None:
    with pytest.raises(UsageError, match="cannot read the costs") as caught:
        Profile.load(name)
    assert words in str(caught.value)


def test_files_that_are_not_json(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(UsageError, match=r"x\.json are not JSON \(.*\): measure again"):
        Profile.load(tmp_path / "x.json")


def at(*path: str | int) -> Callable[[dict[str, Any], Any], None]:
    def put(table: dict[str, Any], value: Any) -> None:
        inner: Any = table
        for key in path[:-1]:
            inner = inner[key]
        if value is ...:
            del inner[path[-1]]
        else:
            inner[path[-1]] = value

    return put


ENTRY = ("models", OPT, "1")
WHERE = f"costs x: models: {OPT}: 1"


@pytest.mark.parametrize(
    ("put", "value", "words"),
    [
        (at("format"), 2, "costs x: format = 2: this version reads 1"),
        (at("format"), True, "format = true"),
        (at("device"), ..., "costs x: the file: device missing"),
        (at("devise"), "a", "costs x: the file: unknown key 'devise': did you mean 'device'?"),
        (at("dtype"), "int4", 'dtype = "int4": must be one of bfloat16'),
        (at("date"), "yesterday", 'date = "yesterday": must be a day such as'),
        (at("date"), "2026-13-01", "date = "),
        (at("note"), 3, "note = 3: must be a string"),
        (at("models"), {}, "models is empty"),
        (at("models"), [], "models is []: must be a JSON object"),
        (at("models", OPT), {}, f"models: {OPT} is empty: give a tp"),
        (at("models", OPT, "tp2"), FITTED, '"tp2" is no parallelism: write tp such as 2'),
        (at("models", OPT, "0"), FITTED, '"0" is no parallelism'),
        (at("machine"), {"memory": 1.5}, "machine: memory = 1.5: must be a whole number, 1 or above"),
        (at("engine", "pol"), 0.1, "engine: unknown key 'pol': did you mean 'poll'?"),
        (at("engine", "poll"), -0.1, "engine: poll = -0.1: must be a finite number, 0 or above"),
        (at("engine", "poll"), math.nan, "engine: poll = NaN: must be a finite number"),
        (at("engine", "poll"), "3 ms", 'engine: poll = "3 ms": must be a finite number'),
        (at("engine", "poll"), 10**400, "engine: poll = 1000"),
        (at("engine", "padded"), 1, "engine: padded = 1: must be true or false"),
        (at("engine", "name"), 1, "engine: name = 1: must be a string"),
        (at("engine", "block_size"), 0, "engine: block_size = 0: must be a whole number, 1 or above"),
        (at("engine", "watermark_blocks"), -1, "watermark_blocks = -1: must be a whole number, 0 or above"),
        (at("engine", "pull_bandwidth"), 0, "engine: pull_bandwidth = 0: must be above 0, or null"),
        (at("engine", "micro_batches"), "odd", "micro_batches = \"odd\": must be one of 'even', 'joined'"),
        (
            at("engine", "decode_step", "per_stp"),
            1,
            "engine: decode_step: unknown key 'per_stp': did you mean 'per_step'?",
        ),
        (at("engine", "decode_step", "per_step"), math.inf, "decode_step: per_step = Infinity"),
        (at("accounting"), {"base": "none"}, 'accounting: base = "none": must be one of own, paper'),
        (at("accounting"), {"block_size": 8}, "block_size belongs to the engine"),
        (at("accounting"), {"activation": -1}, "accounting: activation = -1"),
        (at(*ENTRY), {}, f"{WHERE}: no prefill, and 0 prefill_points: give 3 at least"),
        (at(*ENTRY, "prefil"), [], f"{WHERE}: unknown key 'prefil': did you mean 'prefill'?"),
        (at(*ENTRY, "prefill"), [], f"{WHERE}: prefill = []: must be a list, of one row at least"),
        (at(*ENTRY, "prefill"), [[1, 2]], f"{WHERE}: prefill[1] is [1, 2]: must be [base, per_token, per_square]"),
        (at(*ENTRY, "prefill"), [[-1, 2, 3]], f"{WHERE}: prefill[1]: base = -1: must be a finite number, 0 or above"),
        (at(*ENTRY, "prefill"), [[0, 0, 0]], "prefill[1]: a prompt of one token takes 0.0 seconds: must be above 0"),
        (at(*ENTRY, "prefill"), [[0, 0, math.nan]], "prefill[1]: per_square = NaN: must be a finite number"),
        (at(*ENTRY, "decode"), [[1, 0, 0, 0]], "decode[1]: all parts are 0"),
        (at(*ENTRY, "decode"), [[1, 1, -1e-9, 0]], "decode[1]: per_context = -1e-09"),
        (at(*ENTRY, "decode"), [[2, 1, 1, 1]], "decode begins at batches [2]: the first must be 1"),
        (at(*ENTRY, "decode"), [[1, 1, 1, 1], [1, 1, 1, 1]], "decode begins at batches [1, 1]"),
        (at(*ENTRY, "prefill_points", 0), [5, 0.1], "prefill_points[1]: lengths = 5: must be a list"),
        (at(*ENTRY, "prefill_points", 0), [[], 0.1], "prefill_points[1]: lengths = []: must be a list"),
        (at(*ENTRY, "prefill_points", 0), [[0], 0.1], "prefill_points[1]: lengths = 0: must be a whole number"),
        (at(*ENTRY, "prefill_points", 0), [[5], 0], "prefill_points[1]: seconds = 0: must be above 0"),
        (at(*ENTRY, "decode_points", 1), [8, 7, 0.1], "decode_points[2]: context = 7 of 8 sequences: each has a token"),
        (at(*ENTRY, "decode_points", 1), [8, 70, 100.0], f"{WHERE}: error: decode: mean = "),
        (at(*ENTRY, "decode_points", 1), [8, 70, 1e-9], "the points contradict each other or it"),
        (
            at(*ENTRY, "error", "decode", "mean"),
            0.5,
            "error: decode: mean = 0.5, but its points differ from the formula by",
        ),
        (at(*ENTRY, "error", "decode", "max"), ..., "error: decode: max missing"),
        (at(*ENTRY, "measured_to"), {"batch": 3}, "measured_to: prompt_tokens, context missing"),
        (at(*ENTRY, "mixed_added"), 1.5, f"{WHERE}: mixed_added = 1.5: must be a share, 1 at most"),
        (at(*ENTRY, "mixed_points"), [[0, 5, 2, 1, 0.1]], "mixed_points[1]: context = 1 of 2 sequences"),
        (at(*ENTRY, "mixed_points"), [[0, 5, 2, 9]], "mixed_points[1] is [0, 5, 2, 9]: must be [computed, new, batch"),
        (at("engine"), {"prefill_beside": {"decode": 0.9}}, "prefill_beside: decode = 0.9: must be a finite number, 1"),
        (at("weather"), {"paces": [[0, 1, 1]]}, "weather: span missing"),
        (at("weather"), {"span": 9, "paces": []}, "weather: paces = []: must be a list, of one row at least"),
        (at("weather"), {"span": 9, "paces": [[0, 1]]}, "paces[1] is [0, 1]: must be [at, prompts, decodes]"),
        (at("weather"), {"span": 9, "paces": [[0, 1, 0.1]]}, "paces[1]: decodes = 0.1: must be a finite number, 0.5"),
        (at("weather"), {"span": 9, "paces": [[1, 1, 1]]}, "weather: paces begin at other times than 0"),
        (at("weather"), {"span": 9, "paces": [[0, 1, 1], [9, 1, 1]]}, "span = 9: must be above 9"),
    ],
)
def test_wrong_files_are_refused(put: Callable[[dict[str, Any], Any], None], value: Any, words: str) -> None:
    found = table()
    put(found, value)
    with pytest.raises(UsageError) as caught:
        Profile.from_dict(found, "x")
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


def test_a_machine_that_was_not_steady_is_said() -> None:
    found = table()
    found["weather"] = {"span": 10.0, "paces": [[0.0, 1.0, 1.0], [8.0, 3.0, 2.0]]}
    costs = Profile.from_dict(found, "x").costs(next(iter(found["models"])))
    assert costs.engine.weather.mean == pytest.approx((1.4, 1.2))
    (note,) = [note for note in costs.notes(1, 1, 1) if "steady" in note]
    assert "1.40 times as long as they can, those that decode 1.20 times" in note


def test_the_file_of_the_page_is_read() -> None:
    page = (ROOT / "docs" / "reference" / "costs.md").read_text(encoding="utf-8")
    example = json.loads(page.split("```json\n")[1].split("```")[0])
    costs = Profile.from_dict(example, "costs.json").costs(next(iter(example["models"])))
    assert costs.latency(1, 1).decodes(1, 100) > 0
    for field in (*fields(Engine), *fields(Host), *fields(Accounting)):
        assert f"`{field.name}`" in page, f"docs/reference/costs.md says nothing of {field.name}"
    for name in SHIPPED:
        assert f"`{name}`" in page
