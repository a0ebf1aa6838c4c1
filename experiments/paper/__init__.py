"""The figures and tables of Zhong et al., DistServe (OSDI 2024, arXiv 2401.09670 v3), simulated beside the published
numbers. `python -m experiments` runs all of them and writes docs/guides/paper.md.

    published   the paper's numbers (experiments/data/paper), its five cases
    systems     what is compared: plans, and the costs each runs on
    living      one simulated run, as arrays; how long it is and what of it counts
    curves      attainment against rate and against the scale of the targets; where it crosses the goal
    lab         a pool of processes, progress, the files written
    plots       how they are drawn
    fig01 ...   one module a figure or table: run(lab) -> what is kept, section(kept) -> its part of the document
    page        the document
"""
