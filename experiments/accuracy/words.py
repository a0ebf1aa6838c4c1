"""The sentences of docs/accuracy.md. Figures that depend on a simulation are in the tables between them (`page.py`)."""

from __future__ import annotations

OPENING = """
# Accuracy

*Written by `python -m experiments.accuracy` (`make accuracy`); edit `experiments/accuracy/`, not this file.*

How far is the simulator from real hardware? The authors of DistServe logged every request of a series of runs in
April 2024: OPT-13B with ShareGPT lengths on A100-80GB GPUs, served by their own engine and by vLLM. Ten of these
runs, 4,050 requests, are [carried here](../experiments/data/README.md). Each is simulated with the same arrivals and
the same lengths, its plan as its name says (`c21d12`: prefill tp 2 pp 1, decode tp 1 pp 2; `900-9`: 900 requests at 9
a second; vLLM: one colocated instance, whole prompts first), and with nothing set beside the shipped costs files
`a100-80g` and `a100-80g-vllm`. Upstream is the authors' own simulator (`simdistserve`) on the same arrivals and
lengths.
"""

RUNS = """
Attainment in % of all requests: share that met both targets, (TTFT, TPOT). In brackets the difference from the real
run, in points.
"""

LATENCIES = """
Latencies in milliseconds, in brackets the difference from the real run. Below each table: mean and worst of the
differences.
"""

PLOTS = """
![TTFT of every run: real, ours, and p50 and p90 of upstream's simulator](images/accuracy-ttft.svg)

![TPOT of every run: real, ours, and p50 and p90 of upstream's simulator](images/accuracy-tpot.svg)
"""

MECHANISMS = """
No factor was fitted that stands for "everything else" (the authors' own, 1.1 on DistServe's prefill and 1.2 on vLLM's
decode steps, are kept). Each miss of a simpler model had a mechanism, found in the logs and in the source of the
engine that wrote them, and each is a line of the costs file (`engine`). What each is worth: left out alone, over
DistServe's seven runs.
"""

ROOM = """
**Decode admits by KV room, and what has no room stays where it was computed.** One A100 holds 66,144 tokens of
OPT-13B's KV beside the weights. A request is pulled when its prompt fits; until then its KV occupies prefill memory,
and when that is full no prompt can start. This is what upstream's simulator lacks, and why it misses the p90 of TTFT
in `c21d11-900-9` by a factor of more than forty: nine requests a second are more than one decode GPU can finish,
which nobody who sends a prompt notices for 70 seconds, until both memories are full.

![The saturated run: TTFT over time, and where the KV lies](images/accuracy-saturated.svg)

Decode runs out of room after 23 s; from there on prefill memory fills; when it is full TTFT goes from 0.1 s to 10 s
within a few seconds. The real curve is drawn from the log alone (a request's KV counts from its first token to its
last, its answer growing evenly). What lies above the room of both belongs to preempted requests: upstream's engine
moves their KV to host memory (`swap_out` in `decoding_stage_scheduler.py`), which costs its bytes at 20 GB/s when
they come back. The runs cannot tell this from computing it again: leaving the swap out changes little. It is
simulated because it is what that engine does.
"""

PULLS = """
**A pull stops the decode loop.** Upstream's engine awaits each migration inside the loop that also runs the steps
(`post_process` awaits `_migrate_blocks` in `single_stage_engine.py`), so nobody decodes while KV arrives. A pull
takes 1.3 ms and its bytes at 220 GB/s. Both were read off the distribution of transmission times in the paper's Fig.
10, not fitted to these runs.
"""

HOST = """
**The host takes its time at every step.** A decode step spends 3 ms and 0.1 ms a sequence outside the device: remote
calls to the workers, block tables, detokenizing each token, one event loop for both phases. A prefill step spends 1
ms. A request is known to the scheduler 4 ms after it arrives (HTTP and tokenizer), and an idle instance looks at its
queue every 3 ms (`SLEEP_WHEN_CONTEXT_NO_REQUEST`, `SLEEP_WHEN_DECODING_NO_REQUEST`). Without these the simulator is
far off, as the table says.
"""

PIPELINE = """
**Micro-batches keep their members, and the large one grows.** With two pipeline stages two batches are in flight.
Upstream's scheduler keeps a list for each, and a new request joins the one whose turn it is (`get_next_batch`,
`cur_index`). While the engine waits for the large one, which takes longer, more requests come, and when that one
returns its turn is next: they join it. While it waits for the small one fewer come. So the large one grows, the small
one does not, and the two drift apart:

![Sizes of the two micro-batches in c21d12-800-8](images/accuracy-micro-batches.svg)

Two stages help when both work at once; here one waits for the other. The real run with two decode GPUs at 4 requests
a second has a median TPOT of 42.7 ms; one decode GPU has 38.7 ms at 3 and 53.1 ms at 4.5 requests a second: the
second GPU bought little. Upstream's simulator divides a step by the number of stages, which is the best that could
be, and misses the median TPOT of the two runs with pp 2 by 20 % and 35 %. The hand-over from one stage to the next
takes 2.5 ms. This project's own scheduler splits what runs evenly at every step (`micro_batches = "even"`), which is
why it is an option of the costs file and not a default.

This mechanism remembers everything. Which micro-batch a request joins depends on milliseconds, and so does which one
becomes the large one and by how much. The same runs with every arrival moved by up to 4 ms, five times:
"""

