"""`ldm --help`: one table lists, explains and dispatches every command, without importing torch."""

from __future__ import annotations

import inspect
import subprocess
import sys
import time
from pathlib import Path

import pytest

import ldm
from ldm.__main__ import main
from ldm.cli.commands import COMMANDS, describe_commands
from ldm.cli.tasks import IMAGE_TASKS
from ldm.pipelines.protocol import Pipeline

ROOT = Path(__file__).parents[2]
NAMES = [name for command in COMMANDS for name in (command.name, *command.aliases)]


def run_python(*arguments: str) -> str:
    """Run Python in a new process and return what it prints."""
    done = subprocess.run(
        [sys.executable, *arguments], capture_output=True, encoding="utf-8", cwd=ROOT, check=True, timeout=60
    )
    return done.stdout


def test_help_lists_each_command_in_one_line(capsys):
    assert main(["--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "\n".join(lines) == describe_commands() and max(map(len, lines)) <= 110
    for command in COMMANDS:
        (line,) = [line for line in lines if line.startswith(f"  {command.name} ")]
        assert command.summary in line and all(alias in line for alias in command.aliases)
    examples = lines[lines.index("examples:") + 1 :]
    assert len(examples) == 3 and all(line.startswith("  ldm ") for line in examples)


def test_names_and_aliases_are_unique():
    assert len(set(NAMES)) == len(NAMES)
    assert {"image", "vary", "text-to-image", "generate", "replay", "inspect"} <= set(NAMES)


def test_every_task_of_the_pipelines_has_a_command_of_its_name():
    methods = {
        name
        for pipeline in (ldm.LatentDiffusion, ldm.UnCLIP, ldm.DalleMini)
        for name, method in inspect.getmembers(pipeline, inspect.isfunction)
        if not name.startswith("_") and inspect.signature(method).return_annotation == "Images"
    }
    methods -= set(vars(Pipeline)) | {"truncated"}  # principal components, which no file holds
    assert {task.method_name for task in IMAGE_TASKS} == methods
    names = {name for task in IMAGE_TASKS for name in (task.name, *task.aliases)}
    assert {method.replace("_", "-") for method in methods} <= names


@pytest.mark.parametrize("task", IMAGE_TASKS, ids=lambda task: task.name)
def test_positional_arguments_are_those_of_the_method(task):
    given = [each.dest for each in task.arguments if each.positional]
    for pipeline in (ldm.LatentDiffusion, ldm.UnCLIP, ldm.DalleMini):
        if method := getattr(pipeline, task.method_name, None):
            parameters = list(inspect.signature(method).parameters)[1:]
            assert parameters[: len(given)] == given


@pytest.mark.parametrize("name", NAMES)
def test_every_command_explains_itself(name, capsys):
    with pytest.raises(SystemExit) as end:
        main([name, "--help"])
    out = capsys.readouterr().out
    (command,) = [command for command in COMMANDS if name in (command.name, *command.aliases)]
    assert end.value.code == 0 and out.startswith(f"usage: ldm {command.name} ")
    assert command.summary.split()[0] in out and all(each.name in out for each in command.arguments)


def test_the_help_of_lossy_formats_says_what_a_replay_reproduces(capsys):
    with pytest.raises(SystemExit):
        main(["replay", "--help"])
    assert "the pixels before compression" in " ".join(capsys.readouterr().out.split())


def test_help_imports_neither_torch_nor_other_heavy_packages():
    heavy = ("torch", "numpy", "PIL", "yaml", "einops", "tqdm")
    code = f"""
import contextlib, io, sys
from ldm.cli.commands import COMMANDS, run_command_line
with contextlib.redirect_stdout(io.StringIO()) as out:
    run_command_line(["--help"])
    for command in COMMANDS:
        with contextlib.suppress(SystemExit):
            run_command_line([command.name, "--help"])
print(len(out.getvalue()) > 10_000, [name for name in {heavy} if name in sys.modules])
"""
    assert run_python("-c", code).strip() == "True []"


def test_help_is_fast():
    def seconds(*arguments: str) -> float:
        start = time.perf_counter()
        assert run_python(*arguments)
        return time.perf_counter() - start

    # 0.1 s more than Python itself on an idle machine; the bound leaves room for a busy one
    assert min(seconds("-m", "ldm", "--help") for _ in range(3)) < 0.5 + min(
        seconds("-c", "print(0)") for _ in range(3)
    )
