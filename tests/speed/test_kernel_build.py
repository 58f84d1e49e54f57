"""The build of the kernels: once, by several at once, killed, and impossible for any reason."""

from __future__ import annotations

import copy
import os
import pickle
import random
import re
import signal
import stat
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from kernel_stand_in import Workshop, prebuilt, workshop
from small_networks import UNETS, make

import ldm
from ldm.speed.kernels import build
from ldm.speed.kernels.choice import KernelChoice
from ldm.speed.kernels.ops import CompiledOps, TorchOps
from ldm.speed.optimization import for_training
from ldm.support import files
from ldm.support.files import is_running
from ldm.weights.cast import cast

__all__ = ["prebuilt", "workshop"]  # fixtures
FLAGS = ("-O1", "-shared", "-fPIC")


def in_child(action: Callable[[], object]) -> int:
    """Run an action in a forked process, which exits with 0 if the action returns, and return its number."""
    child = os.fork()
    if child:
        return child
    try:
        action()
        os._exit(0)
    except BaseException:
        os._exit(1)


def test_a_library_is_built_once_and_shared(workshop: Workshop) -> None:
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: build.library(), range(16)))
    assert len(set(map(id, found))) == 1 and found[0].answer() == 42
    assert workshop.runs == 2  # one source, and the link
    assert workshop.answer() == 42 and workshop.runs == 2


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077, 0o027])
def test_modes_do_not_depend_on_the_umask(workshop: Workshop, umask: int) -> None:
    before = os.umask(umask)
    try:
        workshop.answer()
    finally:
        os.umask(before)
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in (workshop.home, workshop.kernels)}
    assert set(modes.values()) == {0o700}
    assert stat.S_IMODE(workshop.library.stat().st_mode) == 0o600


def test_the_real_compiler_builds_with_a_command_and_arguments(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "FLAGS", FLAGS)
    for command in ("g++ -DUNUSED", None):
        monkeypatch.setenv("CXX", command) if command else monkeypatch.delenv("CXX")
        assert workshop.answer() == 42
    assert len(list(workshop.kernels.iterdir())) == 2  # a library each


@pytest.mark.parametrize("changed", ["source", "version", "flags", "processor", "torch", "compiler"])
def test_everything_a_build_depends_on_is_part_of_the_key(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch, changed: str
) -> None:
    workshop.answer()
    cpuinfo = workshop.folder / "cpuinfo"
    cpuinfo.write_text(build.CPUINFO.read_text(encoding="utf-8"), encoding="utf-8")
    monkeypatch.setattr(build, "CPUINFO", cpuinfo)
    assert workshop.answer() == 42 and workshop.runs == 2
    if changed == "source":
        (workshop.sources / "tiny.h").write_text("// new", encoding="utf-8")
    elif changed == "version":
        workshop.set_compiler(f'cat "{workshop.prebuilt}" > "$out"', version="echo fake 2")
    elif changed == "flags":
        monkeypatch.setattr(build, "FLAGS", ("-O2",))
    elif changed == "processor":
        cpuinfo.write_text(
            re.sub(r"(flags|Features)\s*:", r"\1 : avx9", cpuinfo.read_text(encoding="utf-8")),
            encoding="utf-8",
        )
    elif changed == "torch":
        monkeypatch.setattr(torch, "__version__", "9.9")
    else:
        other = workshop.compiler.with_name("other")
        other.write_bytes(workshop.compiler.read_bytes())
        other.chmod(0o755)
        monkeypatch.setenv("CXX", str(other))
    assert workshop.answer() == 42 and workshop.runs == 4
    assert len(list(workshop.kernels.iterdir())) == 2


