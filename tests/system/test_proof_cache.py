"""The cache of proven facts: each is proven once and after any change, and none can be forged."""

import hashlib
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from retrieval.system import proof_cache

CONTENT = b"weights" * 1000
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of facts, which is not there yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "faceprint" / "proofs"


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files that were written just now count as settled."""
    monkeypatch.setattr(proof_cache, "_SETTLED_NANOSECONDS", -(10**12))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    path.write_bytes(CONTENT)
    return path


def load(
    path: Path, sha256: str = SHA256, *, checked: proof_cache.Fact = ("rules", 1)
) -> tuple[str, list[bytes]]:
    """Whether bytes or a path were used, and which bytes were checked."""
    seen: list[bytes] = []
    used = proof_cache.load(
        path,
        sha256,
        check=seen.append,
        checked=checked,
        use=lambda given: "bytes" if isinstance(given, bytes) else "path",
        most=10**6,
    )
    return used, seen


def test_a_file_is_read_and_checked_once(cache: Path, settled: None, file: Path) -> None:
    assert load(file) == ("bytes", [CONTENT])
    assert load(file) == ("path", [])


def test_a_fact_says_nothing_of_other_rules_or_another_sum(cache: Path, settled: None, file: Path) -> None:
    load(file)
    assert load(file, checked=("rules", 2)) == ("bytes", [CONTENT])
    with pytest.raises(proof_cache.NotTheFile):
        load(file, hashlib.sha256(b"other").hexdigest())


def replaced(path: Path) -> None:
    other = path.with_name("other")
    other.write_bytes(CONTENT)
    os.replace(other, path)


def written(path: Path) -> None:
    times = path.stat()
    path.write_bytes(CONTENT[::-1])
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def test_a_replaced_file_is_proven_again(cache: Path, settled: None, file: Path) -> None:
    load(file)
    replaced(file)
    assert load(file) == ("bytes", [CONTENT])


def test_a_file_that_was_written_is_noticed_though_its_size_and_time_are_put_back(
    cache: Path, settled: None, file: Path
) -> None:
    load(file)
    written(file)
    with pytest.raises(proof_cache.NotTheFile):
        load(file)


def test_a_file_that_changes_while_it_is_loaded_is_read_again(cache: Path, settled: None, file: Path) -> None:
    load(file)
    used: list[object] = []

    def use(given: Path | bytes) -> None:
        used.append(given)
        if isinstance(given, Path):
            replaced(file)

    proof_cache.load(file, SHA256, check=lambda data: None, checked=("rules", 1), use=use, most=10**6)
    assert used == [file, CONTENT]


def test_no_fact_is_stored_about_a_file_that_was_changed_just_now(cache: Path, file: Path) -> None:
    os.utime(file, ns=(time.time_ns(), time.time_ns()))
    assert load(file) == load(file) == ("bytes", [CONTENT])
    assert not cache.exists()


def test_a_file_that_is_too_large_or_no_file_is_refused(cache: Path, file: Path, tmp_path: Path) -> None:
    with open(file, "ab") as opened:
        opened.truncate(10**6 + 1)
    os.mkfifo(tmp_path / "pipe")
    for path in (file, tmp_path / "pipe"):
        with pytest.raises(proof_cache.NotTheFile):
            load(path)


def test_facts_are_empty_files_that_only_their_user_can_write(cache: Path, settled: None, file: Path) -> None:
    load(file)
    (fact,) = cache.iterdir()
    assert (fact.stat().st_size, fact.stat().st_mode & 0o777) == (0, 0o600)
    assert cache.stat().st_mode & 0o777 == 0o700
    assert len(fact.name) == 64


def open_to_others(folder: Path) -> None:
    folder.chmod(0o777)


def a_link(folder: Path) -> None:
    folder.rename(folder.with_name("elsewhere"))
    folder.symlink_to(folder.with_name("elsewhere"))


def a_file(folder: Path) -> None:
    for fact in folder.iterdir():
        fact.unlink()
    folder.rmdir()
    folder.write_text("")


@pytest.mark.parametrize("spoil", [open_to_others, a_link, a_file])
def test_a_folder_that_others_may_have_written_is_not_believed(
    cache: Path, settled: None, file: Path, spoil: Callable[[Path], None]
) -> None:
    load(file)
    spoil(cache)
    assert load(file) == ("bytes", [CONTENT])


def test_without_a_place_for_facts_everything_is_proven_each_time(
    monkeypatch: pytest.MonkeyPatch, settled: None, file: Path, tmp_path: Path
) -> None:
    (tmp_path / "taken").write_text("")
    for value in (str(tmp_path / "taken"), "/proc"):
        monkeypatch.setenv("XDG_CACHE_HOME", value)
        assert load(file) == load(file) == ("bytes", [CONTENT])


def test_the_oldest_facts_go(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proof_cache, "_MAX_FACTS", 8)
    monkeypatch.setattr(proof_cache, "_FACTS_KEPT", 4)
    for number in range(20):
        proof_cache.store(("fact", number))
        assert proof_cache.is_proven(("fact", number))
    assert len(list(cache.iterdir())) <= 8
