"""The layers of the package are checked here, not promised: a module imports from lower layers only."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "dreambooth_moslora"
LAYERS: list[set[str]] = [
    {
        "errors",
        "config",
        "config_fields",
        "config_files",
        "versions",
        "command_line",
        "foreign_flags",
        "steps",
        "generation",
        "streaming",
        "memory",
        "threads",
        "terminal",
        "targets",
        "rundir",
        "event_lines",
        "png_files",
        "card_marks",
        "prompts",
        "contact_sheet",
        "loss_plot",
        "intervals",
        "html_page",
        "best_step",
    },
    {
        "mixer",
        "moslora",
        "fast_lora",
        "objective",
        "photos",
        "crops",
        "photo_files",
        "photo_sidecars",
        "photo_dataset",
        "photo_checks",
        "base_files",
        "study",
        "weight_headers",
        "crop_picture",
        "seeding",
        "cache",
        "quantization",
        "bf16",
        "diagnostics",
        "hollow",
        "rank_reduction",
    },
    {
        "base",
        "vae_probe",
        "adapters",
        "previews",
        "prior",
        "adapter_facts",
        "adapter_file",
        "adapter_parts",
        "adapter_scales",
        "adapter_install",
        "describe",
        "export",
        "kohya",
        "proof",
        "metrics",
        "encoders",
    },
    {"dataset", "sampling", "optimization", "denoising", "pipeline", "grids"},
    {
        "checkpoint",
        "card",
        "hub",
        "album",
        "startup",
        "processes",
        "resumption",
        "earlier_runs",
        "folder_checks",
        "reporting",
        "preparation",
        "learner",
        "publication",
        "trainer",
        "evaluate",
        "evaluation_plan",
        "toy_truth",
        "training_evaluator",
        "fidelity_report",
        "compare",
        "compare_stats",
        "compare_report",
        "compare_plots",
    },
    {"cli", "preflight", "progress", "dry_run", "estimate", "stopping", "commands", "ui.jobs", "ui.job_metrics"},
    {"ui"},
]
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}
MODULES = sorted(p for p in ROOT.rglob("*.py") if p.name not in {"__init__.py", "__main__.py"})


def layer_name(module: str) -> str:
    """`ui.generate_tab` -> `ui`, `trainer` -> `trainer`; a package's own submodules share its layer unless listed."""
    return module if module in RANK else module.split(".")[0]


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def imports_of(path: Path) -> set[str]:
    """Package modules that a file imports anywhere, functions included."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("dreambooth_moslora"):
            inner = node.module.removeprefix("dreambooth_moslora").lstrip(".")
            found |= {inner} if inner else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {a.name.removeprefix("dreambooth_moslora.") for a in node.names if "dreambooth_moslora." in a.name}
    return found - {"__version__"}


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_every_module_has_a_layer(path):
    assert layer_name(module_name(path)) in RANK


def test_imports_go_downward_or_stay_in_the_layer_without_a_cycle():
    graph = {module_name(p): imports_of(p) for p in MODULES}
    for name, targets in graph.items():
        for target in targets:
            assert RANK[layer_name(target)] <= RANK[layer_name(name)], f"{name} imports {target}, a higher layer"
    for start in graph:
        seen, front = set(), set(graph[start])
        while front:
            seen |= front
            front = {t for m in front for t in graph.get(m, ())} - seen
        assert start not in seen, f"{start} imports itself in a circle"


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_heavy_libraries_stay_where_they_belong(path):
    name = module_name(path)
    roots = {
        (node.module if isinstance(node, ast.ImportFrom) else alias.name).split(".")[0]
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Import) or (isinstance(node, ast.ImportFrom) and node.module)
        for alias in node.names
    }
    if not name.startswith("ui"):
        assert "gradio" not in roots
    if name in {"mixer", "moslora", "fast_lora", "objective"}:
        assert "diffusers" not in roots
    if RANK[layer_name(name)] == 0:
        assert not roots & {"torch", "diffusers", "transformers", "peft", "accelerate"}


def test_importing_the_package_imports_no_torch():
    code = "import sys, dreambooth_moslora; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
