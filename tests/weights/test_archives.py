"""The bytes that are judged are the bytes that are read, in zip archives, legacy files and others."""

from __future__ import annotations

import ast
import io
import struct
import tarfile
import zipfile
from pathlib import Path

import malicious_files
import pytest
import torch
from malicious_files import legacy_file, zip_entries

import ldm
from ldm.registry.inspection import inspect
from ldm.weights.formats.pickles import examine, read_ckpt

SYSTEM = b"\x80\x02cposix\nsystem\nX\x04\x00\x00\x00true\x85R."  # a pickle that would run a command
EMPTY = b"\x80\x02}."


def saved(**options: bool) -> bytes:
    stream = io.BytesIO()
    torch.save({"a": torch.arange(3.0), "b": torch.ones(2, dtype=torch.float16)}, stream, **options)
    return stream.getvalue()


def entries() -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(saved())) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def refusal(path: Path, data: bytes) -> str:
    """Return why a file is refused; `inspect` says so too, and does not call it safe."""
    path.write_bytes(data)
    with pytest.raises(ValueError) as error:
        read_ckpt(path)
    assert str(path) in str(error.value)
    report = inspect(path)
    assert any(problem in str(error.value) for problem in report.problems)
    assert "nothing unsafe" not in report.text()
    assert "weights_only" not in report.text() + str(error.value)
    return str(error.value)


# Archives


def test_good_archives_are_read(tmp_path: Path) -> None:
    """Those of torch, and of zipfile, whose headers hold the sizes; names of any script."""
    for name, data in (
        ("torch", saved()),
        ("zipfile", zip_entries(entries())),
        ("folders", zip_entries({"archive/": b"", "archive/data/": b"", **entries()})),
    ):
        (tmp_path / name).write_bytes(data)
        assert read_ckpt(tmp_path / name).tensors["a"].tolist() == [0, 1, 2]
    torch.save({"a": torch.arange(3.0)}, tmp_path / "模型.ckpt")
    assert read_ckpt(tmp_path / "模型.ckpt").tensors["a"].tolist() == [0, 1, 2]


