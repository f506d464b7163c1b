"""Runs a study: trains and scores each cell once, and keeps the scores.

Cells are trained in processes of this machine, or on a cluster.

    OUT/cells/NAME-DIGEST.json   scores and costs of a cell, written atomically when it is finished
    OUT/cells/NAME-DIGEST.jpg    its pictures in one strip, for the report
    OUT/running                  the run folder of the current training

The file name has a digest of everything that the result depends on. A worker keeps the base, the
encoders and each subject's base pictures in memory between cells.
"""

import hashlib
import json
import os
import platform
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from functools import lru_cache, partial
from multiprocessing import get_context
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path
from statistics import median

import torch
from PIL import Image

from dreambooth_moslora.disk import events, processes, run_folder
from dreambooth_moslora.disk.atomic import write_atomic
from dreambooth_moslora.disk.contents import hash_values, read_json
from dreambooth_moslora.disk.paths import find_asset
from dreambooth_moslora.evaluation import metrics, reference_arms, scoring
from dreambooth_moslora.evaluation.protocol import build_subject_plan
from dreambooth_moslora.evaluation.report import build_evaluators
from dreambooth_moslora.extras.cluster import fleet, ray_fleet
from dreambooth_moslora.extras.lab.budget import choose_ranks, count_parameters
from dreambooth_moslora.extras.lab.comparison import (
    CellResult,
    build_rate_curves,
    choose_best_rates,
    list_image_measures,
)
from dreambooth_moslora.extras.lab.study import Cell, Study
from dreambooth_moslora.generation.pipeline import SubjectPipeline
from dreambooth_moslora.photos.folder import build_photo_report
from dreambooth_moslora.settings import toy_bases
from dreambooth_moslora.settings.family_facts import get_text_options
from dreambooth_moslora.settings.subject_kinds import get_subject_kind
from dreambooth_moslora.settings.train_config import START_FILE_SETTINGS, TrainConfig
from dreambooth_moslora.training.loop import train

MAX_HASHED_BYTES = 64 << 20
"""A file up to this size is read as a whole to tell it from another."""
TAIL_BYTES = 1 << 20
"""So much is read of the end of a larger one."""


def get_result_path(study: Study, cell: Cell, out: Path) -> Path:
    """Return the path of the cell's result: another content of its files is another name."""
    digest = study.digest(cell, [digest_content(path) for path in list_materials(study, cell)])
    return out / "cells" / f"{cell.name}-{digest}.json"


def list_materials(study: Study, cell: Cell) -> list[Path]:
    """List the local files that a result depends on: photos, base, encoders and what the arm begins
    with. Hub models are identified by name."""
    subject = study.get_subject(cell.subject)
    settings = {**study.train, **study.arms[cell.arm]}
    names = [study.base.path, subject.photos]
    names += [study.protocol.clip, study.protocol.dino]
    if study.base.is_toy:
        names.append(toy_bases.DINO_FOLDER)
    names += [settings.get(name) for name in START_FILE_SETTINGS]
    paths = [Path(find_asset(str(path))) for path in names if path]
    return [path for path in paths if path.exists()]


@lru_cache(maxsize=64)
def digest_content(path: Path) -> str:
    """Digest a file, or a folder without .md files; of large files their size and last bytes."""
    files = [path]
    if not path.is_file():
        files = sorted(file for file in path.rglob("*") if file.is_file() and file.suffix != ".md")
    marks = []
    for file in files:
        size = file.stat().st_size
        is_large = size > MAX_HASHED_BYTES
        with file.open("rb") as opened:
            opened.seek(size - TAIL_BYTES if is_large else 0)
            mark = hashlib.file_digest(opened, "sha256").hexdigest()
        marks.append((str(file.relative_to(path)), f"{size} {mark}" if is_large else mark))
    return hash_values(files=marks)


