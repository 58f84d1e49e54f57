"""Other programs that compute the UNets and the decoder of a pipeline: torch.compile, and OpenVINO."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from ldm.diffusion.cond import Cond
from ldm.models.unet import UNet
from ldm.models.vae import VAEDecoder
from ldm.speed.packed import with_grad
from ldm.speed.substitute import Substitute
from ldm.support.config import nearest

BACKENDS = ("compile", "openvino")


def check_backend(backend: str | None) -> None:
    """ValueError for a name that is none, ImportError or RuntimeError with what is missing."""
    if backend is None:
        return
    if backend not in BACKENDS:
        raise ValueError(
            f"backend {backend!r}: expected None (ldm's own layers) or a name; {nearest(backend, BACKENDS)}"
        )
    if backend == "openvino":
        try:
            import openvino  # noqa: F401
        except ImportError as error:
            raise ImportError(
                "backend 'openvino': the package openvino is not installed: pip install openvino"
            ) from error
    else:
        from torch._inductor.cpp_builder import get_cpp_compiler
        from torch._inductor.exc import InvalidCxxCompiler

        try:
            get_cpp_compiler()
        except InvalidCxxCompiler as error:
            raise RuntimeError(
                "backend 'compile': torch.compile needs a C++ compiler, and there is none (g++, or CXX)"
            ) from error


def networks(pipe: nn.Module) -> list[nn.Module]:
    """What a backend computes: UNets and decoders; ValueError where there is none."""
    found = [part for part in pipe.modules() if isinstance(part, UNet | VAEDecoder)]
    if not found:
        raise ValueError(f"a backend computes UNets and decoders, and the {type(pipe).__name__} has none")
    return found


def use(pipe: nn.Module, backend: str) -> str:
    """Have a backend compute a pipeline's networks, compiled for each shape when it first comes; says what
    was done."""
    for net in networks(pipe):
        if backend == "openvino":
            OpenVINO(net)
        else:
            net.compile(dynamic=False)
    return (
        f"UNet and decoder: by {'torch.compile' if backend == 'compile' else 'OpenVINO'}, compiled for each"
        " shape at its first call"
    )


def leave(pipe: nn.Module) -> None:
    """Have no network compiled by torch any more; OpenVINO's are `Substitute`s."""
    for net in pipe.modules():
        if isinstance(net, UNet | VAEDecoder):
            net._compiled_call_impl = None


class OpenVINO(Substitute):
    """A network compiled by OpenVINO for the two shapes that came last, in the network's dtype and torch's
    number of threads.

    Compiled networks hold their weights: those loaded or moved later are seen after another ``ldm.optimize``.
    With gradients and off the CPU the network computes by itself.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        self.compiled: dict[Any, Any] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "compiled": {}}

    def __call__(self, *args: Any) -> Tensor:
        x = args[0]
        if with_grad(x) or self.module.training or x.device.type != "cpu":
            return self.plain(*args)
        names: list[str] = []
        tensors = [arg for arg in args if isinstance(arg, Tensor)]
        if isinstance(args[-1], Cond):
            names, given = [name for name, _ in args[-1].items()], [value for _, value in args[-1].items()]
            tensors += given
        tensors = [value.float() if value.is_floating_point() else value for value in tensors]
        key = (x.dtype, *names, *(value.shape for value in tensors), torch.get_num_threads())
        if key not in self.compiled:
            if len(self.compiled) > 1:
                self.compiled.pop(next(iter(self.compiled)))
            self.compiled[key] = self._compile(names, tensors, x.dtype)
        result = next(iter(self.compiled[key]([value.numpy() for value in tensors]).values()))
        return torch.from_numpy(result.copy()).to(x.dtype)

    def _compile(self, names: list[str], tensors: list[Tensor], dtype: torch.dtype) -> Any:
        import openvino

        flat = Flat(copy.deepcopy(self.module).float(), names)
        with torch.no_grad():
            model = openvino.convert_model(torch.export.export(flat, tuple(tensors)))  # of these shapes alone
        hint = "bf16" if dtype == torch.bfloat16 else "f32"
        options = {
            "INFERENCE_PRECISION_HINT": hint,
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "PERFORMANCE_HINT": "LATENCY",
        }
        return openvino.Core().compile_model(model, "CPU", options)


class Flat(nn.Module):
    """A network as a function of tensors alone: its own arguments, and the fields of a `Cond` by name behind
    them."""

    def __init__(self, network: nn.Module, names: list[str]) -> None:
        super().__init__()
        self.network, self.names = network, names
        network.__dict__.pop("forward", None)  # the substitute's copy

    def forward(self, *tensors: Tensor) -> Tensor:
        own = len(tensors) - len(self.names)
        fields = dict(zip(self.names, tensors[own:], strict=True))
        return self.network(*tensors[:own], *([Cond(**fields)] if isinstance(self.network, UNet) else []))