AFTER_JITTER = """
With one stage (`d11`) and with vLLM the answer hardly moves. With two, the median TPOT of a single run of 100 seconds
is a draw from a wide distribution, in the simulator and so surely in the real engine. That the two `d12` runs are met
to about a percent above is partly luck; the spread here is the error to expect of a run like these. Attainment moves
less.
"""

VLLM = """
vLLM's three runs are simulated by the `colocated` instance with `policy = "prefill-first"`. Its mechanisms: prompts
of one step are computed as long as the longest of them (vLLM 0.2.2 and later made rectangular tensors of them); the
KV has less room, because vLLM reserves what a forward pass of 16,384 tokens needs; and the host takes longer than
DistServe's, since engine and worker are Ray actors that send every token id of every request to each other at every
step (`--engine-use-ray --worker-use-ray`). Each left out alone, over the three runs:
"""

PLATEAU = """
The room for KV was read off the log of `vllm-300-3`. From 75 s on requests wait for seconds while the KV of those
that decode stays at about 55,000 tokens, although 66,144 would fit beside the weights. Neither attainment nor the
medians depend much on it, as the table says; the slowest tenth does.
"""

TWO_ENGINES = """
**The three runs were not served alike**, and no single set of parameters meets them all. The logs show it without a
simulation. Prompts that were computed in one step have their first token at the same instant. vLLM 0.2.2 and 0.2.3
refuse to put prompts together whose padding would exceed 256 tokens (`max_paddings`, which the published start script
leaves at its default). `vllm-100-1` and `vllm-300-3` never exceed it; `vllm-200-2` does in most of its shared steps,
by up to more than a thousand tokens. Its steps are slower, too. The last two columns: steps of a single prompt that
began when another prompt's ended, so that their length can be read off directly.
"""

PACE = """
And decoding is slower at equal batches. What a request spends between its first token and its last is made of the
steps it took part in: so many with so many others and so much context, and so many prompt steps between. Least
squares over the two runs that agree, then the real time over that prediction, for all three, by time (in brackets the
mean number of requests that decode together):
"""

AFTER_PACE = """
The two runs agree with one formula from 3 to 58 requests at once. The third is slower from its first second to its
last, at the same batch sizes, most where batches are small, which is how a constant added to each step looks: another
build, other settings or another host. The log does not say which.

So fit each vLLM for itself: the device as the authors measured it, nothing scaled, and a host that takes time for a
request, a prompt step, its tokens, a decode step, its sequences and their context (token ids that are sent). The two
share the last two, 0.225 ms a sequence and 0.26 µs a token of context; the one behind `vllm-200-2` takes 9 ms a
decode step instead of 4, 6 ms and 32 µs a token for a prompt step instead of 5 ms and 17 µs, and 12 ms for a request
instead of 7. Each run with its own, and with the other's:
"""

AFTER_TWO = """
With the host that served it every run is within the targets, attainment and medians; with the other's it is far off.
The mechanisms are the same. These are five numbers fitted on the runs they are shown on, not predictions; they
suggest that most of what the shipped file misses is the difference between two servers. The shipped file splits that
difference (the device's prefill as measured, decode times the authors' 1.2) and errs in both directions. The limit on
padding is not simulated by any of them.
"""

FITTED = """
| parameter | from |
|---|---|
| device: prefill and decode steps by tokens | the authors' offline measurements, as they published them; no run |
| KV room | their formula for the memory; for vLLM the plateau in `vllm-300-3` |
| pull: 1.3 ms, 220 GB/s | the paper's Fig. 10; no run |
| 3 ms polling, batch limits, block size | source and start scripts of the engines; no run |
| decode 3 ms + 0.1 ms a sequence, prefill 1 ms, request 4 ms | fitted on `c21d11-300-3`, `-450-4.5`, `-300-6` |
| hand-over 2.5 ms | fitted on `c21d12-400-4`, `c21d12-800-8` |
| vLLM: host time, which of two device fits | fitted on its three runs |
| nothing | `c21d11-300-9`, `c21d11-900-9`: no parameter has seen them |

So the two runs at 9 requests a second, the ones where decode overflows, are predictions of the parameters, though not
of the mechanisms, which were looked for with all ten in view; vLLM's three were all fitted on. Is the decode host
time of the first line of fitted ones a property of the engine, or of the three runs? Fitted again on a grid (0.5 ms,
0.025 ms; smallest mean error of the requests' TPOT), on all three and with each left out. In each cell the error of
the run's median TPOT and the worst error of its attainment in points; bold: the run was not fitted on.
"""

AFTER_FITS = """
Whichever run is left out, the parameters stay within a step of the grid of the shipped ones, and predict it as well
as those they were fitted on.
"""

NOT_SIMULATED = """
## What is not known

- TPOT of the slowest tenth in `c21d11-300-9`, where decode is just about to overflow, is missed by a third (a small
  difference of load decides how many requests are caught by it); its attainment is not.
- Real runs are single runs. How much a second run of the same would differ is not published, so nobody can say which
  of the differences above are smaller than that.
- All runs are OPT-13B on one kind of GPU. For other models, devices and engines the same mechanisms hold with other
  costs, measured (`distserve profile`) or estimated.
"""
