"""The adapters that are served, what is ordered of them, and which orders are drawn together."""

import json
import os
import pickle
import sys
from pathlib import Path

import pytest

from dreambooth_moslora.cli.main import main
from dreambooth_moslora.disk.run_folder import PUBLISHED_NAME, RAW_NAME
from dreambooth_moslora.errors import UserError
from dreambooth_moslora.extras.serving import catalogue as catalogue_module
from dreambooth_moslora.extras.serving.catalogue import (
    AdapterRef,
    ImageOrder,
    RefusedError,
    open_catalogue,
    parse_order,
)
from dreambooth_moslora.extras.serving.drawer import BatchQueue


@pytest.fixture(autouse=True)
def lists_are_never_old_enough(monkeypatch):
    monkeypatch.setattr(catalogue_module, "MIN_LISTING_AGE_SEC", -1.0)


@pytest.fixture
def folder(tmp_path) -> Path:
    """Two adapters, and a run with a checkpoint."""
    shelf = tmp_path / "shelf"
    files = ("dog.safetensors", "cat.safetensors", "notes.txt")
    for name in (*files, f"rex/{PUBLISHED_NAME}", f"rex/checkpoint-20/{RAW_NAME}"):
        (shelf / name).parent.mkdir(parents=True, exist_ok=True)
        (shelf / name).write_bytes(name.encode())
    return shelf


@pytest.mark.parametrize(
    ("places", "names"),
    [
        (["."], {"dog", "cat", "rex", "rex@20"}),
        (["rex"], {"rex", "rex@20"}),
        ([".", "rex"], {"dog", "cat", "rex@20"}),
    ],
)
def test_files_runs_and_checkpoints_of_folders_have_names(folder, places, names):
    """A link out of the folder is not served."""
    (folder.parent / "secret.safetensors").write_bytes(b"secret")
    (folder / "link.safetensors").symlink_to(folder.parent / "secret.safetensors")
    adapter_names = set(open_catalogue([str(folder / place) for place in places]).list_names())
    assert (
        names <= adapter_names
        and "link" not in adapter_names
        and (len(places) > 1 or adapter_names == names)
    )


def test_a_name_is_looked_up_and_never_a_path(folder):
    for name in ("../dog", "/etc/passwd", "dog.safetensors", "rex/checkpoint-20", "", "\0", "none"):
        with pytest.raises(RefusedError) as error:
            open_catalogue([str(folder)]).find(name)
        assert error.value.status == 404, name


def test_a_new_file_is_listed_and_a_change_is_a_new_version(folder):
    catalogue = open_catalogue([str(folder)])
    assert {"dog", "cat", "rex"} <= set(catalogue.list_names())
    cat = catalogue.find("cat")
    assert Path(cat.place) == folder / "cat.safetensors" and catalogue.find("cat") == cat
    facts = (folder / "cat.safetensors").stat()
    (folder / "cat.safetensors").write_bytes(b"CAT.safetensors")
    os.utime(folder / "cat.safetensors", ns=(facts.st_atime_ns, facts.st_mtime_ns))
    assert catalogue.find("cat").version != cat.version
    (folder / "emu.safetensors").write_bytes(b"emu")
    assert catalogue.find("emu").name == "emu"
    (folder / "emu.safetensors").unlink()
    with pytest.raises(RefusedError, match="emu"):
        catalogue.find("emu")


def test_a_missing_folder_is_reported_before_a_missing_library(
    folder, free_port, monkeypatch, capsys
):
    monkeypatch.setitem(sys.modules, "ray", None)
    assert main(["serve", "--adapters", str(folder / "none")]) == 2
    assert (
        capsys.readouterr().err
        == f"error: --adapters {folder / 'none'}: there is no such folder.\n"
    )
    assert main(["serve", "--adapters", str(folder), "--port", str(free_port)]) == 2
    assert "serve needs Ray Serve: pip install" in capsys.readouterr().err


