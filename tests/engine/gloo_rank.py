"""One rank of a test instance whose ranks meet through torch.distributed:

    python -m tests.engine.gloo_rank CHECKPOINT TP PP RANK RENDEZVOUS

The rank where logits come together saves those of a fixed prompt beside the rendezvous.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from tests.engine.ranks import Ranks

from distserve.engine import hub
from distserve.engine.collectives import ProcessGroups
from distserve.engine.parallel import Place, sharding_of

PROMPT = list(range(3, 43))


def main(checkpoint: str, tp: str, pp: str, rank: str, rendezvous: str) -> None:
    spec = hub.read_spec(Path(checkpoint))
    place = Place(sharding_of(spec, int(tp), int(pp)), int(rank))
    links = ProcessGroups(place, torch.device("cpu"), Path(rendezvous))
    own = links.member.index
    total = links.sum_(torch.full((5,), float(own + 1)))
    assert total.tolist() == [sum(range(1, links.member.size + 1))] * 5
    widths = [3, 2, 2][: links.member.size]
    sides = links.gather(torch.full((2, widths[own]), float(own)), widths)
    assert sides.tolist() == ([] if own else [[float(i) for i, n in enumerate(widths) for _ in range(n)]] * 2)
    with Ranks(Path(checkpoint), [(place, links)]) as ranks:
        logits = torch.cat([ranks.logits(PROMPT[:30]), ranks.logits(PROMPT[30:], 30)])
    links.close()
    if place.samples:
        torch.save(logits, f"{rendezvous}.logits")


if __name__ == "__main__":
    main(*sys.argv[1:])
