"""From a filled form to a run, and from an earlier run or a recipe (“Train like”) back to the form.

A run is started, queued, or told what it will cost, as `--dry_run` estimates it. Of an uploaded
file only the recipe is kept, so it need not fit this base.
"""

import json
import re
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from dreambooth_moslora.base.base import Base
from dreambooth_moslora.disk import queue, run_folder
from dreambooth_moslora.disk.contents import small_text
from dreambooth_moslora.disk.paths import free_name
from dreambooth_moslora.errors import UserError
from dreambooth_moslora.lora.metadata import check_start_file
from dreambooth_moslora.plan.choices import USUAL_EXPOSURES, Choices, choose_recipe
from dreambooth_moslora.plan.memory import Estimate
from dreambooth_moslora.plan.plan import plan_steps
from dreambooth_moslora.settings import prompts, sources, table
from dreambooth_moslora.ui import generate_values, html, state
from dreambooth_moslora.ui.jobs import MAX_RUN_NAME, Job, Jobs
from dreambooth_moslora.ui.photo_copies import kept_photos
from dreambooth_moslora.ui.train import train_form
from dreambooth_moslora.ui.train.train_form import MOST_SUBJECTS, TrainForm, folder_of, photos_of
from dreambooth_moslora.ui.workspace import Workspace

LIKE = "like"
"""Folder in a run, with the recipe that the run was given: NAME.json."""


def recipe_names(ctx: state.AppContext) -> list[str]:
    """What “Train like” offers: none, the uploaded files, then the adapters."""
    return [run_folder.NONE, *ctx.workspace.recipes, *ctx.catalog.files()]


def recipe_of(ctx: state.AppContext, name: str | None) -> sources.FoundRecipe | None:
    """The recipe of that name; None of “none”.

    Raises UserError for an unlisted name, and for an adapter without a recipe.
    """
    name = str(name or run_folder.NONE)
    if name == run_folder.NONE:
        return None
    return ctx.workspace.recipes.get(name) or read(ctx.catalog.path(name), name)


def add_recipe(ctx: state.AppContext, uploaded: str | Path) -> str:
    """Keep the recipe of an uploaded file; returns its name. Raises UserError."""
    file = Path(uploaded)
    state.check_suffix(file)
    found = read(file, file.name)
    name = free_name(run_folder.clean_name(file.name), recipe_names(ctx).__contains__, " ")
    keep_recipe(ctx, name, found)
    return name


def keep_recipe(ctx: state.AppContext, name: str, recipe: sources.FoundRecipe | None) -> None:
    """Keep a recipe that a run was given, unless its name is listed."""
    if recipe is not None and name not in recipe_names(ctx):
        ctx.workspace.recipes[name] = recipe


def read(file: Path, name: str) -> sources.FoundRecipe:
    """The recipe in a file, which an error calls `name`. Raises UserError for one without any."""
    try:
        return sources.recipe_in_file(file)
    except UserError as error:
        raise UserError(f"nothing is taken from {name}: {error}") from error


def form_of_run(
    settings: Mapping[str, Any], photos_dir: Path, form: type[TrainForm] = TrainForm
) -> TrainForm:
    """The form that makes a run of these settings.

    - `settings` are those that the run was started with.
    - `photos_dir` is the folder of the first subject's photos in the run.

    Raises UserError for settings that no form has.
    """
    config = table.TrainConfig.from_dict(dict(settings) | {"resume_from_checkpoint": None})
    subjects = config.each_subject
    count = len(subjects)
    if count > MOST_SUBJECTS:
        raise UserError(f"the run has {count} subjects, and the form {MOST_SUBJECTS} at most")
    # The fields that each fill one setting, but for the length, which is said by preset if it can.
    values = train_form.values_from(vars(config), config.pretrained_model_name_or_path, form)
    values["steps"] = 0
    # The words of each subject; the first one's are fields of the form.
    words = []
    for number, subject in enumerate(subjects, 1):
        words.append(words_of(subject, folder_of(photos_dir, number)))
    first, *others = words
    values |= vars(first)
    # What it was made from.
    like, recipe = like_of_run(photos_dir.parent)
    values |= length_of(config, photos_dir, count, recipe)
    if config.init_adapter:
        values["begin_with"] = Path(config.init_adapter).stem
    scores = bool(config.evaluate_steps)
    return form(**values, scores=scores, like=like, others=tuple(others))