def order_of(**values) -> ImageOrder:
    return parse_order(json.dumps(values).encode())


def test_an_order_is_a_recipe_or_a_short_form():
    short = order_of(prompt="a dog", adapter="rex", scale=0.5, seed=1)
    long = order_of(prompt="a dog", adapters=[["rex", 0.5]], seed=1)
    tag = order_of(prompt="a dog <lora:rex:0.5>", seed=1)
    assert short.params == long.params == tag.params
    params = order_of(prompt="a dog", adapter="rex", seed=7, steps=3).params
    again = order_of(**params.to_dict(), adapter_sha256={"rex": "ab"})
    assert (
        again.params == params
        and again.sha256 == {"rex": "ab"}
        and params.adapters == (("rex", 1.0),)
    )
    assert len({order_of(prompt="a dog").params.seed for _ in range(4)}) > 1


@pytest.mark.parametrize(
    ("body", "word"),
    [
        (b"", "JSON"),
        (b"[" * 60_000, "JSON"),
        (b'{"prompt": "a", "seed": NaN}', "JSON"),
        (b'{"prompt": "a", "seed": ' + b"1" * 5000 + b"}", "JSON"),
        (b'{"prompt": "\xff"}', "JSON"),
        (b'["a"]', "object"),
        (b"{}", "prompt"),
        (b'{"prompt": 3}', "prompt"),
        (b'{"prompt": "\\ud800"}', "character"),
        (b'{"prompt": "a", "steps": 101}', "100"),
        (b'{"prompt": "a", "steps": 1e400}', "steps"),
        (b'{"prompt": "a", "num_images": 2}', "one picture"),
        (b'{"prompt": "a", "scale": 2}', "adapter"),
        (b'{"prompt": "a", "adapter": "b", "adapters": [["c", 1]]}', "either"),
        (b'{"prompt": "a", "adapter": ["b"]}', "adapter"),
        (b'{"prompt": "a", "adapters": {"b": 1}}', "adapters"),
        (b'{"prompt": "a", "adapter_sha256": ["b"]}', "adapter_sha256"),
        (b'{"prompt": "a", "out": "/etc/passwd"}', "out"),
    ],
)
def test_a_mistake_is_one_line(body, word):
    with pytest.raises(UserError, match=word) as error:
        parse_order(body)
    assert "\n" not in str(error.value)


def test_orders_of_a_batch_share_adapters_scales_and_size():
    def key(sha: str = "1", **values) -> tuple:
        order = order_of(prompt="a", adapter="rex", **values)
        return ImageOrder(order.params, adapters=(AdapterRef("rex", "/rex", sha),)).batch_key

    assert key(seed=1, steps=2) == key(seed=2, steps=9)
    assert len({key(), key("2"), key(scale=0.5), key(height_px=64)}) == 4


def test_a_refusal_comes_whole_from_another_process():
    error = pickle.loads(pickle.dumps(RefusedError(503, "full", 4)))
    assert (error.status, str(error), error.retry_sec) == (503, "full", 4)


def test_a_batch_is_the_oldest_item_with_others_of_its_key():
    batches = BatchQueue(3)
    for item in ("a1", "b1", "a2", "a3", "c1", "a4", "b2"):
        batches.put(item[0], item)
    batches_left = [(len(batches), batches.dequeue_batch()) for _ in range(5)]
    assert batches_left == [
        (7, ["a1", "a2", "a3"]),
        (4, ["b1", "b2"]),
        (2, ["c1"]),
        (1, ["a4"]),
        (0, []),
    ]
    batches, order = BatchQueue(2), []
    for item in ("a1", "a2", "a3", "b1"):
        batches.put(item[0], item)
    for number in range(4, 7):
        batches.put("a", f"a{number}")
        order += batches.dequeue_batch()
    assert order == ["a1", "a2", "a3", "a4", "b1"]
