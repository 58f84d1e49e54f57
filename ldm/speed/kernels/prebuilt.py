"""Libraries of kernels that are built with the package, one per instruction set, so that no user waits.

`setup.py` calls `prebuild` where there is a C++ compiler; it needs no PyTorch. A library depends on the
sources, the flags and the C library only, and is read under a key of these (`read_prebuilt`), so that one of
other sources is never loaded.
"""

from __future__ import annotations

import hashlib
import platform
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ldm.speed.kernels.compiler import CompilerError, find_compiler, run_compiler
from ldm.speed.kernels.shared_library import verified_library, write_cached
from ldm.speed.kernels.sources import FLAGS, HERE, SOURCES, compiler_arguments, source_contents
from ldm.support.files import temporary_folder
from ldm.support.processor import INSTRUCTION_SETS, InstructionSet

PREBUILT = HERE / "prebuilt"
SECONDS = 300  # time limit of one run of the compiler


def prebuilt_key(isa: InstructionSet) -> str:
    """Return a hash of the sources, the flags and the machine, in 64 hexadecimal digits."""
    facts = (*source_contents(HERE), repr((SOURCES, FLAGS, isa.flags, isa.machine)).encode())
    return hashlib.sha256(b"".join(hashlib.sha256(fact).digest() for fact in facts)).hexdigest()


def can_prebuild() -> bool:
    """Return whether this is a system with kernels and a C++ compiler."""
    try:
        return platform.system() == "Linux" and bool(find_compiler())
    except CompilerError:
        return False


def prebuild(folder: Path) -> list[str]:
    """Compile the kernels for every instruction set of this kind of machine.

    Args:
        folder: Where to write the libraries; it is made if there is one.

    Returns:
        The names of the instruction sets; none without a compiler, and without those that it does not know.
    """
    if not can_prebuild():
        return []
    compiler = find_compiler()

    def build(isa: InstructionSet) -> bool:
        with temporary_folder(Path(tempfile.gettempdir())) as stage:
            library = stage / f"{isa.name}.so"
            try:
                flags = (*FLAGS, *isa.flags)
                for arguments in compiler_arguments(HERE, SOURCES, flags, stage, library):
                    run_compiler([*compiler, *arguments], SECONDS)
                data = library.read_bytes()
            except (CompilerError, OSError):
                return False
            folder.mkdir(parents=True, exist_ok=True)
            path = folder / f"{isa.name}.so"
            write_cached(path, prebuilt_key(isa), data)
            path.chmod(0o644)  # a package may be installed for other users
            return True

    sets = [isa for isa in INSTRUCTION_SETS.values() if isa.machine == platform.machine()]
    with ThreadPoolExecutor() as pool:
        return [isa.name for isa, made in zip(sets, pool.map(build, sets), strict=True) if made]


def read_prebuilt(isa: InstructionSet) -> bytes | None:
    """Return the library of an instruction set that was built with the package from these sources, or None.

    It is as trusted as the package's Python files, beside which it lies.
    """
    try:
        content = (PREBUILT / f"{isa.name}.so").read_bytes()
    except OSError:
        return None
    return verified_library(content, prebuilt_key(isa))