def test_an_archive_in_wide_numbers_is_read(tmp_path: Path) -> None:
    """zip64: sizes and offsets in extra fields, as in files of more than 4 GB."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name, content in entries().items():
            with archive.open(zipfile.ZipInfo(name), mode="w", force_zip64=True) as file:
                file.write(content)
    (tmp_path / "a.ckpt").write_bytes(stream.getvalue())
    assert read_ckpt(tmp_path / "a.ckpt").tensors["b"].tolist() == [1, 1]


def test_two_archives_in_one_file_are_refused(tmp_path: Path) -> None:
    evil = zip_entries({"a/data.pkl": SYSTEM, "a/version": b"3"})
    for data in (saved() + evil, evil + saved(), saved() + saved()):
        assert "refused" in refusal(tmp_path / "a.ckpt", data) or "damaged" in refusal(
            tmp_path / "a.ckpt", data
        )


def test_bytes_that_belong_to_no_entry_are_refused(tmp_path: Path) -> None:
    good = saved()
    with zipfile.ZipFile(io.BytesIO(good)) as archive:
        start = archive.start_dir
        second = archive.infolist()[1].header_offset
    for data in (
        b"x" + good,
        good + b"x",
        EMPTY + good,
        good[:start] + b"x" + good[start:],
        good[:second] + EMPTY + good[second:],
        good[:-22] + b"x" + good[-22:],
        good[:-2] + struct.pack("<H", 4) + b"note",
        zip_entries(entries())[:-2] + struct.pack("<H", 4) + b"note",
    ):
        refusal(tmp_path / "a.ckpt", data)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("archive/evil.pkl", SYSTEM),
        ("archive/other", SYSTEM),
        ("evil/data.pkl", SYSTEM),
        ("data.pkl", SYSTEM),
        ("archive/.data/x.pkl", SYSTEM),
        ("archive/data/evil.pkl", SYSTEM),
    ],
)
def test_every_pickle_of_an_archive_is_read(name: str, content: bytes, tmp_path: Path) -> None:
    words = refusal(tmp_path / "a.ckpt", zip_entries({name: content, **entries()}))
    assert "posix.system" in words
    assert inspect(tmp_path / "a.ckpt").unsafe == ("posix.system",)


def test_entries_that_nothing_refers_to_are_refused(tmp_path: Path) -> None:
    for name in ("archive/data/7", "archive/note", "other/data/0", "data/0", "archive/data/0/x"):
        assert name in refusal(tmp_path / "a.ckpt", zip_entries({**entries(), name: SYSTEM[1:]}))


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_names_that_a_reader_might_confuse_are_refused(tmp_path: Path) -> None:
    for name in ("archive/data.pkl", "archive/DATA.pkl", "Archive/data/0"):
        stream = io.BytesIO()
        with zipfile.ZipFile(stream, "w") as archive:
            for each, content in (*entries().items(), (name, EMPTY)):
                archive.writestr(zipfile.ZipInfo(each), content)
        assert "same name" in refusal(tmp_path / "a.ckpt", stream.getvalue())


def test_headers_that_differ_from_the_directory_are_refused(tmp_path: Path) -> None:
    """Name, flags, method, checksum and sizes of an entry: in its header, in the directory, and behind it."""
    for good in (saved(), zip_entries(entries())):
        with zipfile.ZipFile(io.BytesIO(good)) as archive:
            start, entry = archive.start_dir, archive.infolist()[1]
        at = entry.header_offset
        for place, size in ((6, 2), (8, 2), (14, 4), (18, 4), (22, 4), (26, 2), (28, 2), (30, 1)):
            for begin, shift in ((at, 0), (start, 2)):
                data = bytearray(good)
                data[begin + place + shift * (place < 26) : begin + place + shift * (place < 26) + size] = (
                    b"\x05" * size
                )
                refusal(tmp_path / "a.ckpt", bytes(data))
    descriptor = good.rindex(b"PK\x07\x08") if b"PK\x07\x08" in good else 0
    assert not descriptor  # zipfile writes none; torch does:
    good = saved()
    descriptor = good.index(b"PK\x07\x08")
    for place in range(descriptor, descriptor + 16):
        data = bytearray(good)
        data[place] ^= 1
        refusal(tmp_path / "a.ckpt", bytes(data))


def test_every_number_at_the_end_is_compared(tmp_path: Path) -> None:
    good = saved()
    begin = good.index(b"PK\x06\x06")
    compared = set(range(begin, len(good))) - {begin + i for i in (12, 13, 14, 15)}  # versions of programs
    for place in compared:
        data = bytearray(good)
        data[place] ^= 1
        refusal(tmp_path / "a.ckpt", bytes(data))


def test_many_entries_and_long_extra_fields_are_refused(tmp_path: Path) -> None:
    data = bytearray(zip_entries(entries()))
    data[-12:-10] = data[-14:-12] = b"\xff\xff"
    assert "entries" in refusal(tmp_path / "a.ckpt", bytes(data)) or "damaged" in refusal(
        tmp_path / "a.ckpt", bytes(data)
    )


def test_bytes_behind_a_pickle_are_refused(tmp_path: Path) -> None:
    found = entries()
    found["archive/data.pkl"] += SYSTEM
    assert "follow the pickle" in refusal(tmp_path / "a.ckpt", zip_entries(found))


def test_a_big_endian_file_is_refused(tmp_path: Path) -> None:
    assert "big-endian" in refusal(
        tmp_path / "a.ckpt", zip_entries(entries() | {"archive/byteorder": b"big"})
    )


def test_checksums_are_compared_if_the_whole_file_is_read(tmp_path: Path) -> None:
    data = bytearray(saved())
    at = bytes(data).index(struct.pack("<3f", 0, 1, 2))
    data[at + 5] ^= 1
    (tmp_path / "a.ckpt").write_bytes(data)
    assert not examine(tmp_path / "a.ckpt").problem
    assert "checksum differs" in examine(tmp_path / "a.ckpt", whole=True).problem


def test_a_whole_read_is_independent_of_the_file(tmp_path: Path) -> None:
    for name, data in (("zip", saved()), ("legacy", saved(_use_new_zipfile_serialization=False))):
        (tmp_path / name).write_bytes(data)
        content = examine(tmp_path / name, whole=True).checked()
        (tmp_path / name).write_bytes(b"")
        assert content["a"].tolist() == [0, 1, 2]


# Files before PyTorch 1.6


def test_a_legacy_file_without_its_storages_is_refused(tmp_path: Path) -> None:
    """Such a file once gave tensors of leftover memory."""
    good = saved(_use_new_zipfile_serialization=False)
    path = tmp_path / "a.ckpt"
    content = (
        b"\x80\x02}X\x01\x00\x00\x00wctorch._utils\n_rebuild_tensor_v2\n((X\x07\x00\x00\x00storage"
        b"ctorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x04NtQK\x00K\x04\x85K\x01\x85\x89NtRs."
    )
    whole = legacy_file(content, {"0": (4, struct.pack("<4f", 1, 2, 3, 4))})
    path.write_bytes(whole)
    assert read_ckpt(path).tensors["w"].tolist() == [1, 2, 3, 4]
    assert "refers to 1" in refusal(path, legacy_file(content))
    assert "truncated" in refusal(path, legacy_file(content, {"0": (4, bytes(12))}))
    assert "truncated" in refusal(path, legacy_file(content, {"0": (3, bytes(12))}))
    assert "refers to 1" in refusal(path, legacy_file(content, {"1": (4, bytes(16))}))
    assert "refers to 1" in refusal(path, legacy_file(content, {"0": (4, bytes(16)), "1": (4, bytes(16))}))
    assert "2 storages" in refusal(path, legacy_file(content, {"0": (4, bytes(16))}, keys=["0", "0"]))
    for keys in ("0", [0], None, {"0": 1}, [["0"]]):
        refusal(
            path, legacy_file(content, {"0": (4, bytes(16))}, keys=keys) if keys else legacy_file(content)
        )
    for data in (whole + b"x", good + EMPTY, good + SYSTEM):
        assert "follow its last storage" in refusal(path, data)
    for keep in range(0, len(good), 7):
        refusal(path, good[:keep])


@pytest.mark.parametrize("which", range(1, 5))
def test_every_pickle_of_a_legacy_file_is_read(which: int, tmp_path: Path) -> None:
    import pickletools

    stream, ends = io.BytesIO(saved(_use_new_zipfile_serialization=False)), [0]
    for _ in range(5):
        for _ in pickletools.genops(stream):
            pass
        ends.append(stream.tell())
    good = stream.getvalue()
    parts = [good[a:b] for a, b in zip(ends, [*ends[1:], len(good)], strict=True)]
    parts[which] = SYSTEM
    assert "posix.system" in refusal(tmp_path / "a.ckpt", b"".join(parts))
    assert inspect(tmp_path / "a.ckpt").unsafe == ("posix.system",)


def test_a_legacy_file_of_another_machine_is_refused(tmp_path: Path) -> None:
    good = saved(_use_new_zipfile_serialization=False)
    at = good.index(b"little_endian") + len(b"little_endian")
    assert good[at : at + 3] == b"q\x02\x88"
    assert "little-endian" in refusal(tmp_path / "a.ckpt", good[: at + 2] + b"\x89" + good[at + 3 :])


# Other files


def test_all_pickles_of_a_plain_file_are_listed(tmp_path: Path) -> None:
    assert "posix.system" in refusal(tmp_path / "a.pkl", EMPTY + EMPTY + SYSTEM)
    assert "plain pickle" in refusal(tmp_path / "a.pkl", EMPTY)


def test_a_tar_archive_is_refused_by_name(tmp_path: Path) -> None:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        entry = tarfile.TarInfo("pickle")
        entry.size = len(SYSTEM)
        archive.addfile(entry, io.BytesIO(SYSTEM))
    assert "tar archive" in refusal(tmp_path / "a.ckpt", stream.getvalue())


def test_a_name_below_an_inert_package_is_no_way_around(tmp_path: Path) -> None:
    """A class of a training framework becomes an object that does nothing; functions and modules do not."""
    for module, name in (
        ("pytorch_lightning", "os.system"),
        ("pytorch_lightning.utilities", "os.System"),
        ("torch.optim", "swa_utils.get_ema_avg_fn"),
        ("omegaconf", "load"),
        ("lightning.Trainer", "Fit"),
    ):
        pickled = b"\x80\x02}X\x01\x00\x00\x00w" + f"c{module}\n{name}\n)Rs.".encode()
        dot = ":" if "." in name else "."
        assert f"{module}{dot}{name}" in refusal(tmp_path / "a.ckpt", zip_entries({"a/data.pkl": pickled}))
    pickled = b"\x80\x02}X\x01\x00\x00\x00wcpytorch_lightning.callbacks\nModelCheckpoint\n)Rs."
    (tmp_path / "a.ckpt").write_bytes(zip_entries({"a/data.pkl": pickled}))
    assert not examine(tmp_path / "a.ckpt").problem


def test_unsafe_names_are_not_hidden_by_damage(tmp_path: Path) -> None:
    for text in (SYSTEM[:-1], SYSTEM[:-1] + b"\x00", b"\x80\x02}" + SYSTEM[2:-1] + b"ss."):
        assert "posix.system" in refusal(tmp_path / "a.ckpt", zip_entries({"a/data.pkl": text}))


# The library has no second way to read a pickle

# what reads pickles, however it is used: called, derived from, or passed on
READERS = {
    *("torch.load", "torch.jit.load", "torch.package", "torch.hub", "torch.serialization"),
    *("FileSystemReader", "FileSystemWriter", "dcp_to_torch_save", "BroadcastingTorchSaveReader"),
}
PACKAGES = {
    "pickle",
    "_pickle",
    "pickletools",
    "joblib",
    "dill",
    "cloudpickle",
    "shelve",
    "marshal",
    "copyreg",
}
OPCODES = "ldm.weights.formats.pickle_steps"  # the numbers of the instructions come from the module pickle


def ways_to_read_pickles(text: str, *, opcodes: bool = False) -> list[int]:
    """Return the lines of a module that can read a pickle in another way than the library's own.

    Args:
        text: The source.
        opcodes: Whether it may use the constants of the module pickle. Default: False.
    """
    found = []
    for node in ast.walk(ast.parse(text)):
        wrong = False
        if isinstance(node, ast.Attribute):
            used = ast.unparse(node)
            constant = opcodes and node.attr.isupper()
            wrong = used in READERS or node.attr in READERS or (used.startswith("pickle.") and not constant)
        elif isinstance(node, ast.ImportFrom):
            names = {f"{node.module}.{each.name}" for each in node.names} | {each.name for each in node.names}
            wrong = (node.module or "").split(".")[0] in PACKAGES or bool((names | {node.module}) & READERS)
        elif isinstance(node, ast.Import):
            names = {
                each.name.split(".")[0] for each in node.names if not (opcodes and each.name == "pickle")
            }
            wrong = bool(names & PACKAGES)
        elif isinstance(node, ast.keyword):
            wrong = node.arg == "allow_pickle" and ast.unparse(node.value) != "False"
        if wrong:
            found.append(node.lineno)
    return found


def test_the_library_reads_pickles_in_one_way_only() -> None:
    package = Path(ldm.__file__).parent
    modules = {
        ".".join(path.relative_to(package.parent).with_suffix("").parts): path
        for path in package.rglob("*.py")
    }
    found = {
        name: ways_to_read_pickles(path.read_text(encoding="utf-8"), opcodes=name == OPCODES)
        for name, path in modules.items()
    }
    assert OPCODES in found and {name: lines for name, lines in found.items() if lines} == {}


@pytest.mark.parametrize(
    "text",
    [
        "class Reader(pickle.Unpickler): ...",
        "import pickle",
        "from pickle import Unpickler as Reader",
        "read = torch.load",
        "from torch import load",
        "reader = dcp.FileSystemReader(path)",
        "class Reader(dcp.FileSystemReader): ...",
        "from torch.distributed.checkpoint import FileSystemReader",
        "np.load(path, allow_pickle=trusted)",
        "from torch.serialization import load",
        "import joblib",
    ],
)
def test_other_ways_to_read_pickles_are_seen(text: str) -> None:
    assert ways_to_read_pickles(text) == [1]
    assert ways_to_read_pickles(text, opcodes=True) == ([] if text == "import pickle" else [1])


def test_the_canary_of_these_tests_runs_elsewhere(tmp_path: Path) -> None:
    """The malicious files are malicious: a reader that trusts them runs their code."""
    mark = tmp_path / "mark"
    malicious_files.canary_ckpt(tmp_path / "bad.ckpt", mark)
    torch.load(tmp_path / "bad.ckpt", weights_only=False)
    assert mark.exists()