def words_of(config: table.TrainConfig, photos_dir: Path) -> train_form.SubjectWords:
    """The words of a subject with these settings, and the captions beside its photos."""
    captions = ""
    for photo in kept_photos(photos_dir):
        # A photo without a caption has an empty line.
        with suppress(OSError):
            text = photo.with_suffix(".txt").read_text(encoding="utf-8", errors="replace")
            captions += " ".join(text.split())
        captions += "\n"
    subject = prompts.subject_of(config)
    return train_form.SubjectWords(
        class_word=subject.class_word,
        token=subject.token,
        captions=captions.rstrip(),
        tokens_begin_as=config.initializer_concept or "",
    )


def like_of_run(run_dir: Path) -> tuple[str, sources.FoundRecipe | None]:
    """The name and content of the recipe that the run was given."""
    # Anyone may have changed the file.
    for file in (run_dir / LIKE).glob("*.json"):
        try:
            settings = json.loads(small_text(file))
            return file.stem, sources.FoundRecipe(sources.checked_recipe(settings)[0])
        except (OSError, ValueError, AttributeError, RecursionError):
            break
    return TrainForm.like, None


def length_of(
    config: table.TrainConfig, photos_dir: Path, subjects: int, recipe: sources.FoundRecipe | None
) -> dict[str, Any]:
    """The form's value for the length of a run: a preset if one fits, else a number of steps.

    - `config` are the run's settings, and `photos_dir` its first subject's photos.
    - `subjects` is how many there are.
    - `recipe` is the one that the run was given; without one the base's own counts.
    """
    # What the recipe says.
    if recipe is None:
        base = config.pretrained_model_name_or_path
        choices = Choices({"pretrained_model_name_or_path": base})
        lengths = {"exposures_per_photo": choose_recipe(choices, train_form.free_for(base))}
    else:
        said = recipe.settings
        lengths = {name: said[name] for name in said if name in train_form.LENGTHS}
        lengths = lengths or {"exposures_per_photo": USUAL_EXPOSURES}
    # The preset by which that becomes the run's length.
    for name, share in train_form.PRESETS.items():
        wanted = train_form.lengths_in(lengths, share)
        if all(getattr(config, length) == value for length, value in wanted.items()):
            return {"preset": name}
    counts = [max(1, len(photos_of(photos_dir, number))) for number in range(1, subjects + 1)]
    return {"steps": plan_steps(config, counts).total_steps}


def take_photos_of_run(run_dir: Path, workspace: Workspace, subjects: int) -> None:
    """The run's photos and masks come into the form, in place of what is there.

    Raises UserError where those of one of its `subjects` are gone.
    """
    photos_dir = run_dir / "photos"
    with workspace.changing:
        if not all(photos_of(photos_dir, number) for number in range(1, subjects + 1)):
            raise UserError("the photos of this run are not there any more")
        for number in range(1, MOST_SUBJECTS + 1):
            source = folder_of(photos_dir, number)
            target = folder_of(workspace.photos_dir, number)
            shutil.rmtree(target, ignore_errors=True)
            if number <= subjects:
                shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.txt"))


BUSY = "another run is going on or waits; “Add to queue” lets this one wait for its turn"
PAUSED = "; the queue is paused, which “Go on” there ends"
"""Why a run is not started; the second part where it applies."""
BEGUN_WITH = "begun_with"
"""Folder in a run, with a copy of the adapter that the run begins with."""

# Lines of the cards.
TIME_KNOWN = "time: at the pace of the last such run here"
TIME_UNKNOWN = "time: not known before the first run here; the page shows it after a few steps"
CHOSEN = "Chosen; “More settings” changes it."


@dataclass(frozen=True)
class Prepared:
    """A new run folder with the photos in it, its settings, and what was chosen for them."""

    run_dir: Path
    settings: dict[str, Any]
    said: list[str]


def start_run(ctx: state.AppContext, form: TrainForm) -> tuple[Job, str]:
    """The started run, and what was chosen for it as HTML. Raises UserError."""
    if ctx.jobs.current() or not ctx.queue.is_empty:
        raise UserError(BUSY + PAUSED * ctx.queue.queue.is_paused)
    with prepared(ctx, form) as run:
        job = ctx.jobs.start(run.run_dir.name, run.settings)
    return job, html.remarks_card(run.said, f"{job.name} has started. {CHOSEN}")


def add_to_queue(ctx: state.AppContext, form: TrainForm) -> tuple[str, str]:
    """The name of the run, which waits until those before it have ended, and HTML.

    Raises UserError.
    """
    with prepared(ctx, form, is_queued=True) as run:
        name = run.run_dir.name
        queued = queue.QueuedRun(name, settings=run.settings, is_new=True, queued=time.time())
        place = ctx.queue.queue.add(queued)
    return name, html.remarks_card(run.said, f"{name} waits, number {place} in the queue. {CHOSEN}")


