"""The programs as a person starts them: exit codes, one line for a mistake, stopping, the terminal
and the preview."""

import errno
import io
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import diffusers
import pytest
import transformers
from diffusers import UNet2DConditionModel
from safetensors import safe_open
from tqdm import tqdm

from dreambooth_moslora import __version__
from dreambooth_moslora.base.library_notes import disable_library_notes
from dreambooth_moslora.cli import terminal
from dreambooth_moslora.cli.command_train import format_ending, run_trainer, train_main
from dreambooth_moslora.cli.main import COMMANDS, load_command, main
from dreambooth_moslora.cli.parser import CommandParser
from dreambooth_moslora.cli.terminal import (
    EXIT_INTERRUPTED,
    STEP_BAR_FORMAT,
    StopRequest,
    TerminalProgress,
    run_to_exit_code,
)
from dreambooth_moslora.disk.events import PhaseProgress, RunStarted, StepDone, StepEvaluated
from dreambooth_moslora.disk.paths import get_assets_folder
from dreambooth_moslora.disk.processes import STOP_FILE_VARIABLE, send_stop_request
from dreambooth_moslora.disk.run_folder import PUBLISHED_NAME, RunDir, read_checkpoint_step
from dreambooth_moslora.extras.serving.catalogue import open_catalogue
from dreambooth_moslora.plan import distributed
from dreambooth_moslora.plan.plan import make_plan
from dreambooth_moslora.training.checkpoint import write_settings
from dreambooth_moslora.training.loop import TrainResult, train
from tests.helpers.command_line import parse_train_config
from tests.helpers.tiny_training import paint_photos, tiny_config

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "train_dreambooth.py"
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
STOPPER = """
import os, signal, time
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may have been started by nohup
from dreambooth_moslora.cli.terminal import StopRequest
with StopRequest() as stop:
    print("ready", flush=True)
    while not stop():
        time.sleep(0.01)
    print("saving", flush=True)
    time.sleep(60 if "HANG" in os.environ else 0.3)
print("saved", flush=True)
"""


def build_flags(base, photos, run):
    arguments = [
        "--pretrained_model_name_or_path",
        base,
        "--instance_data_dir",
        photos,
        "--instance_prompt",
        "x",
    ]
    return [
        *map(str, arguments),
        "--output_dir",
        str(run),
        "--resolution",
        "64",
        "--report_to",
        "none",
    ]


@pytest.fixture
def photos(tmp_path):
    return paint_photos(tmp_path / "photos")


def run_python(*arguments, **options) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *arguments], env=ENVIRONMENT, capture_output=True, text=True, **options
    )


IMPORTED = """
import json, sys
from dreambooth_moslora.cli.main import main
for arguments, code, unneeded in json.loads(sys.argv[1]):
    try:
        exit_code = main(arguments)
    except SystemExit as ended:
        exit_code = ended.code
    imported = sys.modules.keys() & set(unneeded.split())
    assert exit_code == code and not imported, (arguments, exit_code, imported)
"""


def test_commands_import_torch_only_when_needed(photos):
    before, libraries = sorted(photos.iterdir()), "torch diffusers numpy PIL"
    cases = [
        (["train", *arguments], code, libraries)
        for arguments, code in ((["--help"], 0), (["--rnak", "3"], 2), ([], 2))
    ]
    cases += [(["train", *build_flags("toy", ".", folder)], 2, "torch") for folder in (".", "")]
    cases += [(["train", *build_flags("toy", ".", "run"), "--dry_run"], 0, "torch")]
    rocket = get_assets_folder() / "adapters" / "rocket.safetensors"
    cases += [(["info", str(rocket)], 0, "diffusers transformers peft accelerate")]
    done = run_python("-c", IMPORTED, json.dumps(cases), cwd=photos)
    assert done.returncode == 0, done.stderr
    assert sorted(photos.iterdir()) == before


def test_the_programs_own_files_are_found_from_another_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    rocket, photos = "assets/adapters/rocket.safetensors", "assets/subjects/rocket"
    arguments = ["train", photos, "rocket", "--init_adapter", rocket, "--dry_run"]
    assert main(arguments) == 0, capsys.readouterr().err
    assert open_catalogue(["assets/adapters"]).list_names() == ["rocket"]


