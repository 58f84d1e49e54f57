"""Other programs that compute the UNets and the decoder of a pipeline: torch.compile and OpenVINO."""

from __future__ import annotations

import copy
import threading
from typing import Any

import torch
from torch import Tensor, nn

from ldm.diffusion.cond import Cond
from ldm.models.unet import UNet
from ldm.models.vae import VAEDecoder
from ldm.speed.networks import unets_and_decoders
from ldm.speed.packed import needs_gradient
from ldm.speed.substitute import Substitute
from ldm.support.config import nearest
from ldm.support.derived import Derived

BACKENDS = ("compile", "openvino")


def check_backend(backend: str | None) -> None:
    """Raise an error if a backend is unknown or not available.

    Args:
        backend: Name of the backend. None, for ldm's own layers, is always valid.

    Raises:
        ValueError: If the name is unknown.
        ImportError: If the package openvino is missing.
        RuntimeError: If the C++ compiler that torch.compile needs is missing.
    """
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


def use_backend(pipe: nn.Module, backend: str) -> str:
    """Let a backend compute the UNets and decoders of a pipeline, compiled for each shape at its first call.

    Args:
        pipe: The pipeline, or a network.
        backend: "compile" or "openvino".

    Returns:
        A description of what was done.

    Raises:
        ValueError: If the pipeline has neither UNet nor decoder.
    """
    for net in unets_and_decoders(pipe):
        if backend == "openvino":
            OpenVINO(net)
        else:
            net.compile(dynamic=False)
    return (
        f"UNet and decoder: by {'torch.compile' if backend == 'compile' else 'OpenVINO'}, compiled for each"
        " shape at its first call"
    )


def remove_compiled(pipe: nn.Module) -> None:
    """Remove what torch.compile made of a pipeline's networks; OpenVINO's networks are `Substitute`s."""
    for net in pipe.modules():
        if isinstance(net, UNet | VAEDecoder):
            net._compiled_call_impl = None


class OpenVINO(Substitute[UNet | VAEDecoder]):
    """Forward of a network by OpenVINO, in the network's dtype and with torch's number of threads.

    The network is compiled for each shape, and the last two compilations are kept. They contain the weights,
    so the network is compiled again after a change of its parameters (`ldm.support.derived`). Evaluations of
    several threads take turns, as a compiled model has one set of buffers. The network computes its own
    forward with derivatives, and on other devices than the CPU.
    """

    def __init__(self, module: UNet | VAEDecoder) -> None:
        super().__init__(module)
        self._models: Derived[dict[Any, Any]] = Derived()  # openvino has no type information
        self._turn = threading.Lock()

    @property
    def compiled(self) -> dict[Any, Any]:
        """OpenVINO's compiled models by dtype, shapes and number of threads."""
        return self._models.value or {}

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_turn"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _turn=threading.Lock())

    def __call__(self, *args: Any) -> Tensor:  # the arguments of the module's forward
        x = args[0]
        sources = [*self.module.parameters(), *self.module.buffers()]
        if needs_gradient(x, *sources) or self.module.training or x.device.type != "cpu":
            return self.original_forward(*args)
        names: list[str] = []
        tensors = [arg for arg in args if isinstance(arg, Tensor)]
        if isinstance(args[-1], Cond):
            names, values = [name for name, _ in args[-1].items()], [value for _, value in args[-1].items()]
            tensors += values
        tensors = [value.float() if value.is_floating_point() else value for value in tensors]
        key = (x.dtype, *names, *(value.shape for value in tensors), torch.get_num_threads())
        with self._turn:
            compiled = self._models.of(sources, dict)
            if key not in compiled:
                if len(compiled) > 1:
                    compiled.pop(next(iter(compiled)))
                compiled[key] = self._compiled_model(names, tensors, x.dtype)
            result = next(iter(compiled[key]([value.numpy() for value in tensors]).values()))
            return torch.from_numpy(result.copy()).to(x.dtype)

    def _compiled_model(self, names: list[str], tensors: list[Tensor], dtype: torch.dtype) -> Any:
        """Return OpenVINO's model of the network for the shapes of tensors.

        Args:
            names: Fields of the condition, the last of the tensors.
            tensors: Arguments of the network, floating-point ones in float32.
            dtype: Dtype of the computation.
        """
        import openvino  # without type information, hence Any

        flat = Flat(copy.deepcopy(self.module).float(), names)
        with torch.no_grad():
            model = openvino.convert_model(torch.export.export(flat, tuple(tensors)))
        hint = "bf16" if dtype == torch.bfloat16 else "f32"
        options = {
            "INFERENCE_PRECISION_HINT": hint,
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "PERFORMANCE_HINT": "LATENCY",
        }
        return openvino.Core().compile_model(model, "CPU", options)


class Flat(nn.Module):
    """A network as a function of tensors alone: its own arguments, then the fields of a `Cond`.

    Args:
        network: The network.
        names: Names of the fields, in the order of the last arguments.
    """

    def __init__(self, network: nn.Module, names: list[str]) -> None:
        super().__init__()
        self.network, self.names = network, names
        network.__dict__.pop("forward", None)  # the copy of the substitute

    def forward(self, *tensors: Tensor) -> Tensor:
        """Return the output of the network."""
        own = len(tensors) - len(self.names)
        fields = dict(zip(self.names, tensors[own:], strict=True))
        return self.network(*tensors[:own], *([Cond.of(fields)] if isinstance(self.network, UNet) else []))
