import dataclasses

import pytest

from distserve.errors import UsageError
from distserve.serve.options import ServeOptions


def test_defaults_hold_and_cannot_be_changed() -> None:
    options = ServeOptions()
    assert (options.host, options.port, options.block_size) == ("127.0.0.1", 8000, 32)
    with pytest.raises(dataclasses.FrozenInstanceError):
        options.port = 1  # type: ignore[misc]


@pytest.mark.parametrize("host", ["0.0.0.0", "::1", "[::1]", "localhost", "node-1.example.org"])
def test_hosts(host: str) -> None:
    assert ServeOptions(host=host).host == host


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"model": " "}, "MODEL is empty"),
        ({"device": "gpu"}, "--device gpu .* auto, cpu, cuda"),
        ({"dtype": "int8"}, "--dtype int8 .* bfloat16"),
        ({"block_size": 33}, "--block-size 33 .* 16, 32, 64"),
        ({"log_level": "loud"}, "--log-level loud"),
        ({"port": 70000}, "--port 70000 .* 65535"),
        ({"port": -1}, "--port -1"),
        ({"host": "http://x"}, "--host 'http://x'"),
        ({"host": ""}, "--host"),
        ({"max_model_len": 0}, "--max-model-len 0 .* at least 1"),
        ({"max_batch_tokens": 0}, "--max-batch-tokens 0"),
        ({"max_queue": 0}, "--max-queue 0"),
        ({"shutdown_timeout": -1.0}, "--shutdown-timeout -1"),
        ({"shutdown_timeout": float("nan")}, "--shutdown-timeout nan"),
        ({"kv_memory": 0.0}, "--kv-memory: 0.0"),
        ({"served_model_names": ("a", "")}, "--served-model-name is empty"),
        ({"api_keys": ("",)}, "--api-key is empty"),
    ],
)
def test_wrong_options_name_themselves_and_the_cure(keys: dict[str, object], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        ServeOptions(**keys)  # type: ignore[arg-type]
