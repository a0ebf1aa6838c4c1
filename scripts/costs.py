"""Writes the fits that DistServe's authors published into the costs files that ship, in our format and units.

python scripts/costs.py          writes src/distserve/data/costs/a100-80g*.json
python scripts/costs.py -        prints the names of those that would change

`fits_a100_80g.csv` holds the coefficients in milliseconds, in full: fits `raw` as fitted to measurements (repository
LLMServe/DistServe, Apache-2.0, commit 0ec355c) and `shipped` as the authors' simulator uses them (commit 82831f1,
simdistserve/estimators/profile_data), which scaled DistServe's prefill by 1.1, vLLM's by 1.4, vLLM's decode by 1.2.

What was measured is said by evaluation/0-test-single-forward-performance/main.py there: the batches and lengths below,
as far as they fit into the instance's KV. OPT-66B at tp 8 is not in it. The head of each file (engine, accounting,
note) stays as it is.
"""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path
from typing import Any

from distserve.costs import format

FOLDER = Path(__file__).parent.parent / "src" / "distserve" / "data" / "costs"
FITS = Path(__file__).with_name("fits_a100_80g.csv")

# costs file: whose fits, those of prefill, those of decode
FILES = {
    "a100-80g": ("distserve", "shipped", "shipped"),
    "a100-80g-raw": ("distserve", "raw", "raw"),
    "a100-80g-shipped": ("distserve", "shipped", "shipped"),
    "a100-80g-vllm": ("vllm", "raw", "shipped"),
    "a100-80g-vllm-raw": ("vllm", "raw", "raw"),
    "a100-80g-vllm-shipped": ("vllm", "shipped", "shipped"),
}

BATCHES = (1, 2, 4, 8, 16, 32, 64, 96, 128, 160, 192)
LENGTHS = (4, 8, 16, 32, 48, 64, 96, 128, 192, 256, 284, 512, 768, 1024, 1536, 2020)
KV_TOKENS = {  # most in a measured step, in whole blocks of 16
    ("facebook/opt-13b", "1"): 49152,
    ("facebook/opt-13b", "2"): 98304,
    ("facebook/opt-13b", "4"): 250000,
    ("facebook/opt-66b", "2"): 8192,
    ("facebook/opt-66b", "3"): 36864,
    ("facebook/opt-66b", "4"): 65000,
}


def main() -> None:
    for name in FILES:
        path = FOLDER / f"{name}.json"
        before = path.read_text(encoding="utf-8")
        after = written(name, before)
        if sys.argv[1:] != ["-"]:
            path.write_text(after, encoding="utf-8")
        elif before != after:
            print(name)


def written(name: str, before: str) -> str:
    """The file `name` with its fits written again."""
    return format.text({**json.loads(before), "models": models(*FILES[name])})


def models(engine: str, prefill: str, decode: str) -> dict[str, dict[str, Any]]:
    """By model and tp; seconds."""
    found: dict[str, dict[str, Any]] = {}
    for row in csv.DictReader(FITS.read_text(encoding="utf-8").splitlines()):
        phase, model, tp = row["phase"], row["model"], row["tp"]
        if row["engine"] != engine or row["fits"] != (prefill if phase == "prefill" else decode):
            continue
        entry = found.setdefault(model, {}).setdefault(tp, {"prefill": [], "decode": []})
        begins = [int(row["from_batch"])] if row["from_batch"] else []
        entry[phase].append(begins + [float(f"{float(row[key]) / 1000:.15g}") for key in ("a_ms", "b_ms", "c_ms")])
        if (model, tp) in KV_TOKENS:
            entry["measured_to"] = measured_to(KV_TOKENS[model, tp])
    return found


def measured_to(kv_tokens: int) -> dict[str, int]:
    grid = [(batch, n) for batch in BATCHES for n in LENGTHS if batch * (-(-n // 16) * 16) <= kv_tokens]
    largest = max(batch * n for batch, n in grid)
    return {"prompt_tokens": largest, "batch": max(batch for batch, _ in grid), "context": largest}


if __name__ == "__main__":
    main()
