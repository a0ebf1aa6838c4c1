"""Upstream's simulator under the interpreter and checkout that `benchmarks.simulator --upstream` names: reads a
workload from standard input, [[arrival in seconds, prompt tokens, output tokens], ...], and prints the seconds of
processor time of its event loop, and of that with its tables of requests and latencies. Its own classes do everything,
set up as its simulate_dist.py does; needs simpy, numpy and pandas beside it, nothing of ours.
"""

from __future__ import annotations

import json
import sys
import time

import simpy
from simdistserve.base.organize_data import (
    calculate_per_request_latency,
    organize_request_df,
    organize_request_event_df,
)
from simdistserve.base.scheduler import put_requests_with_interarrivals
from simdistserve.base.worker import WorkerConfig
from simdistserve.base.workload import convert_absolutearrival_to_interarrival, convert_pd_pair_to_request
from simdistserve.clusters.disagg import DisaggCluster
from simdistserve.constants import ModelTypes
from simdistserve.estimators.memory_estimator import get_max_num_tokens

MODEL, PREFILL_TP, DECODE_TP, UNLIMITED = ModelTypes.opt_13b, 2, 1, 10**7


def main() -> None:
    workload = json.load(sys.stdin)
    requests = convert_pd_pair_to_request([(prompt, output) for _, prompt, output in workload])
    gaps = convert_absolutearrival_to_interarrival([arrival for arrival, _, _ in workload])
    environment = simpy.Environment()
    cluster = DisaggCluster(
        env=environment,
        PP_prefill=1,
        PP_decode=1,
        worker_configs=WorkerConfig(
            model_type=MODEL,
            TP=PREFILL_TP,
            TP_Prefill=PREFILL_TP,
            TP_Decode=DECODE_TP,
            prefill_max_batch_size=UNLIMITED,
            decode_max_batch_size=UNLIMITED,
            prefill_max_tokens=get_max_num_tokens(MODEL, PREFILL_TP, 1),
            decode_max_tokens=get_max_num_tokens(MODEL, DECODE_TP, 1),
            enable_chunked_prefill=False,
            engine_type="distserve",
        ),
    )
    began = time.process_time()
    cluster.run()
    put_requests_with_interarrivals(environment, cluster.scheduler, gaps, requests)
    environment.run()
    over = time.process_time() - began
    table = organize_request_df(requests)
    latencies = calculate_per_request_latency(organize_request_event_df(requests), table.output_lens)
    whole = time.process_time() - began
    median = float(latencies["first_token_latency"].median()) / 1e3
    print(json.dumps({"event loop": over, "with post-processing": whole, "ttft_p50": median}))


if __name__ == "__main__":
    main()
