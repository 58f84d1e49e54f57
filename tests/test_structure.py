"""Check the layout: floors, import circles, sizes, names, cheap imports and short call chains."""

from __future__ import annotations

import ast
import importlib
import inspect
import subprocess
import sys
from collections import Counter, defaultdict, deque
from pathlib import Path
from types import CodeType, FrameType, ModuleType

import pytest
import torch
from import_graph import FILES, MODULES, PACKAGE, ROOT, circles, floor, imports, module_name
from tiny_latent_diffusion import tiny_model

import ldm
from ldm.analysis.oracle import AnalyticNet, gaussian
from ldm.diffusion.denoiser import denoised

# From the bottom to the top. A module imports from its own floor and from the floors below it.
FLOORS = (
    *("support", "diffusion", "samplers", "models", "speed", "conditioning", "catalog", "weights"),
    *("images", "pipelines", "registry", "serving", "data", "analysis", "training", "cli"),
    "ldm",  # ldm/__init__.py and ldm/__main__.py
)
RANK = {name: rank for rank, name in enumerate(FLOORS)}


def relative(path: Path) -> str:
    return str(path.relative_to(PACKAGE))


@pytest.fixture(scope="module")
def modules() -> dict[str, ModuleType]:
    """Import every module of the package."""
    return {name: importlib.import_module(name) for name in MODULES}


# Imports


def test_every_folder_is_a_floor():
    folders = {path.name for path in PACKAGE.iterdir() if path.is_dir()} - {"assets", "__pycache__"}
    assert folders == set(FLOORS) - {"ldm"}


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_imports_come_from_the_same_floor_or_below(path):
    own = floor(module_name(path))
    above = {module for module in imports(path) if RANK[floor(module)] > RANK[own]}
    assert not above, f"{relative(path)} is on floor {own!r} and imports {sorted(above)} from above"


def test_samplers_import_only_diffusion_and_support():
    for path in (PACKAGE / "samplers").rglob("*.py"):
        outside = {
            module for module in imports(path) if floor(module) not in ("samplers", "diffusion", "support")
        }
        assert not outside, f"{relative(path)} imports {sorted(outside)}"


def test_there_is_no_import_circle():
    # the table of lazy names in ldm/__init__.py refers to the modules that are built on the others
    graph = {name: imports(path) for name, path in MODULES.items() if name != "ldm"}
    assert circles(graph) == []


def test_circles_are_found():
    assert circles({"a": ["b"], "b": ["c"], "c": ["a"], "d": ["a"], "e": ["e"]}) == [["a", "b", "c"], ["e"]]
    assert circles({"a": ["b", "c"], "b": ["d"], "c": ["d"], "d": ["outside"]}) == []


# Sizes


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_files_and_functions_stay_small(path):
    text = path.read_text(encoding="utf-8")
    assert text.count("\n") <= 400
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno - node.lineno + 1 <= 60, node.name


def test_folders_stay_small():
    assert len(list(PACKAGE.glob("*.py"))) <= 3
    for folder in {path.parent for path in FILES}:
        assert len(list(folder.glob("*.py"))) <= 20, relative(folder)


# Names


def test_modules_of_the_tests_have_different_names():
    names = Counter(path.name for path in (ROOT / "tests").rglob("*.py") if path.name != "conftest.py")
    assert [name for name, count in names.items() if count > 1] == []  # pytest imports them by this name


def defined_names(path: Path) -> set[str]:
    """Return the public names that a module defines at module level; imported names do not count."""
    names = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {part.id for t in targets for part in ast.walk(t) if isinstance(part, ast.Name)}
    return {name for name in names if not name.startswith("_")}


def test_a_public_name_means_one_thing(modules):
    places = defaultdict(list)
    for name, path in MODULES.items():
        for public in defined_names(path):
            places[public].append(name)
    shared = {}
    for public, names in places.items():
        first, *others = (getattr(modules[name], public) for name in names)
        if any(other is not first for other in others):
            shared[public] = names
    assert shared == {}


def test_no_module_has_the_name_of_a_public_function_or_of_the_standard_library(modules):
    for name, module in modules.items():
        package, _, own = name.rpartition(".")
        assert own not in sys.stdlib_module_names, f"{name} has the name of a standard-library module"
        if package:
            assert own not in ldm.__all__, f"{name} has the name of ldm.{own}"
            bound = getattr(modules[package], own, module)
            assert bound is module, f"{package}.{own} is both a module and a {type(bound).__name__}"
            assert own not in defined_names(MODULES[package]), (
                f"{name} has the name of an object of {package}"
            )


def test_there_are_at_most_25_public_names():
    assert len(ldm.__all__) <= 25 and all(getattr(ldm, name) is not None for name in ldm.__all__)


def test_public_functions_can_be_called_after_every_module_is_imported(modules, tmp_path):
    functions = {name for name in ldm.__all__ if inspect.isfunction(getattr(ldm, name))}
    called = set()

    def call(name: str, *args: object, **options: object):
        called.add(name)
        return getattr(ldm, name)(*args, **options)

    card = tmp_path / "card.yaml"
    card.write_text("base: emoji-ldm\nname: another\nsummary: a copy of a card\n", encoding="utf-8")
    assert call("register", card).name == "another"
    assert {"emoji-ldm", "another"} <= set(call("list_models"))
    pipe = call("load", "emoji-ldm", device="cpu", dtype="float32")
    with call("trace", pipe) as trace:
        pipe.text_to_image("red apple", steps=1, progress=False)
    assert trace.words() == ["red apple"]
    assert call("optimize", pipe) is pipe
    assert Path(call("save", tiny_model(), tmp_path / "saved")).exists()
    schedule = ldm.NoiseSchedule.cosine(10)
    denoiser = ldm.Denoiser(AnalyticNet(gaussian(), schedule, "eps"), schedule, "eps")
    denoise = call("cfg", denoiser, ldm.Cond(), ldm.Cond(), 3.0)
    assert isinstance(denoise(torch.zeros(1, 2), torch.tensor(5.0)), ldm.Denoised)
    assert called == functions


