"""Header of a safetensors file."""

import numpy as np
import pytest
from safetensors.numpy import save

from dreambooth_moslora.disk.safetensors_header import join_content, read_header, split_content
from dreambooth_moslora.errors import UserError

CONTENT = save(
    {"a": np.zeros((2, 3), np.float16), "b": np.ones(4, np.int8)}, metadata={"format": "pt"}
)


def test_header_has_metadata_shapes_and_dtypes(tmp_path):
    (tmp_path / "file").write_bytes(CONTENT)
    header = read_header(tmp_path / "file")
    assert header.metadata == {"format": "pt"}
    assert header.shapes == {"a": [2, 3], "b": [4]}
    assert header.dtypes == {"a": "F16", "b": "I8"}


@pytest.mark.parametrize("content", [CONTENT[:-1], CONTENT[:20], b"", b"no header at all"])
def test_damaged_file_is_refused(content, tmp_path):
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(UserError, match="damaged, cut short or not a safetensors file"):
        read_header(tmp_path / "file")


def test_content_with_another_header_keeps_its_tensors(tmp_path):
    header, tensor_bytes = split_content(CONTENT)
    header["__metadata__"]["title"] = "dög"
    (tmp_path / "file").write_bytes(join_content(header, tensor_bytes))
    assert read_header(tmp_path / "file").metadata == {"format": "pt", "title": "dög"}
    assert split_content((tmp_path / "file").read_bytes())[1] == tensor_bytes
