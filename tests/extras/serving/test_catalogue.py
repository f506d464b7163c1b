"""The adapters that are served, what is ordered of them, and which orders are drawn together."""

import json
import os
import pickle
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest

from dreambooth_moslora.cli.main import main
from dreambooth_moslora.disk.run_folder import PUBLISHED_NAME, RAW_NAME
from dreambooth_moslora.errors import UserError
from dreambooth_moslora.extras.serving import catalogue as catalogue_module
from dreambooth_moslora.extras.serving.catalogue import (
    AdapterRef,
    Order,
    RefusedError,
    open_catalogue,
    parse_order,
)
from dreambooth_moslora.extras.serving.drawer import Batches


@pytest.fixture(autouse=True)
def lists_are_never_old_enough(monkeypatch):
    monkeypatch.setattr(catalogue_module, "FOLDER_SEC", -1.0)
    monkeypatch.setattr(catalogue_module, "BUCKET_SEC", -1.0)


@pytest.fixture
def folder(tmp_path) -> Path:
    """Two adapters with new tokens beside one, and a run with a checkpoint."""
    shelf = tmp_path / "shelf"
    files = ("dog.safetensors", "cat.safetensors", "cat_emb.safetensors", "notes.txt")
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
def test_files_runs_and_checkpoints_of_one_folder_or_several_have_names(folder, places, names):
    """A link out of the folder is not served."""
    (folder.parent / "secret.safetensors").write_bytes(b"secret")
    (folder / "link.safetensors").symlink_to(folder.parent / "secret.safetensors")
    found = set(open_catalogue([str(folder / place) for place in places]).names())
    assert names <= found and "link" not in found and (len(places) > 1 or found == names)


def test_a_name_is_looked_up_and_never_a_path(folder):
    for name in ("../dog", "/etc/passwd", "dog.safetensors", "rex/checkpoint-20", "", "\0", "none"):
        with pytest.raises(RefusedError) as error:
            open_catalogue([str(folder)]).find(name)
        assert error.value.status == 404, name


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_in_a_folder_or_a_bucket_a_new_file_is_seen_and_a_changed_one_has_another_version(
    folder, scheme
):
    catalogue = open_catalogue([f"{scheme}{folder}"])
    assert {"dog", "cat", "rex"} <= set(catalogue.names())
    cat = catalogue.find("cat")
    local = catalogue.local(cat)
    assert local.read_bytes() == b"cat.safetensors" and local.is_relative_to(folder) == (
        scheme == ""
    )
    assert (local.parent / "cat_emb.safetensors").read_bytes() == b"cat_emb.safetensors"
    assert catalogue.find("cat") == cat and catalogue.local(cat) == local
    facts = (folder / "cat.safetensors").stat()
    (folder / "cat.safetensors").write_bytes(b"CAT.safetensors")
    # a bucket tells the time of writing, and not what was written
    later_ns = 10**9 if scheme else 0
    os.utime(folder / "cat.safetensors", ns=(facts.st_atime_ns, facts.st_mtime_ns + later_ns))
    again = catalogue.find("cat")
    assert (
        again.version != cat.version and catalogue.local(again).read_bytes() == b"CAT.safetensors"
    )
    (folder / "emu.safetensors").write_bytes(b"emu")
    assert catalogue.find("emu").name == "emu"
    (folder / "emu.safetensors").unlink()
    with pytest.raises(RefusedError, match="emu"):
        catalogue.find("emu")


@pytest.mark.parametrize("place", [".", "rex"])
def test_a_bucket_serves_the_adapters_of_a_folder_by_the_same_names(folder, place):
    """It knew no best step, and served a run's file for other programs."""
    (folder / "rex.safetensors").write_bytes(b"another rex")
    (folder / "rex" / "best").mkdir()
    files = ("rex.kohya.safetensors", f"best/{PUBLISHED_NAME}", "best/x.safetensors")
    for name in files if place == "." else files[1:]:
        (folder / "rex" / name).write_bytes(name.encode())
    of_folder, of_bucket = (
        open_catalogue([f"{scheme}{folder / place}"]) for scheme in ("", "file://")
    )
    read = [
        {name: one.local(one.find(name)).read_bytes() for name in one.names()}
        for one in (of_folder, of_bucket)
    ]
    assert read[0] == read[1] and len(read[0]) == (6 if place == "." else 3)