def test_overview_lists_commands_and_first_steps(capsys):
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(f"  {name:9} {help_line}\n" in out for name, (_, help_line) in COMMANDS.items())
    steps, readme = (
        out.partition("first steps")[2].splitlines()[1:],
        (ROOT / "README.md").read_text(encoding="utf-8"),
    )
    assert len(steps) == 3 and all(
        f"python -m dreambooth_moslora {step.strip()}" in readme for step in steps
    )
    assert main(["--version"]) == 0 and capsys.readouterr().out == f"{__version__}\n"


WITHOUT_TORCH = """
import sys
# to import them raises an error
sys.modules["torch"] = sys.modules["diffusers"] = sys.modules["gradio"] = None
from dreambooth_moslora.cli.main import main
print([main(line.split()) for line in sys.argv[1:]])
"""
ABSENT = {
    "info x.safetensors": "there is no file x.safetensors",
    "generate --prompt dog --adapter x": "there is no adapter file x",
    "generate --prompt dog --base x": "the base x does not exist",
    # that of the run's settings
    "generate --prompt dog --adapter run:0.5": "the base ./gone does not exist",
    "generate --prompt dog --adapter run/best": "the base ./gone does not exist",
    "evaluate x": "there is no adapter file x",
    "evaluate dog.safetensors --photos x": "x: no such folder",
    "evaluate dog.safetensors --base x": "the base x does not exist",
    "export x --out y": "there is no file or folder x",
    "explain x": "x holds no run",
    "enlarge x.jpg dog": "x.jpg: there is no such photo",
    "check x dog": "x: no such folder",
    "caption x --subject dog": "x: no such folder",
    "train x dog": "x: no such folder",
    "train photos dog --pretrained_model_name_or_path x": "the base x does not exist",
    "train --config x.toml": "--config x.toml: there is no such file",
    "compare x dog": "x: no such folder",
    "compare --config x.toml": "--config x.toml: there is no such file",
    "fleet x --out y --pretrained_model_name_or_path toy": "x: give a folder of subject folders",
    "fleet status x": "{here}/x holds no fleet",
    "fleet status ~/x": "{here}/x holds no fleet",
    "evaluate dog.safetensors --output_dir dog.safetensors": "--output_dir dog.safetensors",
    "generate --prompt dog --output_dir dog.safetensors": "--output_dir dog.safetensors: "
    "cannot be written: Not a directory",
    "generate --prompt dog --output_dir ~/dog.safetensors": "--output_dir {here}/dog.safetensors: ",
    "serve --adapters x": "--adapters x: there is no such folder",
    "serve --adapters . --pretrained_model_name_or_path x": "the base x does not exist",
    "app --base x": "the base x does not exist",
    "app --runs_dir dog.safetensors": "--runs_dir dog.safetensors cannot be a folder",
    "generate --prompt dog --adapter ~nobody_/x": "there is no adapter file ~nobody_/x",
    "export ~nobody_/x --out y": "there is no file or folder ~nobody_/x",
    "app --base ~nobody_/x": "the base ~nobody_/x does not exist",
}


def test_missing_path_is_reported_before_torch_is_imported(tmp_path):
    """Its import takes half a minute on a busy machine."""
    (tmp_path / "dog.safetensors").write_bytes(b"")
    (tmp_path / "photos").mkdir()
    for folder in (tmp_path / "run", tmp_path / "run" / "best"):
        folder.mkdir()
        (folder / PUBLISHED_NAME).write_bytes(b"")
    RunDir(tmp_path / "run").config_path.write_text('{"pretrained_model_name_or_path": "./gone"}')
    environment = {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "HOME": str(tmp_path)}
    command = [sys.executable, "-c", WITHOUT_TORCH, *ABSENT]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.stdout == f"{[2] * len(ABSENT)}\n", done.stderr
    errors = [
        line
        for line in done.stderr.splitlines()
        if not line.startswith("base: ./gone, which the run in ")
    ]
    for line, message in zip(errors, ABSENT.values(), strict=True):
        assert line.startswith(f"error: {message.format(here=tmp_path)}")


