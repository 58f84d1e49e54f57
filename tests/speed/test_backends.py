"""torch.compile and OpenVINO as backends of `ldm.optimize`."""

from __future__ import annotations

import builtins
import copy
import sys
from types import ModuleType

import pytest
import torch
from small_networks import UNETS, inputs, make, rms
from tiny_latent_diffusion import tiny_model
from torch import nn

import ldm
from ldm.speed.backends import Flat, OpenVINO


@torch.no_grad()
@pytest.mark.parametrize("name", UNETS)
def test_openvino_computes_the_same_and_can_be_removed(name):
    pytest.importorskip("openvino")
    net = make(UNETS[name])
    x, t, cond = inputs(UNETS[name], torch.float32)
    expected = net(x, t, cond)
    assert ldm.optimize(net, backend="openvino").optimizations == (
        "UNet and decoder: by OpenVINO, compiled for each shape at its first call",
    )
    assert rms(net(x, t, cond), expected) < 1e-5
    assert rms(net(x[:1], t[:1], cond[:1]), expected[:1]) < 1e-5  # another shape
    assert len(net.forward.compiled) == 2 and type(net.conv_in) is nn.Conv2d
    other = copy.deepcopy(net)
    assert other.forward.module is other and not other.forward.compiled
    net.conv_out.weight.data.mul_(2), net.conv_out.bias.data.mul_(2)
    assert rms(net(x, t, cond), 2 * expected) < 1e-5
    net.conv_out.weight.data.div_(2), net.conv_out.bias.data.div_(2)
    fast = ldm.optimize(copy.deepcopy(net), kernels=False)(x, t, cond)
    assert "forward" not in ldm.optimize(net, kernels=False).__dict__ and torch.equal(net(x, t, cond), fast)


class Frozen:
    """Stand-in for OpenVINO's compiled model, which contains the weights."""

    def __init__(self, substitute, names, tensors, dtype):
        self.network = Flat(copy.deepcopy(substitute.module), names)

    def __call__(self, arrays):
        return {0: self.network(*map(torch.from_numpy, arrays)).numpy()}


def test_compiled_weights_follow_the_parameters(monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino", ModuleType("openvino"))
    monkeypatch.setattr(OpenVINO, "_compiled_model", lambda *args: Frozen(*args))
    plain = make(UNETS["sd"])
    net = ldm.optimize(copy.deepcopy(plain), backend="openvino")
    args = inputs(UNETS["sd"], torch.float32)
    for change in (
        lambda own: None,
        lambda own: own.conv_in.weight.data.mul_(2),
        lambda own: setattr(own.conv_in, "bias", nn.Parameter(own.conv_in.bias + 1, requires_grad=False)),
    ):
        change(plain), change(net)
        with torch.no_grad():
            assert torch.equal(net(*args), plain(*args)) and len(net.forward.compiled) == 1
    net.conv_in.bias.requires_grad_(True)
    net(*args).sum().backward()
    assert net.conv_in.bias.grad is not None and copy.deepcopy(net).forward.compiled == {}


@torch.no_grad()
def test_openvino_computes_the_images_of_a_pipeline():
    pytest.importorskip("openvino")
    pipe = tiny_model()
    options = {"steps": 3, "guidance": 3.0, "progress": False}
    expected = pipe.text_to_image("a red cat", **options).tensor
    ldm.optimize(ldm.optimize(pipe), backend="openvino")
    assert (pipe.text_to_image("a red cat", **options).tensor - expected).abs().max() < 1e-4
    assert pipe.vae.decoder.forward.compiled and pipe.denoiser.net.forward.compiled


@torch.no_grad()
@pytest.mark.slow
def test_torch_compile_computes_the_same_and_can_be_removed():
    net = ldm.optimize(make(UNETS["sd"]))
    args = inputs(UNETS["sd"], torch.float32)
    fast = net(*args)
    ldm.optimize(net, backend="compile")
    assert net._compiled_call_impl is not None and rms(net(*args), fast) < 1e-5
    assert ldm.optimize(net)._compiled_call_impl is None and torch.equal(net(*args), fast)


def test_unknown_and_missing_backends_are_named(monkeypatch):
    net = make(UNETS["sd"])
    with pytest.raises(ValueError, match="did you mean 'openvino'"):
        ldm.optimize(net, backend="openvin")
    for options in ({"reuse": 2}, {"merge": 0.5}, {"int8": True}, {"memory": True}):
        with pytest.raises(ValueError, match="expected backend=None"):
            ldm.optimize(net, backend="compile", **options)
    with pytest.raises(ValueError, match="the Linear has none"):
        ldm.optimize(nn.Linear(2, 2), backend="compile")
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "openvino":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match="pip install openvino"):
        ldm.optimize(net, backend="openvino")
    monkeypatch.undo()
    from torch._inductor import cpp_builder
    from torch._inductor.exc import InvalidCxxCompiler

    def none():
        raise InvalidCxxCompiler

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", none)
    with pytest.raises(RuntimeError, match="needs a C"):
        ldm.optimize(net, backend="compile")
    assert (
        type(net.conv_in) is nn.Conv2d and "forward" not in net.__dict__ and net._compiled_call_impl is None
    )