# What importing costs


def run_python(code: str) -> str:
    """Run a program in a new process and return what it prints; errors and warnings fail the test."""
    done = subprocess.run(
        [sys.executable, "-B", "-c", code], capture_output=True, encoding="utf-8", cwd=ROOT, check=False
    )
    assert done.returncode == 0 and done.stderr == "", done.stderr
    return done.stdout.strip()


def test_importing_ldm_imports_no_heavy_package():
    heavy = ("torch", "open_clip", "torchvision", "PIL", "yaml", "huggingface_hub", "numpy")
    assert run_python(f"import sys, ldm; print([m for m in {heavy} if m in sys.modules])") == "[]"


def test_the_library_imports_no_heavy_package_until_it_needs_one():
    heavy = ("open_clip", "torchvision", "PIL", "yaml", "huggingface_hub", "diffusers", "transformers")
    code = f"""
import sys, ldm
[getattr(ldm, name) for name in ldm.__all__]
print([m for m in {heavy} if m in sys.modules])
"""
    assert run_python(code) == "[]"


def test_importing_every_module_does_no_work():
    # third-party packages are imported first: only what ldm's own modules do is watched
    names = sorted(MODULES)
    outside = sorted({name for path in FILES for name in third_party(path)})
    code = f"""
import importlib, importlib.util, sys, threading
for name in {outside}:
    if importlib.util.find_spec(name.partition(".")[0]):
        importlib.import_module(name)
import torch
state, threads, environment = torch.get_rng_state(), threading.active_count(), dict(__import__("os").environ)
refused = ("socket.connect", "subprocess.Popen", "os.system", "os.mkdir", "os.remove", "os.rename")
def watch(event, args):
    writes = event == "open" and isinstance(args[1], str) and set(args[1]) & set("wax+")
    if writes or event in refused:
        raise RuntimeError(f"{{event}} {{args}} at import")
sys.addaudithook(watch)
for name in {names}:
    importlib.import_module(name)
assert torch.equal(torch.get_rng_state(), state), "random numbers were drawn"
assert threading.active_count() == threads, "a thread was started"
assert dict(__import__("os").environ) == environment, "the environment was changed"
"""
    assert run_python(code) == ""


def third_party(path: Path) -> set[str]:
    """Return the modules outside `ldm` and the standard library that a file imports at module level."""
    found = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module)
    return {name for name in found if name.partition(".")[0] not in {*sys.stdlib_module_names, "ldm"}}


# From the command to the formulas


class Calls:
    """Which files of `ldm` call which files and functions, directly or through other packages."""

    def __init__(self) -> None:
        self.files: dict[str, set[str]] = defaultdict(set)  # file: the files that it calls
        self.callers: dict[CodeType, set[str]] = defaultdict(set)  # function: the files that call it

    def record(self, frame: FrameType, event: str, _: object) -> None:
        """Record one call; a function for `sys.setprofile`."""
        callee = frame.f_code.co_filename
        if event != "call" or not callee.startswith(f"{PACKAGE}/") or frame.f_code.co_name == "<module>":
            return
        caller = frame.f_back
        while caller is not None and not caller.f_code.co_filename.startswith(f"{PACKAGE}/"):
            caller = caller.f_back
        if caller is not None:
            self.files[caller.f_code.co_filename].add(callee)
            self.callers[frame.f_code].add(caller.f_code.co_filename)

    def shortest_chain(self, start: CodeType, end: CodeType) -> list[str]:
        """Return the files on the shortest chain of calls that ends in a call of `end` (breadth-first)."""
        queue = deque([[start.co_filename]])
        seen = {start.co_filename}
        while queue:
            chain = queue.popleft()
            if chain[-1] in self.callers[end]:
                return [relative(Path(file)) for file in dict.fromkeys([*chain, end.co_filename])]
            for callee in sorted(self.files[chain[-1]] - seen):
                seen.add(callee)
                queue.append([*chain, callee])
        raise AssertionError(f"{start.co_name} does not call {end.co_name}")


@pytest.fixture(scope="module")
def calls(tmp_path_factory) -> Calls:
    """Record the calls of `ldm "a red apple"`."""
    output = tmp_path_factory.mktemp("calls") / "apple.png"
    main = importlib.import_module("ldm.__main__").main
    found = Calls()
    sys.setprofile(found.record)
    try:
        status = main(["a red apple", "--steps", "2", "-o", str(output)])
    finally:
        sys.setprofile(None)
    assert status == 0 and output.exists()
    return found


@pytest.mark.parametrize(
    ("formula", "limit"),
    [
        pytest.param(lambda: ldm.SAMPLERS["dpmpp_2m"], 4, id="sampler"),
        pytest.param(lambda: ldm.Denoiser.forward, 5, id="denoiser"),
        pytest.param(lambda: denoised, 5, id="x0-and-eps"),
    ],
)
def test_a_formula_is_few_files_away_from_the_command(calls, formula, limit):
    start = importlib.import_module("ldm.__main__").main  # what the console script calls
    chain = calls.shortest_chain(start.__code__, formula().__code__)
    assert len(chain) <= limit, " → ".join(chain)
