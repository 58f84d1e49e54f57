"""The sources of the kernels, and the compiler's arguments that make a library of them; without PyTorch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

HERE = Path(__file__).parent
SOURCES = ("attention.cpp", "convert.cpp", "norm.cpp", "product.cpp", "rows.cpp", "winograd.cpp")
FLAGS = ("-O3", "-fopenmp", "-shared", "-fPIC", "-std=c++17")


def source_contents(folder: Path) -> list[bytes]:
    """Return the contents of the sources and headers in a folder, in the order of their names."""
    return [path.read_bytes() for path in sorted((*folder.glob("*.cpp"), *folder.glob("*.h")))]


def compiler_arguments(
    folder: Path, sources: Iterable[str], flags: Sequence[str], stage: Path, library: Path
) -> list[list[str]]:
    """Return the arguments of each run of the compiler, the last of which links the library.

    Args:
        folder: Where the sources are.
        sources: Their names.
        flags: The flags of every run.
        stage: Folder for object files.
        library: The library.
    """
    objects = {name: str(stage / f"{library.stem}-{name}.o") for name in sources}
    return [
        *([*flags, "-c", str(folder / name), "-o", made] for name, made in objects.items()),
        [*flags, *objects.values(), "-o", str(library)],
    ]