UNFINISHED = {
    "trian": "unknown command trian: did you mean train?",
    "xyz": "unknown command xyz: choose one of",
    "check": "the following arguments are required",
    "train": "say which photos to train, and what they show, as in `train photos/dog dog`; "
    "--help shows the flags.\n",
    "train --rank 4": "missing: --base, --instance_prompt, --instance_data_dir",
}


@pytest.mark.parametrize("arguments", UNFINISHED)
def test_a_mistyped_or_unfinished_command_is_one_line(arguments, capsys):
    assert main(arguments.split()) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {UNFINISHED[arguments]}") and error.count("\n") == 1


@pytest.mark.parametrize("command", ["check", "compare"])
@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--flag=a b", "unknown flag --flag; see"),
        ("-x y", "unknown flag -x y"),
        ("--rnak=4 5", "--rank?"),
    ],
)
def test_a_flag_that_is_none_is_no_word_of_the_subject(command, flag, message, tmp_path, capsys):
    assert main([command, str(tmp_path), flag]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1


GUESSED = {
    "train photos dog --steps 9": "did you mean --max_train_steps?",
    "train photos dog --lr 1": "did you mean --learning_rate?",
    "train photos dog --epochs 9": "did you mean --num_train_epochs?",
    "train photos dog --model x": "did you mean --base?",
    "train photos dog --prompt x": "did you mean --instance_prompt?",
    "train photos dog --gpu 1": "CUDA_VISIBLE_DEVICES in the environment chooses one",
    "fleet photos --device cuda": "CUDA_VISIBLE_DEVICES in the environment chooses one",
    "generate --model x": "did you mean --base?",
    "generate --setps 9": "did you mean --steps?",
    "doctor --verbose": "see --help",
}


@pytest.mark.parametrize("arguments", GUESSED)
def test_guessed_flag_names_the_real_one(arguments, capsys):
    """`train --steps` was said to be unknown, and `--base` to be `--base_quantization`."""
    assert main(arguments.split()) == 2
    error = capsys.readouterr().err
    flag = next(word for word in arguments.split() if word.startswith("--"))
    assert error.startswith(f"error: unknown flag {flag}") and error.count("\n") == 1
    assert GUESSED[arguments] in error


@pytest.mark.parametrize("flag", ["--base", "--pretrained_model_name_or_path"])
@pytest.mark.parametrize(
    "arguments",
    [
        "train {photos} dog",
        "check {photos} dog",
        "compare {photos} dog",
        "generate --prompt dog",
        "evaluate dog.safetensors",
        "enlarge {photos}/0.png dog",
        "serve --adapters .",
        "app",
    ],
)
def test_every_command_takes_the_base_by_both_names(arguments, flag, photos, monkeypatch, capsys):
    """Its name was `--base` in one half of them, and diffusers' in the other."""
    monkeypatch.chdir(photos.parent)
    Path("dog.safetensors").touch()
    assert main([*arguments.format(photos=photos).split(), flag, "my models/x"]) == 2
    assert "the base my models/x does not exist" in capsys.readouterr().err


def test_a_file_names_the_base_as_a_flag_does_and_once(photos, monkeypatch, capsys):
    monkeypatch.chdir(photos.parent)
    for name in ("base", "pretrained_model_name_or_path"):
        Path("a.toml").write_text(f'{name} = "toy"\n[photos]\nlora_layers = "to_q"')
        config = parse_train_config([str(photos), "dog", "--config", "a.toml"])
        assert config.pretrained_model_name_or_path == "toy" and config.target_modules == ("to_q",)
    Path("a.toml").write_text('base = "toy"\npretrained_model_name_or_path = "toy"')
    assert main(["train", str(photos), "dog", "--config", "a.toml"]) == 2
    assert "pretrained_model_name_or_path is given twice" in capsys.readouterr().err


def test_generate_accepts_diffusers_parameter_names(tmp_path):
    add_arguments, _ = load_command("generate")
    add_arguments(parser := CommandParser())
    arguments = "--num_inference_steps 9 --guidance_scale 2 --num_images_per_prompt 3"
    args = parser.parse_args(arguments.split())
    assert (args.steps, args.guidance_scale, args.num_images) == (9, 2.0, 3)


def raise_error(error):
    raise error


OUT_OF_MEMORY = (
    "alloc_cpu.cpp: DefaultCPUAllocator: can't allocate memory: 512 GB",
    "could not create a primitive",
    "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    "cuDNN error: CUDNN_STATUS_NOT_INITIALIZED",
    "CUDA driver error: out of memory",
    "HIP error: out of memory",
    "CUDA error: HIPBLAS_STATUS_ALLOC_FAILED when calling `hipblasCreate`",
    "miopenStatusAllocFailed",
    "MPS backend out of memory (MPS allocated: 8.95 GB, other allocations",
)


@pytest.mark.parametrize(
    ("error", "code", "says"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (ZeroDivisionError("ours"), 1, "Traceback"),
        (
            OSError(28, "No space left on device", "a.bin"),
            2,
            "No space left on device: a.bin; free",
        ),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), 2, "while a file was written; free some"),
        (OSError(errno.EFBIG, "File too large", "a.bin"), 2, "File too large: a.bin.\n"),
        (
            PermissionError(errno.EPERM, "Operation not permitted"),
            2,
            "Operation not permitted, while a file was written.",
        ),
        (type("_ArrayMemoryError", (MemoryError,), {})("numpy's"), 2, "out of memory: try"),
        *((RuntimeError(text), 2, "out of memory: try") for text in OUT_OF_MEMORY),
        (ImportError("libheif.so: failed to map segment from shared object"), 2, "out of memory"),
        (
            RuntimeError("could not create a primitive descriptor for the sum primitive."),
            1,
            "Traceback",
        ),
        (RuntimeError("HIP error: invalid argument"), 1, "Traceback"),
        (RuntimeError("cuDNN error: CUDNN_STATUS_BAD_PARAM"), 1, "Traceback"),
        (OSError("a library's own"), 1, "Traceback"),
    ],
)
def test_ends_have_their_codes(error, code, says, capsys):
    assert run_to_exit_code(lambda: raise_error(error)) == code
    assert says in capsys.readouterr().err


