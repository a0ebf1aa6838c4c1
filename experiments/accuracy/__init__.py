"""Ten real runs on A100 GPUs, imagined: how far the simulator is from them, and why. `python -m experiments.accuracy`
writes docs/accuracy.md and its plots.

    runs       the logs, the plan and the costs of each; a simulated run
    score      real, ours and upstream's side by side; the targets
    evidence   what the mechanisms were seen in: KV room, clocks, micro-batches, left-out runs
    figures    plots
    page       the document
"""