def no_home(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("LDM_HOME")
    monkeypatch.setattr(Path, "home", unknown)


def full_disk(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)


def write_home(mode: int) -> Callable[[Workshop, pytest.MonkeyPatch], None]:
    def act(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
        workshop.kernels.mkdir(parents=True)
        workshop.kernels.chmod(mode)

    return act


def read_only(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object, **__: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(Path, "mkdir", refused)


IMPOSSIBLE: dict[str, tuple[str, str | Callable[[Workshop, pytest.MonkeyPatch], object]]] = {
    "no compiler": ("there is no such program", lambda w, m: m.setenv("CXX", "/none/g++ -O2")),
    "quotes": ("No closing quotation", lambda w, m: m.setenv("CXX", "g++ 'x")),
    "no g++": (r"no C\+\+ compiler", lambda w, m: (m.delenv("CXX"), m.setenv("PATH", str(w.home)))),
    "no program": (
        "cannot be run: Exec format error",
        lambda w, m: w.compiler.write_text("a text", encoding="utf-8"),
    ),
    "no version": ("compiler failed: no message", lambda w, m: w.set_compiler("", version="false")),
    "hanging version": ("did not end in time", lambda w, m: w.set_compiler("", version="sleep 99")),
    "failure": (r"failed: 1: error: b\\x1bad", "printf '1: error: b\\033ad\\nlast\\n' >&2; exit 3"),
    "signal": ("failed: no message", "kill -SEGV $$"),
    "hanging": ("did not end in time", "sleep 99 & sleep 99"),
    "endless output": ("did not end in time", "yes"),
    "garbage": ("failed: ", "head -c 300000 /dev/urandom; exit 1"),
    "no library": ("wrote no library", "exit 0"),
    "empty library": ("not a shared library for this machine", ': > "$out"'),
    "text": ("not a shared library for this machine", 'yes | head -c 9999 > "$out"'),
    "truncated": ("the shared library is truncated", 'head -c 5000 "PREBUILT" > "$out"'),
    "a folder": ("wrote no library", 'mkdir -p "$out"'),
    "a pipe": ("wrote no library", 'rm -f "$out"; mkfifo "$out"'),
    "a link": ("wrote no library", 'rm -f "$out"; ln -s "PREBUILT" "$out"'),
    "other functions": ("a library without other", lambda w, m: m.setattr(build, "FUNCTIONS", ("other",))),
    "a full disk": (r"No space left on device: '.*/kernels/kernels-any-\w+.so'", full_disk),
    "a full disk of the compiler": (
        "No space left",
        "echo 'x.cpp: note'; echo 'ld: No space left'; echo 'error: ld returned 1'; exit 1",
    ),
    "a file": ("Not a directory: .*home", lambda w, m: w.home.write_text("", encoding="utf-8")),
    "no home": ("set LDM_HOME to a folder", no_home),
    "read-only": ("Read-only file system", read_only),
    "no cpuinfo": ("No such file.*/none", lambda w, m: m.setattr(build, "CPUINFO", Path("/none"))),
    "a folder of the group": ("kernels' can be changed by its group", write_home(0o770)),
    "a folder of everybody": ("kernels' can be changed by everybody", write_home(0o1777)),
}


@pytest.mark.parametrize("case", IMPOSSIBLE)
def test_where_a_build_is_impossible_pytorch_computes_and_one_warning_says_why(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    reason, cause = IMPOSSIBLE[case]
    monkeypatch.setattr(build, "VERSION_SECONDS", 0.5 if case == "hanging version" else 10)
    monkeypatch.setattr(build, "BUILD_SECONDS", 0.5 if "in time" in reason else 30)
    monkeypatch.setattr("ldm.weights.cast.MANY", 1)
    net = make(UNETS["sd"])
    if isinstance(cause, str):
        workshop.set_compiler(cause.replace("PREBUILT", str(workshop.prebuilt)))
    else:
        cause(workshop, monkeypatch)
    with pytest.warns(
        UserWarning, match=f"(?s)^no compiled kernels: .*{reason}.*PyTorch's operators"
    ) as caught:
        ready, bad = cast({"x": torch.ones(3)}, torch.float16)  # what loading does
    assert ready["x"].dtype == torch.float16 and not bad
    assert len(caught) == 1 and "\n" not in str(caught[0].message) and caught[0].filename == __file__
    runs = workshop.runs
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fast = ldm.optimize(copy.deepcopy(net))
        assert re.search(reason, fast.optimizations[0])
        assert for_training(net) is net
        with pytest.raises(build.NoKernels, match=reason):
            build.library()
    assert workshop.runs == runs  # the compiler is not asked again
    if workshop.kernels.is_dir():
        assert not list(workshop.kernels.iterdir())


def test_what_is_not_asked_for_or_not_supported_is_no_warning(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with monkeypatch.context() as patch, pytest.raises(build.NoKernels, match="this is Darwin"):
            patch.setattr(build, "kernel_choice", lambda: KernelChoice(None, "this is Darwin"))
            build.library()
        assert build.library().answer() == 42


def test_a_compiler_that_hangs_is_ended_with_its_children(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "BUILD_SECONDS", 0.5)
    number = workshop.folder / "number"
    workshop.set_compiler(f'sleep 99 & echo $! > "{number}"; wait')
    with pytest.warns(UserWarning, match="did not end in time"), pytest.raises(build.NoKernels):
        build.library()
    wait_for(lambda: not is_alive(int(number.read_text(encoding="utf-8"))))


def test_an_interrupted_build_ends_the_compiler_and_leaves_nothing(workshop: Workshop) -> None:
    number = workshop.folder / "number"
    workshop.set_compiler(f'echo $$ > "{number}"; sleep 99')
    child = in_child(build.library)
    wait_for(lambda: number.is_file() and number.read_text(encoding="utf-8") != "")
    os.kill(child, signal.SIGINT)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1
    wait_for(lambda: not is_alive(int(number.read_text(encoding="utf-8"))))
    assert not list(workshop.kernels.iterdir())


def test_a_server_that_the_compiler_starts_is_not_waited_for(workshop: Workshop) -> None:
    number = workshop.folder / "number"
    workshop.set_compiler(f'setsid sleep 99 & echo $! > "{number}"; cat "{workshop.prebuilt}" > "$out"')
    started = time.monotonic()
    assert workshop.answer() == 42 and time.monotonic() - started < 30
    os.kill(int(number.read_text(encoding="utf-8")), signal.SIGKILL)


def test_temporary_files_of_the_compiler_are_removed_with_the_build(workshop: Workshop) -> None:
    workshop.set_compiler(f'echo x > "$TMPDIR/left"; echo x > here; cat "{workshop.prebuilt}" > "$out"')
    assert workshop.answer() == 42 and workshop.library.suffix == ".so"


def test_a_child_forked_during_a_build_does_not_wait_for_it(workshop: Workshop) -> None:
    with build._lock:
        child = in_child(workshop.answer)
        wait_for(lambda: os.waitpid(child, os.WNOHANG)[0] == child)
    assert workshop.answer() == 42


def test_processes_may_build_at_once(workshop: Workshop) -> None:
    workshop.set_compiler(f'sleep 0.1; cat "{workshop.prebuilt}" > "$out"')

    def check() -> None:
        assert workshop.answer() == 42

    children = [in_child(check) for _ in range(4)]
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0] * 4
    before = workshop.runs
    assert workshop.answer() == 42 and workshop.runs == before  # one of the four libraries is kept


def kill_builds(workshop: Workshop, n: int, longest: float) -> int:
    """Kill n builds at random moments; return how many had written the library before.

    The first is killed at once, and the second when it has written the library. After each, the cache has
    either the whole library or none, and never another file for it.
    """
    draw, complete = random.Random(0), 0
    build.library()
    whole = workshop.library.read_bytes()
    for i in range(n):
        for path in workshop.kernels.glob("*.so"):
            path.unlink()
        workshop.forget()
        child = in_child(build.library)
        if i == 1:
            wait_for(lambda: any(workshop.kernels.glob("*.so")))
        time.sleep(draw.uniform(0, longest) if i else 0)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        found = list(workshop.kernels.glob("*.so"))
        assert [path.read_bytes() for path in found] in ([], [whole])
        complete += len(found)
        if draw.random() < 0.2:  # a new process finds, or builds, the library
            files._cleaned.clear()
            assert workshop.answer() == 42
            wait_for(lambda: not leftovers(workshop))
    return complete


def leftovers(workshop: Workshop) -> list[Path]:
    """Return what is beside the library after leftovers are removed; orphaned compilers may still write."""
    files._cleaned.clear()
    files.remove_leftovers(workshop.kernels)
    return [path for path in workshop.kernels.iterdir() if path.suffix != ".so"]


def test_a_killed_build_leaves_the_whole_library_or_none(workshop: Workshop) -> None:
    half = workshop.prebuilt.stat().st_size // 2
    workshop.set_compiler(
        f'head -c {half} "{workshop.prebuilt}" > "$out"; sleep 0.1; cat "{workshop.prebuilt}" > "$out"'
    )
    assert 0 < kill_builds(workshop, 20, 0.25) < 20


@pytest.mark.slow
def test_two_hundred_killed_builds_of_the_real_compiler(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "FLAGS", FLAGS)
    monkeypatch.setenv("CXX", "g++")
    started = time.monotonic()
    build.library()
    assert 0 < kill_builds(workshop, 200, 1.5 * (time.monotonic() - started)) < 200


def is_alive(process: int) -> bool:
    """Return whether a process runs, and is not merely waiting for its parent to take note of its end."""
    try:
        return (
            is_running(process)
            and Path(f"/proc/{process}/stat").read_text(encoding="utf-8").split(") ")[1][0] != "Z"
        )
    except OSError:
        return False


def wait_for(condition: Callable[[], bool], seconds: float = 20) -> None:
    """Wait until a condition holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_the_names_of_the_functions_are_those_that_are_called() -> None:
    called: set[str] = set()
    for path in Path(ldm.__file__).parent.rglob("*.py"):
        called |= set(re.findall(r"\blib\.(\w+)\(", path.read_text(encoding="utf-8")))
    assert called == set(build.FUNCTIONS)


def test_compiled_operators_are_pytorchs_where_they_cannot_be_built(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An optimized network may be unpickled on another machine."""
    monkeypatch.setattr(CompiledOps, "__init__", lambda self: None)
    sent = pickle.dumps(CompiledOps())
    assert type(pickle.loads(sent)) is CompiledOps
    monkeypatch.undo()
    monkeypatch.setenv("LDM_KERNELS", "0")
    assert type(pickle.loads(sent)) is TorchOps