INTERRUPTER = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in a shell's background ignores it
class Interrupter:
    def find_spec(self, name, *_):
        if name == "dreambooth_moslora.errors":
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Interrupter())
"""


SLOW = [
    ["train", "photos", "dog"],
    ["generate", "--prompt", "dog"],
    ["evaluate", "dog.safetensors", "--photos", "photos", "--instance_prompt", "a sks dog"],
    ["doctor"],
    ["app", "--adapters_dir", "."],
]
DUCK = str(get_assets_folder() / "subjects" / "duck")
SLOW += [
    pytest.param(arguments, marks=pytest.mark.slow)
    for arguments in (
        ["info", "dog.safetensors"],
        ["export", "dog.safetensors", "--out", "exported"],
        ["check", "photos", "dog"],
        ["caption", DUCK, "--subject", "sks duck"],
        ["compare", "photos", "dog"],
        ["serve", "--adapters", "."],
    )
]


@pytest.mark.skipif(os.name != "posix", reason="a terminal")
@pytest.mark.parametrize("arguments", SLOW, ids=lambda arguments: arguments[0])
def test_a_person_is_told_that_pytorch_is_loaded_before_it_is(arguments, photos, tmp_path):
    """On a busy machine nothing was said for two minutes. The import is interrupted here."""
    (tmp_path / "sitecustomize.py").write_text(
        INTERRUPTER.replace('== "dreambooth_moslora.errors"', 'in ("torch", "gradio")')
    )
    shutil.copy(
        get_assets_folder() / "adapters" / "rocket.safetensors", tmp_path / "dog.safetensors"
    )
    environment = {**ENVIRONMENT, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    ours, theirs = os.openpty()
    command = [sys.executable, "-m", "dreambooth_moslora", *arguments]
    process = subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=theirs)
    os.close(theirs)
    assert process.wait(timeout=100) == EXIT_INTERRUPTED
    message = os.read(ours, 10_000).decode()
    os.close(ours)
    loading = "starting the page" if arguments[0] == "app" else "loading PyTorch"
    assert message == f"{loading} …\r\ninterrupted\r\n"


@pytest.mark.parametrize(
    "program", [[SCRIPT], [ROOT / "app.py"], ["-m", "dreambooth_moslora"]], ids=lambda p: p[-1]
)
def test_ctrl_c_during_the_imports_is_one_word(program, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(INTERRUPTER)
    environment = {**ENVIRONMENT, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    done = subprocess.run(
        [sys.executable, *program, "--help"], env=environment, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr, done.stdout) == (130, "interrupted\n", "")


def test_machine_error_ends_the_page_in_one_line():
    """Such as a folder that this user may not look into; it was a traceback."""
    command = [sys.executable, ROOT / "app.py", "--adapters_dir", name := "x" * 300]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (
        2,
        f"error: {os.strerror(errno.ENAMETOOLONG)}: {name}.\n",
    )


@pytest.mark.slow
def test_a_run_that_may_write_no_large_file_ends_in_one_line(photos, tiny_base, tmp_path):
    done = run_python(
        SCRIPT,
        *build_flags(tiny_base, photos, tmp_path / "run"),
        *("--max_train_steps", "1", "--train_batch_size", "1", "--num_validation_images", "0"),
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000)),
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "error: File too large" in done.stderr


@pytest.mark.slow
def test_console_without_utf8_gets_replacements(photos, tmp_path):
    arguments = [
        "train",
        str(photos),
        "dög雪",
        "--pretrained_model_name_or_path",
        "toy",
        "--dry_run",
    ]
    environment = ENVIRONMENT | {"PYTHONIOENCODING": "cp1252"}
    command = [sys.executable, "-m", "dreambooth_moslora", *arguments]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "“a photo of a sks dög\\u96ea”".encode("cp1252") in done.stderr


def start_process(*arguments, **extra):
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)], env=ENVIRONMENT | extra, **pipes
    )


def send_signals(process, signals, pause_sec):
    for number in signals:
        process.send_signal(number)
        time.sleep(pause_sec)


@pytest.mark.parametrize("signals", [[signal.SIGINT] * 2, [signal.SIGTERM] * 4, [signal.SIGHUP]])
def test_signals_ask_and_never_tear(signals):
    process = start_process("-c", STOPPER)
    assert process.stdout.readline() == b"ready\n"
    send_signals(process, signals, 0.05)
    out, err = process.communicate(timeout=60)
    assert (
        out == b"saving\nsaved\n" and process.returncode == 0 and b"stopping after this step" in err
    )


def test_third_ctrl_c_ends_at_once_and_stop_file_is_removed(
    tmp_path,
):
    hanging, stopping = (
        start_process("-c", STOPPER, HANG="1"),
        start_process("-c", STOPPER, **{STOP_FILE_VARIABLE: str(tmp_path / "job.stop")}),
    )
    assert hanging.stdout.readline() == stopping.stdout.readline() == b"ready\n"
    send_signals(hanging, [signal.SIGINT] * 3, 0.1)
    send_stop_request(tmp_path)
    assert hanging.wait(timeout=20) == 130
    assert stopping.communicate(timeout=60)[0] == b"saving\nsaved\n" and not list(
        tmp_path.iterdir()
    )


def test_a_closed_terminal_stops_nothing_under_nohup():
    """`nohup` has SIGHUP ignored before the program starts."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
        assert not stop()
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.slow
def test_two_ctrl_c_leave_a_checkpoint_and_an_adapter(photos, tiny_base, tmp_path):
    """And `2>&1 | tee log` is gone before the training is asked to stop."""
    run, arguments = (
        RunDir(tmp_path / "run"),
        ["--train_batch_size", 1, "--max_train_steps", 100000, "--seed", 1],
    )
    process = start_process(
        SCRIPT, *build_flags(tiny_base, photos, run.path), *arguments, "--num_validation_images", 0
    )
    while not any(event["type"] == "step" for event in run.read_events()):
        assert process.poll() is None, process.stderr.read().decode()
        time.sleep(0.1)
    for pipe in (process.stdout, process.stderr):
        pipe.close()
    send_signals(process, [signal.SIGINT] * 2, 0.2)
    assert process.wait(timeout=120) == 130
    (checkpoint,) = run.list_checkpoints()
    with safe_open(run.adapter_path, "pt") as file:
        assert file.keys()
    assert (
        run.read_events()[-1]["state"] == "interrupted"
        and checkpoint.name == "last"
        and read_checkpoint_step(checkpoint) > 0
    )
    log = run.log_path.read_text()
    assert "Traceback" not in log and "ended: stopped" in log


