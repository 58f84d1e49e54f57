"""The globals that a pickled checkpoint may name, and what becomes of them."""

from __future__ import annotations

import torch

# Storages by the global that names them; an untyped one holds bytes.
STORAGE_TYPES: dict[str, torch.dtype] = {
    **{
        f"torch.{kind}Storage": dtype
        for kind, dtype in (
            ("Double", torch.float64),
            ("Float", torch.float32),
            ("Half", torch.float16),
            ("BFloat16", torch.bfloat16),
            ("Long", torch.int64),
            ("Int", torch.int32),
            ("Short", torch.int16),
            ("Char", torch.int8),
            ("Byte", torch.uint8),
            ("Bool", torch.bool),
            ("ComplexFloat", torch.complex64),
            ("ComplexDouble", torch.complex128),
        )
    },
    "torch.storage.UntypedStorage": torch.uint8,
    "torch.UntypedStorage": torch.uint8,
    "torch.storage._UntypedStorage": torch.uint8,
}
# Types of entries by name, which this release of PyTorch may lack.
ENTRY_TYPES = frozenset(
    f"torch.{name}"
    for name in (
        *("float64", "float32", "float16", "bfloat16", "complex128", "complex64"),
        *("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu"),
        *("int64", "int32", "int16", "int8", "uint64", "uint32", "uint16", "uint8", "bool"),
    )
)
# The functions that build tensors and their containers.
REBUILDERS = frozenset(
    {
        "torch._utils._rebuild_tensor",
        "torch._utils._rebuild_tensor_v2",
        "torch._utils._rebuild_tensor_v3",
        "torch._utils._rebuild_parameter",
        "torch._utils._rebuild_parameter_with_state",
        "torch._tensor._rebuild_from_type",
        "torch._tensor._rebuild_from_type_v2",
        "torch.Tensor",
        "torch.nn.parameter.Parameter",
        "torch.nn.parameter.Buffer",
        "collections.OrderedDict",
        "torch.Size",
    }
)
# What is neither dangerous nor read, by the global that stands for it.
UNREAD = {
    "torch._utils._rebuild_qtensor": "a quantised tensor",
    "torch.serialization._get_layout": "a sparse tensor",
    "torch._utils._rebuild_sparse_tensor": "a sparse tensor",
    "torch._utils._rebuild_sparse_csr_tensor": "a sparse tensor",
    "torch._utils._rebuild_nested_tensor": "a nested tensor",
    "torch._utils._rebuild_meta_tensor_no_storage": "a tensor without data (on the meta device)",
    "torch._utils._rebuild_wrapper_subclass": "a tensor of another library",
    "torch._utils._rebuild_device_tensor_from_numpy": "a tensor of a device without storages",
    "torch._utils._rebuild_device_tensor_from_cpu_tensor": "a tensor of a device without storages",
    "torch._utils._rebuild_xla_tensor": "a tensor of a device without storages",
    **{
        f"torch.{kind}Storage": "quantised numbers"
        for kind in ("QInt8", "QUInt8", "QInt32", "QUInt4x2", "QUInt2x4")
    },
    **{
        f"torch.{kind}": "quantised numbers" for kind in ("qint8", "quint8", "qint32", "quint4x2", "quint2x4")
    },
    **{
        f"torch.{kind}": "packed numbers"
        for kind in ("float4_e2m1fn_x2", "bits8", "bits16", "bits4x2", "bits2x4")
    },
    **{f"torch.{kind}": "complex numbers of 32 bits" for kind in ("complex32", "bcomplex32")},
    **{f"torch.{sign}int{bits}": "packed numbers" for sign in ("", "u") for bits in range(1, 8)},
}
# What stands beside the weights in real checkpoints and is not needed: it becomes objects that do nothing.
INERT = frozenset(
    {
        f"{module}.{name}"
        for module in ("builtins", "__builtin__")
        for name in (
            *("set", "frozenset", "list", "dict", "tuple", "int", "long", "float", "complex", "bool", "str"),
            *("unicode", "bytes", "bytearray", "slice", "range", "xrange", "object"),
        )
    }
    | {f"{module}._reconstructor" for module in ("copyreg", "copy_reg")}
    | {f"collections.{name}" for name in ("defaultdict", "Counter", "deque")}
    | {f"datetime.{name}" for name in ("datetime", "date", "time", "timedelta", "timezone")}
    | {f"pathlib.{name}" for name in ("Path", "PurePath", "PosixPath", "PurePosixPath")}
    | {f"pathlib.{name}" for name in ("WindowsPath", "PureWindowsPath")}
    | {
        f"numpy.{module}.{name}"
        for module in ("core.multiarray", "_core.multiarray")
        for name in ("scalar", "_reconstruct")
    }
    | {
        "_codecs.encode",
        "typing.Any",
        "argparse.Namespace",
        "decimal.Decimal",
        "uuid.UUID",
        "numpy.dtype",
        "numpy.ndarray",
        "numpy.core.numeric._frombuffer",
        "numpy._core.numeric._frombuffer",
        "torch.device",
        "torch.torch_version.TorchVersion",
        # the modules of DALL·E's discrete autoencoder, whose files hold whole modules
        *(f"dall_e.{name}" for name in ("encoder.Encoder", "encoder.EncoderBlock", "utils.Conv2d")),
        *(f"dall_e.{name}" for name in ("decoder.Decoder", "decoder.DecoderBlock")),
        *(f"torch.nn.modules.{name}" for name in ("container.Sequential", "activation.ReLU")),
        *(
            f"torch.nn.modules.{name}"
            for name in ("pooling.MaxPool2d", "upsampling.Upsample", "linear.Identity")
        ),
        "torch.nn.modules.container.ParameterDict",
        "torch.nn.modules.container.ParameterList",
    }
)
# Packages of which every class becomes such an object. Their functions are refused.
INERT_PACKAGES = (
    "pytorch_lightning.",
    "lightning.",
    "lightning_fabric.",
    "omegaconf.",
    "packaging.version.",
    "packaging._structures.",
    "torch.optim.",
    "pytorch_warmup.",
)


def permitted(name: str) -> bool:
    """Return whether a pickle may contain a global with this full name."""
    if name in STORAGE_TYPES or name in ENTRY_TYPES or name in REBUILDERS or name in UNREAD or name in INERT:
        return True
    *modules, last = name.split(".")
    of_module = ":" not in name and all(part == part.lower() for part in modules)  # not of a class
    return name.startswith(INERT_PACKAGES) and of_module and last.lstrip("_")[:1].isupper()
