"""Generation on the embedded base: adapter switch, first picture after a start, steps per second,
import time.

    python -m benchmarks.generation [--base toy] [--json FILE]

Medians over repetitions; the first picture is one fresh process from `python` to PNG.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

REPEATS = 30
FIRST_PICTURE = """
import sys
from dreambooth_moslora import GenerationParams, SubjectPipeline
pipeline = SubjectPipeline.from_base(sys.argv[1])
name = pipeline.load_adapter(sys.argv[2])
params = GenerationParams("a photo of a dog", steps=25, adapters=((name, 1.0),))
for event in pipeline.generate(params):
    if hasattr(event, "save"):
        event.save(sys.argv[3])
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base", default="toy")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        results = measure(args.base, Path(scratch))
    for name, (value, unit) in results.items():
        print(f"{name:44} {value:9.2f} {unit}")
    if args.json:
        args.json.write_text(
            json.dumps(
                {name: {"value": v, "unit": u} for name, (v, u) in results.items()}, indent=1
            )
        )


def measure(base: str, scratch: Path) -> dict[str, tuple[float, str]]:
    """Name -> (value, unit)."""
    results = {"import dreambooth_moslora": (1e3 * import_sec("dreambooth_moslora"), "ms")}
    adapters = make_adapters(base, scratch)
    results["first picture, from process start"] = (
        first_picture_sec(base, adapters[0], scratch),
        "s",
    )
    return results | measure_switches(base, adapters)


def import_sec(module: str) -> float:
    """The quickest of seven fresh interpreters minus that of seven empty ones: other programs only
    add time."""

    def run(code: str) -> float:
        started = time.perf_counter()
        subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
        return time.perf_counter() - started

    return min(run(f"import {module}") for _ in range(7)) - min(run("") for _ in range(7))


def make_adapters(base: str, scratch: Path) -> list[Path]:
    """Two random adapters of rank 16 on all attention projections, as files of another process."""
    code = (
        "import sys; from pathlib import Path; "
        "from tests.helpers.tiny_adapters import save_diffusers_lora\n"
        "from dreambooth_moslora.base.load import load_pipeline\n"
        "unet = load_pipeline(sys.argv[1]).unet\n"
        "[save_diffusers_lora(unet, Path(sys.argv[2]) / n, seed=i, rank=16, size=0.02) "
        "for i, n in enumerate('ab')]"
    )
    subprocess.run(
        [sys.executable, "-c", code, base, str(scratch)], check=True, cwd=ROOT, capture_output=True
    )
    return [scratch / name for name in "ab"]


def first_picture_sec(base: str, adapter: Path, scratch: Path) -> float:
    started = time.perf_counter()
    command = [sys.executable, "-c", FIRST_PICTURE, base, str(adapter), str(scratch / "first.png")]
    subprocess.run(command, check=True, cwd=ROOT, capture_output=True)
    seconds = time.perf_counter() - started
    if not (scratch / "first.png").is_file():
        raise SystemExit("no picture was made")
    return seconds


def measure_switches(base: str, adapters: list[Path]) -> dict[str, tuple[float, str]]:
    from dreambooth_moslora.generation.params import GenerationParams, Image
    from dreambooth_moslora.generation.pipeline import SubjectPipeline

    pipeline = SubjectPipeline.from_base(base)
    loads = [timed(lambda path=path: pipeline.load_adapter(path)) for path in adapters]
    switches = [
        timed(lambda name=name: pipeline.activate(((name, 1.0),)))
        for name in ("a", "b") * (REPEATS // 2)
    ]
    offs = []
    for _ in range(REPEATS):
        pipeline.activate((("a", 1.0),))  # what is off already costs nothing
        offs.append(timed(lambda: pipeline.activate(())))
    runs = []
    for adapter in ((("a", 1.0),), ()):
        params = GenerationParams("a photo of a dog", steps=25, adapters=adapter)
        picture = lambda params=params: [  # noqa: E731
            e for e in pipeline.generate(params) if isinstance(e, Image)
        ]
        picture()
        runs.append(statistics.median(timed(picture) for _ in range(3)))
    return {
        "adapter loaded from its file, median": (1e3 * statistics.median(loads), "ms"),
        "switch between loaded adapters, median": (1e3 * statistics.median(switches), "ms"),
        "switch between loaded adapters, worst": (1e3 * max(switches), "ms"),
        "back to the base, median": (1e3 * statistics.median(offs), "ms"),
        "one picture of 25 steps with an adapter": (runs[0], "s"),
        "one picture of 25 steps, base alone": (runs[1], "s"),
    }


def timed(work) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
