"""A run of the page goes on from an adapter that can be chosen there: the run's copy of it, under its name."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from safetensors.numpy import save_file

from dreambooth_moslora.adapters.metadata import AdapterMetadata
from dreambooth_moslora.core import UserError
from dreambooth_moslora.settings.table import TrainConfig
from dreambooth_moslora.ui.state import AdapterCatalog, AppContext
from dreambooth_moslora.ui.train_form import TrainForm
from dreambooth_moslora.ui.train_start import estimate_cost, form_of_run, prepared
from tests.ui.test_handlers import PAGE, handler
from tests.ui.test_more_subjects import ann, page  # noqa: F401 (fixtures)

FORM = TrainForm("sks", "duck", begin_with="old duck@30")
NOTE = {"word": "sks", "count": 2, "file": "moslora_emb.safetensors", "sha256": "0" * 64}


def save_header(file: Path, **facts) -> None:
    header = {"moslora": AdapterMetadata(rank=4, alpha=4, **facts).to_json()}
    save_file({"weight": np.zeros((1, 1), np.float32)}, file, metadata=header)


@pytest.fixture
def with_shelf(page, tmp_path):  # noqa: F811
    jobs = page.jobs
    (checkpoint := jobs.runs_dir / "old duck" / "checkpoint-30").mkdir(parents=True)
    save_header(checkpoint / "moslora_weights.safetensors")
    catalog = AdapterCatalog(tmp_path / "adapters", jobs.runs_dir)
    return SimpleNamespace(**vars(page), catalog=catalog)


def test_the_config_is_that_of_the_flag_and_the_run_has_its_own_copy(with_shelf, ann, page):  # noqa: F811
    with prepared(with_shelf, FORM, ann) as run:
        copied = Path(run.settings["init_adapter"])
        assert copied == run.run_dir / "begun_with" / "old duck@30.safetensors"
        assert copied.read_bytes() == with_shelf.catalog.path("old duck@30", ann).read_bytes()
        assert "begins with what the adapter old duck@30 has learnt" in run.said
        assert form_of_run(run.settings, run.run_dir / "photos").begin_with == "old duck@30"
        assert list(with_shelf.catalog.files(ann)) == ["old duck@30"]
    with prepared(page, TrainForm("sks", "duck"), ann) as plain:
        own = {"output_dir": run.settings["output_dir"], "instance_data_dir": run.settings["instance_data_dir"]}
        assert TrainConfig.from_dict(plain.settings | own | {"init_adapter": str(copied)}).to_dict() == run.settings
        assert not (plain.run_dir / "begun_with").exists()


def test_an_adapter_that_is_not_on_the_shelf_is_named_before_anything_is_made(with_shelf, ann):  # noqa: F811
    for name in ("dog", "../runs/old duck@30"):
        form = TrainForm("sks", "duck", begin_with=name)
        with pytest.raises(UserError, match="there is no adapter"), prepared(with_shelf, form, ann):
            pass
        with pytest.raises(UserError, match="there is no adapter"):
            estimate_cost(with_shelf, form, ann)
    assert [path.name for path in with_shelf.runs_dir.iterdir()] == ["old duck"]


@pytest.mark.parametrize("content, words", [(NOTE, "learnt new tokens for 'sks'"), (None, "not a safetensors file")])
def test_an_adapter_that_no_run_begins_with_is_named_before_anything_is_made(with_shelf, ann, content, words):  # noqa: F811
    ctx, jobs = with_shelf, with_shelf.jobs
    file = ctx.catalog.path("old duck@30", ann)
    file.write_text("an adapter") if content is None else save_header(file, tokens=content)
    for begin in (lambda: estimate_cost(ctx, FORM, ann), lambda: prepared(ctx, FORM, ann).__enter__()):
        with pytest.raises(UserError, match=f"“Begin with” old duck@30: .*{words}"):
            begin()
    assert [path.name for path in jobs.runs_dir.iterdir()] == ["old duck"]


def test_the_list_leaves_out_adapters_with_new_tokens(tmp_path):
    for name, tokens in (("plain", {}), ("pivotal", NOTE)):
        save_header(tmp_path / f"{name}.safetensors", tokens=tokens)
    folders = {"adapters_dir": tmp_path, "runs_dir": tmp_path / "runs"}
    ctx = AppContext(lambda: None, base="toy", base_name="toy", resolution_px=128, training=True, **folders)
    assert [name for name, _ in handler(ctx, "starts")(PAGE).choices] == ["none", "plain"]
    ctx.visitors.close()
