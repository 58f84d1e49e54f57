"""Kill processes at random moments, and at each step of their work on files.

`in_fresh_process` runs a function in a process with one thread, in which a fork is safe.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
CODE = """
import json, sys, torch
torch.set_num_threads(1)
module, function, arguments = sys.argv[1:]
print(json.dumps(getattr(__import__(module), function)(*json.loads(arguments))))
"""
STEPS = {"os.rename": 1, "os.remove": 0, "os.mkdir": 0, "os.rmdir": 0}  # the argument that is changed


def in_fresh_process(module: Path, function: str, *arguments: str | int | float, **options: Any) -> Any:
    """Return what a function of a module returns in a process of its own; both are plain JSON values.

    Args:
        module: The file of the module.
        function: Name of the function.
        *arguments: Its arguments.
        **options: Options of `subprocess.run`.
    """
    places = (ROOT, ROOT / "tests" / "helpers", module.parent)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, places)), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", CODE, module.stem, function, json.dumps(arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, encoding="utf-8", **options)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def forked(action: Callable[[], object]) -> int:
    """Run an action in a forked process, which ends with it, and return the number of the process."""
    child = os.fork()
    if child == 0:
        try:
            action()
            os._exit(0)
        finally:
            os._exit(1)
    return child


def kill_after(action: Callable[[], object], seconds: float) -> bool:
    """Run an action in a forked process, and kill it; return whether it had not ended before."""
    child = forked(action)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def kill_at_random(
    action: Callable[[], object], kills: int, longest: float, after: Callable[[], object] | None = None
) -> int:
    """Kill forked processes, each after a random time; return how many had ended before.

    Args:
        action: What they do.
        kills: Number of processes that are killed.
        longest: Largest number of seconds after which one is killed.
        after: Is called after each kill. Default: None.
    """
    rng, killed, ended = random.Random(0), 0, 0
    while killed < kills:
        if kill_after(action, rng.uniform(0.0, longest)):
            killed += 1
            if after is not None:
                after()
        else:
            ended += 1
            assert ended < 10 * kills + 10, "the processes end before they are killed"
    return ended


def kill_at_each_step(action: Callable[[], object], place: Path, after: Callable[[], object]) -> int:
    """Kill forked processes, the first before its first change of a folder, the next before its second, ...

    Args:
        action: What they do.
        place: The folder; changes are files and folders in it, or itself, that are renamed, removed or made.
        after: Is called after each kill.

    Returns:
        The number of changes.
    """
    for step in range(10_000):
        child = forked(lambda step=step: _act_until(action, place, step))  # type: ignore[misc]
        status = os.waitpid(child, 0)[1]
        if not os.WIFSIGNALED(status):
            assert os.waitstatus_to_exitcode(status) == 0
            return step
        after()
    raise AssertionError("expected fewer steps")


def _act_until(action: Callable[[], object], place: Path, step: int) -> None:
    count = 0

    def watch(event: str, args: tuple[Any, ...]) -> None:
        nonlocal count
        if event in STEPS and Path(os.fsdecode(args[STEPS[event]])).is_relative_to(place):
            if count == step:
                os.kill(os.getpid(), signal.SIGKILL)
            count += 1

    sys.addaudithook(watch)
    action()