@contextmanager
def prepared(
    ctx: state.AppContext,
    form: TrainForm,
    *,
    is_queued: bool = False,
) -> Iterator[Prepared]:
    """Prepare the run folder.

    It is deleted when the block fails, which frees its name. With `is_queued` the run begins when
    all others have ended. Raises UserError.
    """
    from dreambooth_moslora.plan.checks import check_settings, family_settings

    # The settings, as the page's photos give them.
    photos = ctx.workspace.given_photos
    train_form.prompts_of(form.token, form.class_word)
    run_dir = free_run_dir(ctx.jobs, form)
    recipe = recipe_of(ctx, form.like)
    choices = form.choices(
        base=ctx.base_name,
        resolution_px=ctx.resolution_px,
        photos_dir=photos,
        run_dir=run_dir,
        is_queued=is_queued,
        recipe=recipe,
    )

    # The run reads its own copies: a queued run may begin when photos and uploads are gone.
    begun_with = adapter_of(ctx, form)
    places = form.photos_given(run_dir / "photos")
    if begun_with is not None:
        places["init_adapter"] = str(run_dir / BEGUN_WITH / f"{form.begin_with}.safetensors")
    config = table.TrainConfig.from_dict(choices.all | places)
    try:
        run_dir.mkdir(parents=True)
    except FileExistsError as error:
        raise UserError("another run of that name is just being started; try again") from error
    try:
        with ctx.workspace.changing:
            for number in range(1, len(form.subjects) + 1):
                shutil.copytree(folder_of(photos, number), folder_of(run_dir / "photos", number))
        form.write_captions(run_dir / "photos")
        if begun_with is not None:
            (run_dir / BEGUN_WITH).mkdir()
            shutil.copyfile(begun_with, config.init_adapter)
        if recipe is not None:
            (run_dir / LIKE).mkdir()
            file = run_dir / LIKE / f"{form.like}.json"
            file.write_text(json.dumps(recipe.settings), encoding="utf-8")
        # What training would refuse is refused here, where the form can still be changed.
        base = Base.of(config)
        check_settings(replace(config, **family_settings(config, base)), base)
        yield Prepared(run_dir=run_dir, settings=config.to_dict(), said=said_of(form, choices))
    except BaseException:
        shutil.rmtree(run_dir, ignore_errors=True)
        raise


def adapter_of(ctx: state.AppContext, form: TrainForm) -> Path | None:
    """The file that the run goes on from; None of “none”.

    Raises UserError for a file that no run begins with, or that is not listed.
    """
    name = str(form.begin_with or run_folder.NONE)
    if name == run_folder.NONE:
        return None
    file = ctx.catalog.path(name)
    try:
        check_start_file(file)
    except UserError as error:
        raise UserError(f"“Begin with” {name}: {error}") from error
    return file


def said_of(form: TrainForm, choices: Choices) -> list[str]:
    """What a run of this form begins with, and what was chosen for it."""
    said = [words for words, _ in choices.said]
    name = str(form.begin_with or run_folder.NONE)
    if name == run_folder.NONE:
        return said
    return [f"begins with what the adapter {name} has learnt", *said]


def free_run_dir(jobs: Jobs, form: TrainForm) -> Path:
    """The wanted name, or one from the class words; a number is added when it is taken."""
    words = "-".join(str(subject.class_word) for subject in form.subjects)
    wanted = str(form.run_name or words)
    # What a RUN_NAME may have, and dashes for the rest.
    wanted = re.sub(r"[^\w.+-]+", "-", wanted)
    wanted = re.sub(r"\.{2,}", ".", wanted)
    wanted = re.sub(r"^[\W_]+", "", wanted)
    wanted = wanted[:MAX_RUN_NAME].rstrip(".-") or "run"
    return jobs.run_dir(free_name(wanted, lambda name: jobs.run_dir(name).exists(), "-"))