def read_results(study: Study, cells: Iterable[Cell], out: Path) -> list[CellResult]:
    """Read the results of the `cells` that are finished."""
    paths = [get_result_path(study, cell, out) for cell in cells]
    return [read_json(path, CellResult) for path in paths if path.is_file()]


def evaluate_cell(study: Study, cell: Cell, run_dir: Path) -> scoring.Evaluation:
    """Draw with the adapter in `run_dir`, or by references, and score the pictures."""
    pipeline = load_pipeline(study.base)
    evaluator = get_evaluator(study, cell.subject)
    judge = partial(
        scoring.evaluate_adapter,
        pipeline,
        batch_size=8,
        text_options=get_text_options(study.build_config(cell, cell.rank, run_dir)),
    )
    if not study.should_train(cell.arm):
        return reference_arms.evaluate_references(evaluator, partial(judge, None))
    pipeline.load_adapter(run_dir, "cell")
    try:
        return judge("cell", evaluator)
    finally:
        pipeline.unload_adapter("cell")


# loading them takes longer than a small training: a worker keeps them between cells
load_pipeline = lru_cache(maxsize=1)(SubjectPipeline.from_base)
load_encoders = lru_cache(maxsize=1)(metrics.load_encoders)
EVALUATORS: dict[str, scoring.Evaluator] = {}
"""This process's evaluators by subject; each holds the base's pictures of its prompts."""


def get_evaluator(study: Study, name: str) -> scoring.Evaluator:
    """Return the evaluator of a subject, the same for all arms."""
    subject = study.get_subject(name)
    protocol = study.protocol
    base = study.base.name
    key = f"{base} {subject} {protocol}"
    if key in EVALUATORS:
        return EVALUATORS[key]

    # the subject as the reference arm has it
    cell = Cell(
        stage="test",
        arm=study.reference,
        rank=1,
        subject=name,
        seed=0,
        learning_rate=1.0,
    )
    config = study.build_config(cell, 1, Path("unused"))
    photos = build_photo_report(config).photos

    # what is drawn and asked
    pictures = protocol.images_per_prompt
    plan = build_subject_plan(config, photos, seeds=tuple(range(pictures)))
    plan = plan.reduce_plan(
        templates=protocol.num_prompts,
        seeds=pictures,
        class_images=protocol.class_images,
        unrelated=protocol.unrelated,
        inference_steps=protocol.inference_steps,
    )

    # what it is compared with
    has_face = get_subject_kind(config).has_face
    encoders = load_encoders(base, protocol.clip, protocol.dino, faces=has_face)
    resolution_px = load_pipeline(study.base).resolution_px
    (evaluator,) = build_evaluators([config], photos, [plan], encoders, resolution_px)
    EVALUATORS[key] = evaluator
    return evaluator


STRIP_PX = 128
"""Side of a picture in a cell's strip."""
STRIP_LENGTH = 8
"""Most pictures in it."""


@dataclass(frozen=True)
class Progress:
    """Report that one more cell is finished, or has failed with `error`.

    done, total: cells of this stage
    seconds: that it took
    """

    cell: Cell
    done: int
    total: int
    seconds: float
    error: str = ""


def run_study(
    study: Study,
    out: Path,
    jobs: int,
    on_progress: Callable[[Progress], None],
    runner: Callable | None = None,
) -> list[CellResult]:
    """Tune, then test; cells with a result in `out` are not run again.

    study: what to compare
    out: the folder of the results
    jobs: trainings at once; with 0 only finished results are read
    on_progress: called as each cell ends
    runner: replaces `run_cells`

    A failed cell does not stop the others; a second run tries it again. A learning rate at which a
    training fails cannot be chosen. Returns all results, without failed cells.
    """
    ranks = choose_ranks(study) if jobs else {}
    runner = runner or run_cells

    # What an earlier call has left is read, the rest is trained.
    def run_stage(cells: list[Cell]) -> list[CellResult]:
        todo = [cell for cell in cells if not get_result_path(study, cell, out).is_file()]
        done = len(cells) - len(todo)
        for cell, seconds, error in runner(study, todo, ranks, out, jobs) if jobs else ():
            done += not error
            on_progress(
                Progress(cell=cell, done=done, total=len(cells), seconds=seconds, error=error)
            )
        return read_results(study, cells, out)

    # The rates are tuned first, on subjects of their own.
    tuned = run_stage(study.list_tuning_cells())
    return tuned + run_stage(choose_test_cells(study, tuned))


