"""Goodput on this machine, measured: the paper's Figures 8 and 9 with real processes and real tokens.
`python -m experiments.live_goodput --costs FILE` measures what its record file lacks and writes docs/goodput.md.

    cases        lengths of chat, code completion and summarisation, with their targets
    contenders   who serves: 1 prefill + 1 decode, 2 colocated (whole prompts, chunked), vLLM twice
    peers        vLLM's CPU build: two replicas, and its own prefill and decode apart
    servers      those of all contenders, up at once
    measuring    in turns, cell after cell, into a file, so that it can be stopped and go on
    neighbours   what was measured directly behind one another
    results      goodput of each from what was measured, and what the planner would have chosen
    same_weather all of ours, simulated, in the weather of every run
    figures      attainment against rate and against the scale of the targets
    page         the document
"""