def estimate_cost(ctx: state.AppContext, form: TrainForm) -> str:
    """Memory, time and disk as HTML, and folded below them what they follow from.

    Raises UserError for whatever training would refuse.
    """
    from dreambooth_moslora.plan.plan import make_plan
    from dreambooth_moslora.training.dry_run import advice, cost_lines, step_lines

    # The run's plan. Its folder is not made.
    choices = form.choices(
        base=ctx.base_name,
        resolution_px=ctx.resolution_px,
        photos_dir=ctx.workspace.given_photos,
        run_dir=ctx.runs_dir / "new",
        recipe=recipe_of(ctx, form.like),
    )
    config = table.TrainConfig.from_dict(choices.all)
    plan = make_plan(config, free_gib=train_form.free_gib(), is_later=True)
    adapter_of(ctx, form)
    # Line by line: the choices, the steps, the time, the memory, the card, and what could be
    # better.
    seconds = seconds_of(ctx.jobs, plan.config, plan.steps.total_steps)
    lines = said_of(form, choices)
    lines += step_lines(plan)
    lines.append(TIME_KNOWN if seconds else TIME_UNKNOWN)
    lines += cost_lines(plan)
    lines += card_lines(plan.config, plan.cost)
    lines += advice(plan)
    # The three numbers that decide.
    memory = f"{plan.cost.peak_gib:.1f} GiB of memory"
    time_needed = "time not known yet"
    if seconds:
        time_needed = f"about {generate_values.format_seconds(seconds)}"
    disk = f"{plan.cost.disk_gib:.2f} GiB on the disk"
    return html.folded_card(f"{memory} · {time_needed} · {disk}", lines)


def card_lines(config: table.TrainConfig, cost: Estimate) -> list[str]:
    """Device and plan of the run, for the cost estimate; `config` has its memory plan."""
    import torch

    free = train_form.free_gib()
    if free is None:
        return ["GPU: none is here, so it trains on the CPU"]
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "Apple's"
    line = f"GPU: {name}, {free:.1f} GiB free for this run"
    if config.mixed_precision:
        recomputed = "with" if config.gradient_checkpointing else "without"
        precision = "fp32" if config.mixed_precision == "no" else config.mixed_precision
        line += f", so it trains in {precision}, {recomputed} gradient checkpointing"
    if config.base_quantization != "none":
        line += f", the base in {config.base_quantization}"
    lines = [line]
    if cost.peak_gib > free:
        lines.append("the GPU may have too little memory even so")
    return lines


def seconds_of(jobs: Jobs, config: table.TrainConfig, total_steps: int) -> float | None:
    """The time that a run takes, s, at the pace of this machine's newest run that is like it.

    None before the first such run.
    """
    # What decides the pace.
    alike = (
        "pretrained_model_name_or_path",
        "resolution",
        "train_batch_size",
        "gradient_accumulation_steps",
        "with_prior_preservation",
        "gradient_checkpointing",
        "base_quantization",
    )
    for job in jobs.all():
        metrics = jobs.metrics(job)
        earlier = metrics.last("start").get("config", {})
        paces = [event["step_sec"] for event in metrics.of("step")[-50:] if event.get("step_sec")]
        if paces and all(earlier.get(name) == getattr(config, name) for name in alike):
            return median(paces) * total_steps
    return None


def recipe_values(ctx: state.AppContext, preset: str, like: str | None) -> dict[str, str]:
    """What each empty field stands for, by its name.

    That is the recipe's value. For the steps it is how many show these photos as often as the
    recipe says. Raises UserError for an unlisted preset or recipe.
    """
    # The settings of the recipe, the base's own or that of a file.
    form = TrainForm(token="sks", class_word="x", preset=preset, like=like or run_folder.NONE)
    recipe = recipe_of(ctx, like)
    share = train_form.PRESETS[form.checked("preset")]
    if recipe is not None:
        settings = train_form.taken_from(recipe, {}, share)
        exposures = USUAL_EXPOSURES
    else:
        choices = Choices({"pretrained_model_name_or_path": ctx.base_name})
        exposures = choose_recipe(choices, train_form.free_for(ctx.base_name))
        settings = choices.all
    # As the fields show them. What a recipe leaves out is as the table of settings has it.
    shown = {}
    for name, row in train_form.rows(TrainForm).items():
        if not row.by_recipe or name == "steps":
            continue
        value = settings.get(row.setting)
        if value is None:
            value = table.SETTINGS[row.setting].default
        shown[name] = f"{value:g}"
    steps = steps_of(ctx, form, recipe) or f"{round(share * exposures)} times each photo"
    return shown | {"steps": steps}


def steps_of(ctx: state.AppContext, form: TrainForm, recipe: sources.FoundRecipe | None) -> str:
    """The number of steps for the photos of the first subject; "" without usable ones."""
    with suppress(UserError):
        photos = ctx.workspace.given_photos
        run_dir = ctx.runs_dir / "new"
        config = form.config(ctx.base_name, ctx.resolution_px, photos, run_dir, recipe=recipe)
        plan = plan_steps(table.TrainConfig.from_dict(config), [len(kept_photos(photos))])
        return str(plan.total_steps)
    return ""
