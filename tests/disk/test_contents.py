"""Text is read up to a limit; digests of large files are remembered until the content changes."""

import json
import os
from pathlib import Path

import pytest

from dreambooth_moslora.disk.contents import hash_file, hash_files, read_small_text


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "weights.safetensors"
    path.write_bytes(b"weights")
    return path


def test_a_file_is_hashed_once_until_it_changes(file, tmp_path):
    """Recognise a file by any of its links, as the hub's cache has them."""
    record, link = tmp_path / "caches" / "digests.json", tmp_path / "link"
    link.symlink_to(file)
    assert hash_files([file, link], record) == [hash_file(file)] * 2

    # The record's digest is returned: the file is not read again.
    ((path, (stamp, digest)),) = json.loads(record.read_text()).items()
    assert (path, digest) == (str(file.resolve()), hash_file(file))
    record.write_text(json.dumps({path: [stamp, "remembered"]}))
    assert hash_files([link], record) == ["remembered"]

    # Another content of equal size, also where its time was set back.
    times = file.stat()
    file.write_bytes(b"WEIGHTS")
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert hash_files([link], record) == [hash_file(file)]

    # Entries of deleted files are dropped.
    renamed = file.rename(tmp_path / "renamed")
    assert hash_files([renamed], record) == [hash_file(renamed)]
    assert list(json.loads(record.read_text())) == [str(renamed.resolve())]


@pytest.mark.parametrize("content", [b"torn", b"[]", b'{"weights": 3}', b"\xff", None])
def test_a_damaged_record_is_ignored(content, file, tmp_path):
    record = tmp_path / "caches" / "digests.json"
    if content is None:  # a file where its folder should be
        record.parent.write_bytes(b"")
    else:
        record.parent.mkdir()
        record.write_bytes(content)
    for _ in range(2):
        assert hash_files([file], record) == [hash_file(file)]


@pytest.mark.skipif(not Path("/dev/fd").exists(), reason="no pipe has a path here")
def test_a_pipe_is_read_up_to_the_limit():
    end, start = os.pipe()
    with open(end), open(start, "w") as file:
        file.write("letters")
        file.close()
        with pytest.raises(OSError, match="more than 0 MiB"):
            read_small_text(Path(f"/dev/fd/{end}"), max_bytes=6)
