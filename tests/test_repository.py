"""The repository as a stranger finds it: nothing of the machine it was written on, documents that hold together."""

from __future__ import annotations

import re
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# Spelt in pieces, so that this file passes its own test.
MACHINE = re.compile(
    "|".join([r"(?<![\w.~}])/" + "(?:wo" + r"rk|ro" + r"ot|fa" + r"rm|op" + r"t/peers)/", r"/tm" + r"p/\w"])
)
REGISTRY = re.compile(
    r"https?://(?!127\.0\.0\.1|localhost)[\w.-]*(?:pypi|pythonhosted|index|simple|registry|mirror|proxy)[\w.-]*"
)
TEXT = {".py", ".c", ".h", ".md", ".toml", ".txt", ".json", ".csv", ".yml", ".yaml", ".cfg", ""}


def tracked() -> list[Path]:
    """The files git would hand a stranger (also those added but not committed yet)."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    )
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    return [path for name in listed.stdout.splitlines() if (path := ROOT / name).is_file()]


def texts() -> list[tuple[Path, str]]:
    return [(path, path.read_text(encoding="utf-8")) for path in tracked() if path.suffix in TEXT]


def requirements() -> dict[str, list[str]]:
    """Names pyproject.toml asks for, by extra ("" for the package itself), normalised as PEP 503 says."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = {"": project["dependencies"], **project["optional-dependencies"]}
    return {extra: [normal(re.split(r"[\s<>=!~;\[]", line)[0]) for line in lines] for extra, lines in wanted.items()}


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_no_file_speaks_of_the_machine_it_was_written_on() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100]}"
        for path, text in texts()
        for number, line in enumerate(text.splitlines(), 1)
        if MACHINE.search(line) or REGISTRY.search(line)
    ]
    assert not found, "machine paths or registry hosts:\n" + "\n".join(found)


def test_constraints_pin_all_that_is_installed_by_the_makefile() -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in lines), (
        "exact versions only, no local suffix, no path"
    )
    pinned = {normal(line.split("==")[0]) for line in lines}
    wanted = requirements()
    for extra in ("", "dev", "plots"):
        missing = set(wanted[extra]) - pinned
        assert not missing, f"constraints.txt lacks {sorted(missing)} ({extra or 'the package'})"


def test_pins_satisfy_what_pyproject_asks_for() -> None:
    from packaging.requirements import Requirement

    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    versions = {normal(name): version for name, version in pins.items()}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for line in [*project["dependencies"], *project["optional-dependencies"]["dev"]]:
        requirement = Requirement(line)
        assert requirement.specifier.contains(versions[normal(requirement.name)]), line


@pytest.mark.parametrize("command", ["make demo", "make test"])
def test_readme_names_the_two_commands(command: str) -> None:
    assert command in (ROOT / "README.md").read_text()


def test_every_make_target_named_in_the_documents_exists() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {
        (path.name, target)
        for path, text in texts()
        if path.suffix == ".md"
        for target in re.findall(r"(?:^|`)make ([a-z]+)", text, re.MULTILINE)
    }
    unknown = {pair for pair in named if pair[1] not in targets}
    assert not unknown


def test_changelog_has_an_entry_for_this_version() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    changelog = (ROOT / "CHANGELOG.md").read_text()
    entry = re.search(rf"^## {re.escape(version)}.*\n+((?:- .*\n(?:  .*\n)*)+)", changelog, re.MULTILINE)
    assert entry, f"CHANGELOG.md has no entry for {version}"


def test_links_between_documents_resolve() -> None:
    broken = []
    for path, text in texts():
        if path.suffix != ".md":
            continue
        prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
        for target in re.findall(r"\[[^\]]*\]\(([^)\s]+)\)", prose):
            if re.match(r"[a-z]+:", target):
                continue
            name, _, anchor = target.partition("#")
            file = (path.parent / name).resolve() if name else path
            if not file.exists():
                broken.append(f"{path.relative_to(ROOT)}: {target}")
            elif anchor and file.suffix == ".md" and anchor not in anchors(file.read_text()):
                broken.append(f"{path.relative_to(ROOT)}: {target} (no such heading)")
    assert not broken, broken


def anchors(text: str) -> set[str]:
    """GitHub's anchors of a document's headings."""
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_files_named_in_the_documents_exist() -> None:
    """A backticked path that begins with a folder of ours names something that is there."""
    missing = [
        f"{path.relative_to(ROOT)}: {name}"
        for path, text in texts()
        if path.suffix == ".md"
        for name in re.findall(r"`((?:src|tests|docs|benchmarks)/[\w./-]+)`", text)
        if not (ROOT / name).exists()
    ]
    assert not missing, missing
