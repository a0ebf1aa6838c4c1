"""How far the simulator is from real hardware, and why: ten runs on A100 GPUs, and our own server on the machine at
hand. `python -m experiments.accuracy` writes docs/accuracy.md and its plots.

    runs       the logs, the plan and the costs of each; a simulated run
    score      real, ours and upstream's side by side; the targets
    variants   the same with a mechanism left out, arrivals jittered, other parameters
    spans      what the logs say without a simulation: KV, prompt steps, pace
    figures    plots
    page       the document: tables; its sentences are in `words`
    live       its second half: this project's own server, from recorded runs
"""
