"""No visitor reads where things lie on this machine, and no log what a visitor has written."""

import logging

import PIL.Image
import psutil
import pytest

from dreambooth_moslora.core import UserError
from dreambooth_moslora.generation.params import GenerationParams
from dreambooth_moslora.ui.jobs import Job
from dreambooth_moslora.ui.state import TELLS_PROMPTS, AppContext, import_libraries
from dreambooth_moslora.ui.train_form import TrainForm
from dreambooth_moslora.ui.train_start import estimate_cost
from dreambooth_moslora.ui.train_watch import watched
from tests.ui.test_handlers import PAGE, handler, visitor


@pytest.fixture
def ctx(tmp_path):
    secret = tmp_path / "secret" / "my_base"
    secret.mkdir(parents=True)

    def load():
        raise UserError(f"{secret} has no unet; {tmp_path / 'runs' / 'x'} is there")

    folders = {"adapters_dir": tmp_path / "secret" / "adapters", "runs_dir": tmp_path / "runs"}
    (tmp_path / "runs").mkdir()
    made = AppContext(load, base="my_base", base_name=str(secret), resolution_px=64, training=True, **folders)
    yield made
    made.visitors.close()


def test_a_base_that_does_not_load_is_named_without_its_folder(ctx, tmp_path):
    with pytest.raises(UserError, match="my_base has no unet; x is there") as told:
        ctx.pipeline()
    assert str(tmp_path) not in str(told.value)


def test_a_run_that_failed_tells_no_folder_in_card_log_and_state(ctx, tmp_path):
    (run := tmp_path / "runs" / "dog").mkdir()
    ann = ctx.visitors.of(PAGE)
    Job(run, ann.id, 1, psutil.Process().create_time()).save()
    (run / "job.log").write_text(f"error: {ctx.base_name}/unet is missing, {ctx.catalog.adapters_dir}/a too\n")
    now = watched(ctx.jobs, "dog", None, ann)
    for text in (now["status"], now["log"], str(handler(ctx, "status")("dog", PAGE))):
        assert "my_base/unet" in text and str(tmp_path) not in text


def test_the_prompt_of_a_visitor_is_not_written_to_the_log(subject):
    lines, handler = [], logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    import_libraries()
    logger = logging.getLogger(TELLS_PROMPTS)
    logger.addHandler(handler)
    try:
        list(subject.generate(GenerationParams("my secret dog " * 40, steps=1)))
        logger.warning("heard")
    finally:
        logger.removeHandler(handler)
    assert lines == ["heard"]


def test_an_estimate_names_no_folder(ctx, tmp_path):
    ann = visitor(tmp_path)
    ann.photos_dir.mkdir()
    PIL.Image.new("RGB", (64, 64)).save(ann.photos_dir / "photo_01.png")
    with pytest.raises(UserError, match="my_base") as told:
        estimate_cost(ctx, TrainForm("sks", "dog"), ann)
    assert str(tmp_path) not in str(told.value)
