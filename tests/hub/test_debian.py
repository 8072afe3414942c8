"""Debian packages, with one made here and an apt-get made here: no network needed."""

import hashlib
import io
import os
import tarfile

import pytest

from research.hub import debian, download
from research.hub.download import DownloadError, Package

FILENAME = "sword-tiny_1.0-1_all.deb"


def deb_bytes(compression):
    """An `ar` archive of debian-binary, control.tar (of odd size, so padded) and data.tar."""
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode=f"w:{compression}") as archive:
        entry = tarfile.TarInfo("./usr/share/verse.txt")
        entry.size = 5
        archive.addfile(entry, io.BytesIO(b"verse"))
    written = debian.MAGIC
    members = [("debian-binary", b"2.0\n"), ("control.tar", b"odd")]
    for name, content in [*members, (f"data.tar.{compression}/", data.getvalue())]:
        header = f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(content):<10}`\n"
        written += header.encode() + content + b"\n" * (len(content) % 2)
    return written


DEB = deb_bytes("xz")
PACKAGE = Package("sword-tiny", "1.0-1", "deb", FILENAME, hashlib.sha256(DEB).hexdigest())


@pytest.fixture
def apt(tmp_path, monkeypatch):
    """Puts a shell script in the place of apt-get, and the cache into a folder of its own."""
    monkeypatch.setenv(download.CACHE_VARIABLE, str(tmp_path / "cache"))
    (tmp_path / FILENAME).write_bytes(DEB)

    def install(script):
        program = tmp_path / "bin/apt-get"
        program.parent.mkdir(exist_ok=True)
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)

    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    install(f'case "$*" in *"download sword-tiny=1.0-1") cp {tmp_path / FILENAME} . ;; esac')
    return install


def test_fetched_once_and_read_in_place(apt):
    assert download.members(PACKAGE) == ["./usr/share/verse.txt"]
    apt("exit 1")
    with download.open_member(PACKAGE, "./usr/share/verse.txt") as file:
        assert file.read() == b"verse"
    with pytest.raises(DownloadError, match="holds no file"), download.open_member(PACKAGE, "x"):
        pass


def test_lists_of_its_own_where_the_system_has_none(apt, tmp_path):
    apt(
        f'case "$*" in\n*lists=*" update") touch {tmp_path}/updated ;;\n'
        f'*lists=*" download "*) test -e {tmp_path}/updated && cp {tmp_path / FILENAME} . ;;\n'
        "*) echo no such package >&2; exit 100 ;; esac"
    )
    assert download.fetch(PACKAGE).read_bytes() == DEB
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [FILENAME]


def test_what_cannot_be_fetched_is_named_with_what_apt_said(apt, monkeypatch):
    apt("echo 'E: Unable to locate package' >&2; exit 100")
    with pytest.raises(DownloadError, match=r"(?s)sword-tiny_1.0-1_all.deb.*Unable to locate"):
        download.fetch(PACKAGE)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(DownloadError, match=r"(?s)put the file, sha256 .*no apt-get here"):
        download.fetch(PACKAGE)


def test_another_file_than_the_pinned_one(apt, tmp_path):
    (tmp_path / FILENAME).write_bytes(DEB[:-1] + b"?")
    with pytest.raises(DownloadError, match="wrong sha256"):
        download.fetch(PACKAGE)


@pytest.mark.parametrize("compression", ["gz", "xz"])
def test_compressions(tmp_path, compression):
    (tmp_path / "a.deb").write_bytes(deb_bytes(compression))
    with debian.open_deb(tmp_path / "a.deb") as archive:
        assert archive.getnames() == ["./usr/share/verse.txt"]


def test_not_a_deb(tmp_path):
    (tmp_path / "a.deb").write_bytes(b"PK")
    with pytest.raises(tarfile.ReadError, match=r"a\.deb is not a \.deb"):
        debian.open_deb(tmp_path / "a.deb")
    (tmp_path / "a.deb").write_bytes(debian.MAGIC)
    with pytest.raises(tarfile.ReadError, match=r"holds no data\.tar"):
        debian.open_deb(tmp_path / "a.deb")
