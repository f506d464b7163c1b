"""An adapter file whose header or whose ranks would hold up everybody is refused before it is parsed or computed."""

import json
import os
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from dreambooth_moslora.core import UserError
from dreambooth_moslora.ui.generate_form import AdapterSummary, summary_of
from dreambooth_moslora.ui.page import adapter_facts
from dreambooth_moslora.ui.state import AdapterCatalog, check_upload
from tests.ui.test_handlers import visitor, write_adapter


def with_header(file: Path, header: bytes, content: int = 0) -> Path:
    with file.open("wb") as opened:
        opened.write(len(header).to_bytes(8, "little") + header)
        opened.truncate(8 + len(header) + content)
    return file


def with_ranks(file: Path, *shapes: tuple[int, int]) -> Path:
    """A file that is as sparse as its matrices: only the header is written."""
    header, end = {}, 0
    for number, shape in enumerate(shapes):
        start, end = end, end + 4 * shape[0] * shape[1]
        header[f"unet.a{number}.lora_A.weight"] = {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}
    return with_header(file, json.dumps(header).encode(), end)


def test_millions_of_names_are_refused_before_they_are_parsed(tmp_path):
    names = ",".join(f'"{number:x}":""' for number in range(700_000))
    many = with_header(tmp_path / "many.safetensors", f'{{"__metadata__":{{{names}}}}}'.encode())
    long = with_header(tmp_path / "long.safetensors", b"{" + b" " * (16 << 20) + b"}")
    began = time.perf_counter()
    for file, word in ((many, "names"), (long, "MiB")):
        with pytest.raises(UserError, match=f"header .*{word}"):
            check_upload(file)
        assert summary_of(file) == AdapterSummary()
    assert time.perf_counter() - began < 1


def test_ranks_that_take_minutes_to_measure_are_refused(tmp_path):
    for shapes in ([(8000, 1280), (1280, 8000)], [(320, 1280)] * 320):
        with pytest.raises(UserError, match="ranks are too high"):
            adapter_facts(str(with_ranks(tmp_path / "high.safetensors", *shapes)))


def test_a_large_adapter_of_a_usual_rank_is_taken(tmp_path):
    check_upload(with_ranks(tmp_path / "usual.safetensors", *[(64, 1280), (1280, 64)] * 722))


@pytest.mark.parametrize("header", [b"[" * 100_000, b"[]", b'{"lora": 1}', b'{"lora": {"shape": ["x"]}}', b"\xff"])
def test_a_header_that_makes_no_sense_is_left_to_the_reader(tmp_path, header):
    file = with_header(tmp_path / "odd.safetensors", header)
    check_upload(file)
    with pytest.raises(UserError, match="odd"):
        adapter_facts(str(file))


def test_a_header_is_parsed_once_until_the_file_changes(tmp_path, monkeypatch):
    file = tmp_path / "a.safetensors"
    write_adapter(file, "sks")
    opened = []
    monkeypatch.setattr("dreambooth_moslora.ui.generate_form.json.loads", lambda text: opened.append(text) or {})
    for _ in range(3):
        summary_of(file)
    assert len(opened) == 1
    write_adapter(file, "zwx the second")
    summary_of(file)
    assert len(opened) == 2


def test_links_in_circles_and_pipes_are_no_adapters(tmp_path):
    folder = tmp_path / "adapters"
    write_adapter(folder / "dog.safetensors", "sks")
    (folder / "loop.safetensors").symlink_to(folder / "loop.safetensors")
    (folder / "gone.safetensors").symlink_to(folder / "nowhere")
    (folder / "folder.safetensors").mkdir()
    os.mkfifo(folder / "pipe.safetensors")
    run = tmp_path / "runs" / "cat"
    (run / "checkpoint-5").mkdir(parents=True)
    os.mkfifo(run / "checkpoint-5" / "moslora_weights.safetensors")
    (tmp_path / "runs" / "round").symlink_to(tmp_path / "runs" / "round")
    assert list(AdapterCatalog(folder, tmp_path / "runs").files(visitor(tmp_path))) == ["dog"]


def test_a_pipe_is_not_read(tmp_path):
    os.mkfifo(tmp_path / "pipe.safetensors")
    assert summary_of(tmp_path / "pipe.safetensors") == AdapterSummary()


def test_a_plain_file_is_taken(tmp_path):
    save_file({"x": np.zeros(1)}, tmp_path / "a.safetensors")
    check_upload(tmp_path / "a.safetensors")