def test_a_bucket_that_is_away_is_said_to_be(folder, monkeypatch):
    catalogue = open_catalogue([f"file://{folder}"])
    cat = catalogue.find("cat")
    monkeypatch.setattr("dreambooth_moslora.extras.cluster.bucket.TRIES", 1)
    monkeypatch.setattr(catalogue.bucket, "url", "s3://away")
    monkeypatch.setattr(
        catalogue.bucket.files, "find", Mock(side_effect=ConnectionError("no network"))
    )
    assert catalogue.find("cat") == cat
    with pytest.raises(RefusedError) as error:
        catalogue.local(cat)
    assert error.value.status == 503 and error.value.retry_sec


def test_an_object_that_arrives_cut_short_is_not_kept_and_fetched_again(folder, monkeypatch):
    catalogue = open_catalogue([f"file://{folder}"])
    cat = catalogue.find("cat")
    with monkeypatch.context() as cut:
        cut.setattr(
            catalogue.bucket.files,
            "get_file",
            lambda path, target: Path(target).write_bytes(b"cat."),
        )
        with pytest.raises(
            RefusedError, match="the adapter cat has changed while it was fetched"
        ) as error:
            catalogue.local(cat)
    assert error.value.status == 503 and catalogue.local(cat).read_bytes() == b"cat.safetensors"


@pytest.mark.parametrize(
    "places", [["/no/such/folder"], ["file:///no/such/folder"], ["a://b", "c"], ["nosuch://b"]]
)
def test_a_place_that_cannot_be_served_is_a_persons_mistake(places, monkeypatch):
    monkeypatch.setattr("dreambooth_moslora.extras.cluster.bucket.TRIES", 1)
    with pytest.raises(UserError, match="--adapters"):
        open_catalogue(places)


def test_the_command_tells_a_missing_folder_before_a_missing_library(
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


def order_of(**values) -> Order:
    return parse_order(json.dumps(values).encode())


def test_an_order_is_a_pictures_recipe_or_a_short_form_with_one_adapter_and_a_seed_that_is_drawn():
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


def test_orders_of_one_batch_have_adapters_scales_and_size_in_common():
    def key(sha: str = "1", **values) -> tuple:
        order = order_of(prompt="a", adapter="rex", **values)
        return Order(order.params, adapters=(AdapterRef("rex", "/rex", sha),)).batch_key

    assert key(seed=1, steps=2) == key(seed=2, steps=9)
    assert len({key(), key("2"), key(scale=0.5), key(height_px=64)}) == 4


def test_a_refusal_comes_whole_from_another_process():
    error = pickle.loads(pickle.dumps(RefusedError(503, "full", 4)))
    assert (error.status, str(error), error.retry_sec) == (503, "full", 4)


def test_a_batch_is_the_longest_waiting_item_and_others_of_its_key_and_a_favourite_delays_none():
    batches = Batches(3)
    for item in ("a1", "b1", "a2", "a3", "c1", "a4", "b2"):
        batches.put(item[0], item)
    found = [(len(batches), batches.take()) for _ in range(5)]
    assert found == [(7, ["a1", "a2", "a3"]), (4, ["b1", "b2"]), (2, ["c1"]), (1, ["a4"]), (0, [])]
    batches, order = Batches(2), []
    for item in ("a1", "a2", "a3", "b1"):
        batches.put(item[0], item)
    for number in range(4, 7):
        batches.put("a", f"a{number}")
        order += batches.take()
    assert order == ["a1", "a2", "a3", "a4", "b1"]
