"""The downloader and the real hub client against the loopback hub: success or one clear error, never a bad file."""

from __future__ import annotations

import hashlib
import random
from pathlib import Path

import pytest

from pipeline_lib.config.errors import UserError
from pipeline_lib.data import hub as hubs
from pipeline_lib.data import retry
from pipeline_lib.data.download import Remote, check_url, fetch
from tests.hub import FakeHub

DATA = random.Random(7).randbytes(300_000)
SHA = hashlib.sha256(DATA).hexdigest()


def remote(hub: FakeHub, **other: object) -> Remote:
    hub.files.setdefault("big.bin", DATA)
    return Remote(f"{hub.url}/files/big.bin", "big.bin", checksum=("sha256", SHA), **other)  # type: ignore[arg-type]


@pytest.mark.parametrize("size", [None, len(DATA)])
def test_full_download(hub: FakeHub, tmp_path: Path, size: int | None) -> None:
    assert fetch(remote(hub, size=size), tmp_path / "x").read_bytes() == DATA
    fetch(remote(hub, size=size), tmp_path / "x")
    assert len(hub.requests) == 1, "what is there and whole is not asked for again"
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


@pytest.mark.parametrize("size", [None, len(DATA)])
def test_a_dropped_connection_is_resumed(hub: FakeHub, tmp_path: Path, waits: list[float], size: int | None) -> None:
    hub.fail("/files/*", drop_after=100_000, times=2)
    assert fetch(remote(hub, size=size), tmp_path / "x").read_bytes() == DATA
    assert [request.range for request in hub.requests] == [None, "bytes=100000-", "bytes=200000-"]


def test_a_part_left_by_a_killed_run_is_resumed(hub: FakeHub, tmp_path: Path) -> None:
    (tmp_path / "x.part").write_bytes(DATA[:123_456])
    assert fetch(remote(hub), tmp_path / "x").read_bytes() == DATA
    assert [request.range for request in hub.requests] == ["bytes=123456-"]


@pytest.mark.parametrize("part", [DATA + b"more", b"other" * 1000, DATA[:-1] + b"?"])
def test_a_part_that_does_not_fit_is_thrown_away(hub: FakeHub, tmp_path: Path, waits: list[float], part: bytes) -> None:
    (tmp_path / "x.part").write_bytes(part)
    assert fetch(remote(hub), tmp_path / "x").read_bytes() == DATA


