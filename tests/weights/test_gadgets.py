"""Functions and classes by which pickles run code: each is refused by name, in every instruction."""

from __future__ import annotations

import sys
from pathlib import Path

import malicious_files
import pytest
from malicious_files import legacy_file, zip_entries

from ldm.registry.inspection import inspect
from ldm.weights.formats.pickles import examine, read_ckpt

# programs; text as code; modules as code; introspection; other readers of pickles; machine-learning packages;
# files and libraries; connections; threads and hooks; installers
GADGETS = """
posix.system nt.system os.system os.popen os.execv os.spawnl os.posix_spawn os.remove os.putenv
subprocess.Popen subprocess.run subprocess.call subprocess.check_output subprocess.getoutput
pty.spawn commands.getoutput popen2.popen2 platform.popen webbrowser.open
multiprocessing.util.spawnv_passfds distutils.spawn.spawn builtins.eval builtins.exec
builtins.compile builtins.open builtins.__import__ builtins.getattr builtins.setattr
builtins.breakpoint __builtin__.eval __builtin__.execfile __builtin__.apply
importlib.import_module importlib.machinery.SourceFileLoader imp.load_source runpy.run_path
runpy._run_code code.interact codeop.compile_command timeit.timeit cProfile.runctx pdb.run bdb.Bdb
trace.Trace doctest.debug_script idlelib.pyshell.ModifiedInterpreter
lib2to3.pgen2.grammar.Grammar.loadpickle pydoc.pipepager types.FunctionType types.CodeType
functools.partial functools.reduce operator.attrgetter operator.methodcaller pickle.loads
_pickle.loads marshal.loads shelve.open dill.loads cloudpickle.loads joblib.load
pandas.read_pickle numpy.load yaml.unsafe_load torch.load torch.hub.load torch.jit.load
torch.storage._load_from_bytes torch.ops.load_library torch.utils.cpp_extension.load_inline
torch.fx.graph_module.reduce_graph_module torch.utils.collect_env.run
numpy.testing._private.utils.runstring numpy.distutils.exec_command.exec_command
numpy.f2py.diagnose.run_command ctypes.CDLL _ctypes.dlopen io.open io.FileIO io.open_code
shutil.rmtree shutil.copyfile tempfile.mkstemp logging.FileHandler socket.socket
socket.create_connection urllib.request.urlopen http.client.HTTPSConnection ftplib.FTP
smtplib.SMTP ssl.get_server_certificate threading.Thread _thread.start_new_thread atexit.register
signal.signal sys.settrace venv.create ensurepip._run_pip pip.main pip._internal.main
sympy.sympify tensorflow.py_function omegaconf.load pytorch_lightning.utilities.cloud_io.load
""".split()
assert len(GADGETS) == len(set(GADGETS)) >= 66


def pieces(name: str) -> tuple[bytes, bytes]:
    """Return the module and the name in it of a full name; a module begins with a small letter."""
    parts = name.split(".")
    modules = next((i for i, part in enumerate(parts) if part[:1].isupper()), len(parts) - 1)
    return ".".join(parts[:modules]).encode(), ".".join(parts[modules:]).encode()


def calls(name: str, argument: str) -> dict[str, bytes]:
    """Return pickles that call a function with a text, by the instruction of the call."""
    module, last = pieces(name)
    text = b"X" + len(argument).to_bytes(4, "little") + argument.encode()
    known = b"c" + module + b"\n" + last + b"\n"
    return {
        "REDUCE": b"\x80\x02" + known + text + b"\x85R.",
        "STACK_GLOBAL": malicious_files.stack_global(module.decode(), last.decode(), argument),
        "INST": b"\x80\x02(" + text + b"i" + module + b"\n" + last + b"\n.",
        "OBJ": b"\x80\x02(" + known + text + b"o.",
        "NEWOBJ": b"\x80\x02" + known + text + b"\x85\x81.",
        "NEWOBJ_EX": b"\x80\x04" + known + text + b"\x85}\x92.",
        "BUILD": b"\x80\x02" + known + b"}" + text + text + b"sb.",
        "a key": b"\x80\x02}" + known + text + b"\x85RNs.",
        "below a checkpoint": b"\x80\x02}" + text + known + text + b"\x85Rs.",
    }


@pytest.mark.parametrize("name", GADGETS)
def test_it_is_refused_by_name_and_nothing_is_imported(name: str, tmp_path: Path) -> None:
    path, mark = tmp_path / "bad.ckpt", tmp_path / "mark"
    before = set(sys.modules)
    for instruction, pickled in calls(name, str(mark)).items():
        for content in (zip_entries({"a/data.pkl": pickled}), legacy_file(pickled), pickled):
            path.write_bytes(content)
            found = examine(path)
            assert [each.replace(":", ".") for each in found.refused] == [name], instruction
            with pytest.raises(ValueError, match=r"bad\.ckpt' is refused: its pickle names .*Nothing was"):
                read_ckpt(path)
            assert inspect(path, digest=False).unsafe
    assert set(sys.modules) == before and not mark.exists()