@pytest.mark.skipif(os.name != "posix", reason="a POSIX shell")
@pytest.mark.parametrize("ending", ["| true", "2>&- >&-"])
def test_help_without_a_reader_is_no_failure(ending):
    command = f'"{sys.executable}" "{SCRIPT}" --help {ending}'
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {command}"], env=ENVIRONMENT, capture_output=True
    )
    assert done.returncode == 0 and done.stderr == b""


def test_bug_exits_with_1_and_prints_its_traceback_once(photos, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        distributed, "make_accelerator", lambda *_: raise_error(ZeroDivisionError("unforeseen"))
    )
    assert train_main(build_flags("toy", photos, tmp_path / "run")) == 1
    assert (tmp_path / "run" / "train.log").read_text().count("ZeroDivisionError: unforeseen") == 1
    assert capsys.readouterr().err.count("ZeroDivisionError: unforeseen") == 1


TRACKER = ["--report_to", "wandb"]
"""A library that is missing. What is wrong in itself is told before it."""
LATE_MISTAKES = {
    "no photos": ([*TRACKER, "--instance_data_dir", "missing"], "missing: no such folder"),
    "run folder": (["--output_dir", "photos"], "is the folder of --instance_data_dir"),
    "file for a folder": (["--output_dir", "file/run"], "cannot be written: Not a directory"),
    "class_data_dir": (["--class_data_dir", "file"], "cannot be written: Not a directory"),
    "cache_dir": (
        ["--caching", "disk", "--cache_dir", "file"],
        "cannot be written: Not a directory",
    ),
    "tracker": (TRACKER, "--report_to wandb needs wandb: pip install wandb"),
    "projection": (
        [*TRACKER, "--target_modules", "to_q", "to_out"],
        "no such layer; did you mean to_out.0?",
    ),
    "butterfly": (
        [*TRACKER, "--mixer", "butterfly", "--rank", "3"],
        "mixer butterfly needs an even rank, not 3",
    ),
    "convolution": (
        ["--use_dora", "--target_modules", "conv_in"],
        "--use_dora: conv_in is a convolution; leave",
    ),
    "checkpoint": (["--resume_from_checkpoint", "checkpoint-9"], "no complete checkpoint there"),
    "long name": (["--output_dir", "n" * 250], "is too long: an adapter's has at most 200 bytes"),
}