def choose_test_cells(study: Study, tuned: Sequence[CellResult]) -> list[Cell]:
    """Choose the cells of the comparison, once every arm and rank with several rates has at least
    one to choose."""
    to_choose = {(cell.arm, cell.rank) for cell in study.list_tuning_cells()}
    if to_choose <= build_rate_curves(study, tuned).keys():
        return study.list_test_cells(choose_best_rates(study, tuned))
    return []


def list_unfinished(study: Study, out: Path) -> list[Cell]:
    """List the cells without a result in `out`; of the comparison only those whose learning rate
    has been chosen."""
    cells = study.list_tuning_cells()
    cells += choose_test_cells(study, read_results(study, cells, out))
    return [cell for cell in cells if not get_result_path(study, cell, out).is_file()]


def run_cells(
    study: Study, cells: list[Cell], ranks, out: Path, jobs: int
) -> Iterator[tuple[Cell, float, str]]:
    """(cell, seconds, error) as they end; several jobs are processes that share the GPUs."""
    # one after the other, in this process
    if jobs == 1 or len(cells) <= 1:
        for cell in cells:
            yield run_cell(study, cell, ranks[cell.arm, cell.rank], out, jobs)
        return

    # several processes, each with its share of the cores; CUDA does not survive a fork
    threads = max(1, (os.cpu_count() or 1) // jobs)
    context = get_context("spawn")
    begun = (threads, os.getpid(), context.Value("i", 0))
    with ProcessPoolExecutor(jobs, context, begin_worker, begun) as pool:
        futures = []
        for cell in cells:
            rank = ranks[cell.arm, cell.rank]
            futures.append(pool.submit(run_cell, study, cell, rank, out, jobs))
        try:
            for future in as_completed(futures):
                yield future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def run_cells_on_cluster(
    machines: fleet.Machines,
    max_tasks: int | None,
    study: Study,
    cells: list[Cell],
    ranks,
    out: Path,
    _jobs: int,
) -> Iterator[tuple[Cell, float, str]]:
    """Run the cells like `run_cells`, as tasks of the connected cluster.

    machines: of the cluster
    max_tasks: trainings at once; None for as many as the machines hold
    """

    # Made one by one: what a cell takes of a machine is only known with its settings.
    def build_tasks() -> Iterator[ray_fleet.Task]:
        for cell in cells:
            rank = ranks[cell.arm, cell.rank]
            needs = machines.estimate_resources(study.build_config(cell, rank, out))
            jobs = max_tasks or min(len(cells), ray_fleet.count_slots(needs))
            arguments = (study, cell, rank, out, jobs, os.getcwd())
            yield ray_fleet.Task(cell, arguments, needs)

    started = time.monotonic()
    for task, result in ray_fleet.run_tasks(run_cell, build_tasks(), window=max_tasks):
        if isinstance(result, ray_fleet.LostTask):
            result = (task.key, time.monotonic() - started, result.reason)
        yield result


def begin_worker(threads: int, parent: int, begun: Synchronized) -> None:
    """Prepare one of several processes that train: its share of the cores, a GPU, and an end with
    its parent.

    threads: of this process
    parent: process id of the one that started it
    begun: how many have begun before
    """
    torch.set_num_threads(threads)
    with begun.get_lock():
        number = begun.value
        begun.value += 1
    gpu = choose_gpu(number, torch.cuda.device_count(), os.environ.get("CUDA_VISIBLE_DEVICES"))
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu  # read when the process first uses a GPU
    processes.watch_parent(parent, partial(os._exit, 1))


def choose_gpu(number: int, count: int, visible: str | None) -> str | None:
    """Return the driver's name of worker `number`'s GPU: one of `count`, of those `visible`. None
    without a choice."""
    names = visible.split(",") if visible else [str(gpu) for gpu in range(count)]
    return names[number % count] if count > 1 else None


def run_cell(
    study: Study, cell: Cell, rank: int, out: Path, jobs: int, folder: str = ""
) -> tuple[Cell, float, str]:
    """Train, score, write the result, delete the run folder.

    study, cell: what to train
    rank: the real one (see `Study.budget`)
    out: the folder of the results
    jobs: trainings at once, which is noted with the cost
    folder: where the study's relative paths begin; empty for this process's own

    Returns the cell, seconds, and the error, or "".
    """
    if folder:
        os.chdir(folder)

    # train and score in a folder that no other process has
    started = time.monotonic()
    work = out / "running" / f"{cell.name}-{os.getpid()}"
    config = study.build_config(cell, rank, work)
    try:
        cost = train_cell(config, out) if study.should_train(cell.arm) else ZERO_COST
        evaluation = evaluate_cell(study, cell, work)
    except Exception as error:  # one failed cell must not end the study
        return cell, time.monotonic() - started, f"{type(error).__name__}: {error}"
    finally:
        shutil.rmtree(work, ignore_errors=True)

    # write the pictures, then the result, by which the cell counts as finished
    path = get_result_path(study, cell, out)
    path.parent.mkdir(parents=True, exist_ok=True)
    draw_strip(evaluation.pictures["subject"]).save(path.with_suffix(".jpg"), quality=85)
    cost = cost | {"rank": rank, "evaluation_seconds": evaluation.seconds, "jobs": jobs}
    pictures = {}
    for name in list_image_measures():
        pictures[name] = [round(float(value), 5) for value in evaluation.tables[name].ravel()]
    result = CellResult(
        cell=cell, scores=evaluation.summarize_scores(), pictures=pictures, cost=cost
    )
    write_atomic(path, json.dumps(asdict(result)) + "\n")
    return cell, time.monotonic() - started, ""


ZERO_COST = {"seconds": 0.0, "step_sec": 0.0, "memory_gib": 0.0, "parameters": 0}
"""What a cell costs that draws by references."""


def train_cell(config: TrainConfig, out: Path) -> dict[str, float]:
    """Train; returns seconds in total and per step (median), peak memory and the number of trained
    parameters."""
    # the peak of this training alone, though the process has trained others
    processes.reset_peak_memory()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()

    started = time.monotonic()
    result = train(replace(config, caching="disk", **choose_class_folder(config, out)))
    steps = events.filter_events(events.StepDone, run_folder.RunDir(result.run_dir).read_events())
    return {
        "seconds": time.monotonic() - started,
        "step_sec": median(event.step_sec for event in steps),
        "memory_gib": max(event.memory_gib or 0.0 for event in steps),
        "parameters": count_parameters(config, config.rank),
    }


def choose_class_folder(config: TrainConfig, out: Path) -> dict[str, str]:
    """Return the folder of the class images: made once by each process, the same for all arms."""
    if not config.with_prior_preservation or config.class_data_dir:
        return {}

    # a folder of each process, as two must not write the same one
    process_name = f"s{config.seed}-{platform.node()}-{os.getpid()}"
    name = f"{Path(config.instance_data_dir).name}-{process_name}"
    return {"class_data_dir": str(out / "class_images" / name)}


def draw_strip(pictures: Iterable[Image.Image]) -> Image.Image:
    """Draw the first pictures in one row, small."""
    some = list(pictures)[:STRIP_LENGTH]
    sheet = Image.new("RGB", (STRIP_PX * len(some), STRIP_PX))
    for number, picture in enumerate(some):
        sheet.paste(picture.resize((STRIP_PX, STRIP_PX)), (number * STRIP_PX, 0))
    return sheet
