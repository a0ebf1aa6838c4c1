"""vLLM's NixlConnector with a NIXL that waits between two looks for messages. Runs in vLLM's interpreter, not in ours:
`kv_connector_module_path` names it.

NIXL's Python interface sets the pause of its progress thread to 0: the thread asks without end. vLLM starts it in a
worker that is bound to its core already, so it inherits that one core, and takes half of it from the very thread that
computes, with a spin lock between them that either may hold while the other has the core. NIXL rounds the pause up to
whole milliseconds, and a message ends it early.
"""

from __future__ import annotations

import importlib
from typing import Any

_PAUSE = 1000  # microseconds

_bindings: Any = importlib.import_module("nixl._bindings")


class _Config(_bindings.nixlAgentConfig):  # type: ignore[misc]
    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, _PAUSE if name == "pthrDelay" else value)


_bindings.nixlAgentConfig = _Config

NixlConnector = importlib.import_module("vllm.distributed.kv_transfer.kv_connector.v1.nixl").NixlConnector