@pytest.mark.parametrize("name", LATE_MISTAKES)
def test_a_mistake_that_is_found_late_is_one_line_too(
    name, photos, tiny_base, tmp_path, monkeypatch, capfd
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("no folder")
    arguments, says = LATE_MISTAKES[name]
    arguments = [
        *arguments,
        "--exposures_per_photo",
        "100",
    ]  # enough that no note stands beside the error
    for dry in ([], ["--dry_run"]):
        assert train_main([*build_flags(tiny_base, photos, "run"), *arguments, *dry]) == 2
        lines = [
            line
            for line in capfd.readouterr().err.splitlines()
            if line and "…" not in line and "/s]" not in line
        ]
        assert len(lines) == 1 and lines[0].startswith("error: ") and says in lines[0]


def test_dry_run_prints_the_plan_and_writes_nothing(photos, tiny_base, tmp_path, capsys):
    (photos / "notes.md").write_text("x")
    arguments = [
        *build_flags(tiny_base, photos, tmp_path / "run"),
        "--repeats",
        "4",
        "--train_batch_size",
        "2",
        "--rank",
        "3",
    ]
    arguments += ["--gradient_accumulation_steps", "2", "--num_train_epochs", "30", "--dry_run"]
    arguments += ["--class_prompt", "a toy", "--prior", "adapter_off"]
    assert train_main([*arguments, "--verbose"]) == 0
    out = capsys.readouterr().out
    titles = [line.partition(" ")[0] for line in out.splitlines() if line and line[0] != " "]
    assert titles == ["cost", "steps", "photos", "settings", "remarks"]
    assert "\n  rank = 3\n" in out and "(--help_all shows those)" in out
    assert "\n  mixer = " not in out and "\n  dry_run = " not in out
    assert "0.png  96 x 64" in out and "left out: notes.md" in out
    assert "3 photos × 4 repeats, 4 a step: 3 steps an epoch; 90 steps = 30.0 epochs" in out
    assert "each photo is seen about 120 times" in out and "--exposures_per_photo" not in out
    assert out.count("has no effect without --with_prior_preservation") == 2
    assert "--prior has no effect without --with_prior_preservation" in out
    unet = UNet2DConditionModel.from_pretrained(tiny_base, subfolder="unet")
    layers = [
        m for name, m in unet.named_modules() if name.endswith(("to_q", "to_k", "to_v", "to_out.0"))
    ]
    expected = sum(3 * (m.in_features + m.out_features) + 9 for m in layers)
    assert f"{expected:,} parameters on {len(layers)} layers" in out
    assert not (tmp_path / "run").exists()

    # The prompt that all photos share stands once.
    assert out.count("  all: “") == 1 and "0.png  96 x 64\n" in out
    assert train_main([*arguments, "--num_train_epochs", "1"]) == 0
    assert "set --exposures_per_photo" in capsys.readouterr().out


@pytest.mark.slow
def test_a_run_shows_its_phases_the_time_left_and_both_losses(photos, tiny_base, tmp_path):
    changes = {
        "with_prior_preservation": True,
        "num_validation_images": 1,
        "checkpointing_steps": 2,
    }
    stream = io.StringIO()
    train(tiny_config(tiny_base, photos, tmp_path / "run", **changes), TerminalProgress(stream))
    output = stream.getvalue()
    for arguments in (
        "loading the base",
        "class images",
        "encoding photos",
        "generating samples",
        "saving and verifying",
    ):
        assert arguments in output, arguments
    assert "step 2: checkpoint" in output and "step 0: 1 sample images" in output
    last = [
        line for line in output.replace("\r", "\n").splitlines() if line.startswith("training")
    ][-1]
    assert "5/5 [" in last and "left=00:00" in last
    assert "loss=" in last and "prior=" not in last


def test_step_bar_fits_100_columns_and_loading_has_none():
    disable_library_notes()
    for library in (diffusers, transformers):
        assert not library.utils.logging.is_progress_bar_enabled()
    counts = {"n": 1234, "total": 20_000, "elapsed": 36_000, "postfix": "left=99:59:59, loss=0.123"}
    line = tqdm.format_meter(**counts, ncols=100, prefix="training", bar_format=STEP_BAR_FORMAT)
    assert len(line) == 100 and line.endswith("left=99:59:59, loss=0.123]")


def format_events(*events) -> str:
    stream = io.StringIO()
    progress = TerminalProgress(stream)
    for event in events:
        progress(event)
    progress.close()
    return stream.getvalue()


def test_stopped_run_names_its_adapter_and_how_to_resume(photos, tiny_base, tmp_path):
    """It named a flag, and nobody knew to which command it belongs."""
    config = tiny_config(tiny_base, photos, tmp_path / "run")
    (tmp_path / "run").mkdir()
    write_settings(config, RunDir(tmp_path / "run"))
    RunDir(tmp_path / "run").metrics_path.touch()
    result = TrainResult(tmp_path / "run", 4, interrupted=True, proof=None)
    (message,) = format_ending(make_plan(config), result)
    assert f"stopped at step 4: the adapter so far is in {tmp_path / 'run'}; " in message
    command = f"train --config {tmp_path / 'run' / 'train_config.json'}"
    assert (
        f"to go on: python -m dreambooth_moslora {command} --resume_from_checkpoint latest"
        in message
    )


def test_progress_of_resumed_run_starts_at_its_step():
    """There were fourteen of the program's own names in it."""
    output = format_events(RunStarted(100), StepDone(41, loss=1.0, lr=1e-4, eta_sec=125.0))
    assert "41/100" in output and "0/100" not in output.replace("40/100", "")
    assert "left=02:05" in output and "step/s" not in output
    scores = StepEvaluated(1, {"dino": 0.5, "dino_base": 0.1, "copied": 0.25, "score": 0.75})
    output = format_events(RunStarted(2), StepDone(1, loss=1.0, lr=1e-4), scores)
    assert "step 1: likeness to the photos 50%, copies of photos 25%, score 75%\n" in output


def test_scores_between_two_steps_have_a_bar_below_that_of_the_steps():
    """A minute passed without a count."""
    step = StepDone(1, loss=1.0, lr=1e-4)
    counts = [PhaseProgress("evaluating", done, 40) for done in (0, 20, 40)]
    output = format_events(RunStarted(3), step, PhaseProgress("evaluating"), *counts)
    assert "scoring:   0%" in output and "0/40" in output

    # The bar of steps goes on afterwards.
    output = format_events(RunStarted(3), step, *counts, StepDone(3, loss=1.0, lr=1e-4))
    assert "training: 100%" in output.rpartition("scoring")[2]


class FakeTerminal(io.StringIO):
    """Text that says it is a terminal, and an event for each count of seconds."""

    def __init__(self):
        super().__init__()
        self.has_count = threading.Event()

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        if "…" in text:
            self.has_count.set()
        return super().write(text)


def test_a_silent_command_counts_the_seconds_below_its_last_line(monkeypatch):
    """Imports and verification of a file were silent for half a minute."""
    monkeypatch.setattr(terminal, "MIN_SILENCE_SEC", 0.0)
    monkeypatch.setattr(terminal, "SILENCE_INTERVAL_SEC", 0.01)
    stderr = FakeTerminal()
    monkeypatch.setattr(sys, "stderr", stderr)
    with terminal.ignore_broken_pipes():
        print("saving", file=sys.stderr)
        stderr.has_count.clear()  # a count may have been drawn above the line
        assert stderr.has_count.wait(60)
        print("done", file=sys.stderr)
    assert re.search(r"saving\n\r… \d+ s", stderr.getvalue())
    assert re.search(r"… \d+ s\r +\rdone\n", stderr.getvalue())


def test_a_bar_is_not_overwritten_by_a_count(monkeypatch):
    stderr = FakeTerminal()
    counter = terminal.SilenceCounter(stderr)
    terminal.BreakableStream(stderr, counter).write("\rtraining:  10%")
    monkeypatch.setattr(terminal, "MIN_SILENCE_SEC", 0.0)
    turns = iter([False, True])
    monkeypatch.setattr(counter.ended, "wait", lambda _: next(turns))
    counter.count()
    assert stderr.getvalue() == "\rtraining:  10%"


def test_a_run_says_before_it_begins_what_will_go_badly(photos, tiny_base, tmp_path, caplog):
    config = tiny_config(tiny_base, photos, tmp_path / "run", max_train_steps=2)
    assert run_trainer(make_plan(config), stop=lambda: True) == EXIT_INTERRUPTED
    says = "note: each photo is seen about "
    assert len([line for line in caplog.messages if line.startswith(says)]) == 1


def test_run_that_would_fill_the_disk_is_refused(photos, tiny_base, tmp_path, capsys):
    """It was a note, and the last line of a dry run."""
    arguments = build_flags(tiny_base, photos, tmp_path / "run")
    arguments += ["--max_train_steps", "1000000000", "--checkpointing_steps", "1"]
    assert train_main([*arguments, "--dry_run"]) == 0
    assert capsys.readouterr().out.startswith("not enough room\n  the disk has too little room: ")
    assert train_main(arguments) == 2
    assert "free some of it, or give --output_dir on another disk" in capsys.readouterr().err