def test_a_damaged_file_is_fetched_again(hub: FakeHub, tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(DATA[:-1] + b"?")
    assert fetch(remote(hub), tmp_path / "x").read_bytes() == DATA


def test_a_connection_that_always_drops_is_an_error(hub: FakeHub, tmp_path: Path, waits: list[float]) -> None:
    hub.fail("/files/*", drop_after=10, times=-1)
    with pytest.raises(UserError, match=r"big.bin: cannot be downloaded.*tried 6 times"):
        fetch(remote(hub), tmp_path / "x")
    assert len(hub.requests) == retry.TRIES
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(("status", "headers", "first_wait"), [(429, {"Retry-After": "7"}, 7), (503, {}, 1)])
def test_busy_servers_are_waited_for(
    hub: FakeHub, tmp_path: Path, waits: list[float], status: int, headers: dict[str, str], first_wait: float
) -> None:
    hub.fail("/files/*", status=status, headers=headers, times=3)
    assert fetch(remote(hub), tmp_path / "x").read_bytes() == DATA
    assert len(waits) == 3
    assert waits[0] == first_wait


@pytest.mark.parametrize("status", [429, 503])
def test_a_server_that_stays_busy_is_an_error(hub: FakeHub, tmp_path: Path, waits: list[float], status: int) -> None:
    hub.fail("/files/*", status=status, times=-1)
    with pytest.raises(
        UserError, match=rf"the server answered {status} \(tried 6 times\)[^$]*what has been downloaded"
    ):
        fetch(remote(hub), tmp_path / "x")
    assert len(waits) == retry.TRIES - 1


def test_a_wait_that_is_too_long_is_an_error_at_once(hub: FakeHub, tmp_path: Path, waits: list[float]) -> None:
    hub.fail("/files/*", status=429, headers={"Retry-After": "86400"}, times=-1)
    with pytest.raises(UserError, match="asks to wait 86400 s"):
        fetch(remote(hub), tmp_path / "x")
    assert waits == []


@pytest.mark.parametrize(("status", "says"), [(404, "no such file"), (401, "not open to everyone"), (403, "refused")])
def test_a_definite_no_is_an_error_at_once(hub: FakeHub, tmp_path: Path, status: int, says: str) -> None:
    hub.fail("/files/*", status=status, times=-1)
    with pytest.raises(UserError, match=rf"big.bin: .*{says}.*: status {status}\n  fix:"):
        fetch(remote(hub), tmp_path / "x")
    assert len(hub.requests) == 1


def test_a_truncated_body_is_an_error_and_leaves_nothing(hub: FakeHub, tmp_path: Path, waits: list[float]) -> None:
    hub.fail("/files/*", truncate=1000, times=-1)
    with pytest.raises(UserError, match="not what was announced"):
        fetch(remote(hub), tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


def test_a_body_truncated_once_is_completed(hub: FakeHub, tmp_path: Path, waits: list[float]) -> None:
    hub.fail("/files/*", truncate=1000)
    assert fetch(remote(hub, size=len(DATA)), tmp_path / "x").read_bytes() == DATA


def test_changed_content_is_an_error_and_leaves_nothing(hub: FakeHub, tmp_path: Path) -> None:
    hub.fail("/files/*", content=DATA[:-1] + b"?", times=-1)
    with pytest.raises(UserError, match="not what was announced") as caught:
        fetch(remote(hub), tmp_path / "x")
    assert hashlib.sha256(DATA[:-1] + b"?").hexdigest() in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_content_of_another_size_is_an_error_at_once(hub: FakeHub, tmp_path: Path) -> None:
    hub.fail("/files/*", content=DATA[:1000], times=-1)
    (tmp_path / "x.part").write_bytes(DATA[:10])
    with pytest.raises(UserError, match=r"not what was announced(.|\n)*1000 bytes"):
        fetch(remote(hub, size=len(DATA)), tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


def test_a_byte_spoilt_once_is_repaired(hub: FakeHub, tmp_path: Path) -> None:
    hub.fail("/files/*", content=DATA[:-1] + b"?")
    assert fetch(remote(hub), tmp_path / "x").read_bytes() == DATA


def test_a_hub_that_is_not_there_is_an_error(tmp_path: Path, waits: list[float], hub: FakeHub) -> None:
    with pytest.raises(UserError, match="cannot be downloaded"):
        fetch(Remote("http://127.0.0.1:9/x", "x"), tmp_path / "x")


@pytest.mark.parametrize(
    "url", ["http://example.org/x", "ftp://example.org/x", "file:///etc/passwd", "x", "https:///x"]
)
def test_only_https_and_this_machine(url: str) -> None:
    with pytest.raises(UserError, match="not an address to download from"):
        check_url(url, "config.yaml: datasets.d.source.url")


def test_the_hub_client_reads_a_revision(hub: FakeHub, tmp_path: Path) -> None:
    first = hub.add("dataset", "o/n", {"a.txt": b"one", "b.parquet": DATA})
    second = hub.add("dataset", "o/n", {"a.txt": b"two"})
    assert hubs.commit_of("dataset", "o/n", "main") == second
    repository = hubs.repository("dataset", "o/n", first, tmp_path)
    assert repository.commit == first
    assert repository.files["b.parquet"].checksum == ("sha256", SHA)
    for path, content in (("a.txt", b"one"), ("b.parquet", DATA)):
        assert repository.fetch(repository.files[path], tmp_path / path).read_bytes() == content


def test_a_killed_run_goes_on_with_the_commit_it_began_with(hub: FakeHub, tmp_path: Path) -> None:
    first = hub.add("model", "o/n", {"a.txt": b"one"})
    assert hubs.repository("model", "o/n", "main", tmp_path).commit == first
    hub.add("model", "o/n", {"a.txt": b"two"})
    assert hubs.repository("model", "o/n", "main", tmp_path).commit == first
    assert hubs.repository("model", "o/n", "main", tmp_path / "new").commit != first


def test_content_changed_at_a_pinned_revision(hub: FakeHub, tmp_path: Path) -> None:
    commit = hub.add("model", "o/n", {"config.json": b'{"a": 1}'})
    repository = hubs.repository("model", "o/n", commit, tmp_path)
    hub.commits["model", "o/n"][commit]["config.json"] = b'{"a": 2}'
    with pytest.raises(UserError, match=rf"models/o/n@{commit[:12]}: config.json: .*not what was announced"):
        repository.fetch(repository.files["config.json"], tmp_path / "config.json")
    assert not (tmp_path / "config.json").exists()


@pytest.mark.parametrize(
    ("name", "revision", "says"),
    [
        ("o/absent", "main", "status 401"),
        ("o/n", "nowhere", "no such revision: status 404"),
        ("o/closed", "main", "HF_TOKEN"),
    ],
)
def test_what_the_hub_does_not_have(hub: FakeHub, tmp_path: Path, name: str, revision: str, says: str) -> None:
    hub.add("model", "o/n", {"a.txt": b"one"})
    hub.add("model", "o/closed", {"a.txt": b"one"}, private=True)
    with pytest.raises(UserError, match=says) as caught:
        hubs.repository("model", name, revision, tmp_path)
    assert f"models/{name}@{revision}" in str(caught.value)


def test_a_token_comes_from_the_environment_and_is_never_shown(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], waits: list[float]
) -> None:
    hub.add("model", "o/closed", {"a.txt": b"one"}, private=True)
    monkeypatch.setenv("HF_TOKEN", hub.token)
    repository = hubs.repository("model", "o/closed", "main", tmp_path)
    repository.fetch(repository.files["a.txt"], tmp_path / "a.txt")
    hub.fail("*/a.txt", status=503, times=2)
    hub.fail("*/a.txt", status=403, times=-1)
    with pytest.raises(UserError) as caught:
        repository.fetch(repository.files["a.txt"], tmp_path / "b.txt")
    shown = capfd.readouterr()
    assert hub.token not in str(caught.value) + repr(caught.value) + shown.out + shown.err
    assert all(request.token for request in hub.requests)
    assert not any(hub.token in path.read_text() for path in tmp_path.iterdir())


def test_the_listing_survives_a_busy_hub(hub: FakeHub, tmp_path: Path, waits: list[float]) -> None:
    commit = hub.add("dataset", "o/n", {"a.txt": b"one"})
    hub.fail("/api/*", status=429, headers={"Retry-After": "3"}, times=1)
    hub.fail("/api/*/tree/*", status=503, times=2)
    assert hubs.repository("dataset", "o/n", "main", tmp_path).commit == commit
    assert waits == [3, 1, 2]


def test_a_path_that_leads_out_is_refused(hub: FakeHub, tmp_path: Path) -> None:
    hub.add("model", "o/n", {"../evil.txt": b"x"})
    with pytest.raises(UserError, match="leads out of its folder"):
        hubs.repository("model", "o/n", "main", tmp_path)


def test_offline_is_said(hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add("model", "o/n", {"a.txt": b"x"})
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set"):
        hubs.repository("model", "o/n", "main", tmp_path)
    assert hub.requests == []


def test_a_full_disk_is_said(hub: FakeHub, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be written"):
        retry.Patience("x").call(lambda: Path("/dev/full").write_bytes(b"0" * 100_000))
