"""Looking inside a run: attention to each word, predictions of the clean picture, norms, and what any module
gives."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from torch import Tensor, nn

from ldm.diffusion.interfaces import Denoised
from ldm.images.result import Images
from ldm.models.layers.attention import AttentionBlock, SpatialTransformer, attention_control
from ldm.pipelines.call import Call
from ldm.pipelines.conditions import Pair
from ldm.pipelines.latent import LatentDiffusion
from ldm.pipelines.unclip import UnCLIP
from ldm.support.config import nearest

# of a heat map: its colour, and how much of it hides the picture where it is full
RED, OPAQUE = ((0.9, 0.1, 0.1), 0.8)
MapSize = tuple[int, int]
# (module, its inputs, its output) -> another output, or None to leave it
Hook = Callable[[nn.Module, Any, Any], Any]


@dataclass(frozen=True, kw_only=True)
class StepRecord:
    """One step: its index, the timestep ``t`` of its last evaluation, the prediction ``x0`` (B, C, h, w)
    under guidance, and root mean squares (B,) of the state behind the step, of x0 and of eps. ``attention``:
    by the name of each cross-attention (B, h, w, M), the mean over heads (and over evaluations, where the
    step has several) of the probabilities of the conditional branch; over M tokens each sums to 1.
    """

    index: int
    t: float
    x0: Tensor
    norms: Mapping[str, Tensor]
    attention: Mapping[str, Tensor]


@dataclass(kw_only=True)
class Trace:
    """What `trace` recorded of the last task that ran: ``steps``, ``images`` and ``prompts``, and ``outputs``
    of hooked modules, a list for each.

    Of an unCLIP model it is the run of the decoder, before it is enlarged, and without maps: what asks for
    attention to words raises ValueError.
    """

    pipe: LatentDiffusion | UnCLIP
    steps: list[StepRecord] = field(default_factory=list)
    images: Images | None = None
    prompts: tuple[str, ...] = ()
    outputs: dict[str, list[Any]] = field(default_factory=lambda: defaultdict(list))
    _told: Tensor | None = None  # the conditional context (B, M, D)
    _now: dict[str, list[Tensor]] = field(default_factory=lambda: defaultdict(list))
    _rows: slice | None = None  # the conditional branch in the batch that the network sees
    _t: float = 0.0
    _sizes: dict[str, MapSize] = field(default_factory=dict)

    def x0(self) -> list[Images]:
        """The predictions of the clean picture, decoded: one `Images` a step."""
        images = self._made()
        decode = self.pipe.decoder.space.decode if isinstance(self.pipe, UnCLIP) else self.pipe.decode
        return [
            Images(tensor=decode(step.x0.to(self.pipe.device)), seeds=images.seeds, prompts=images.prompts)
            for step in self.steps
        ]

    def norms(self) -> dict[str, Tensor]:
        """Root mean squares over the run, each (N, B): "x" behind each step, "x0" and "eps" as predicted in
        it."""
        self._made()
        return {name: torch.stack([step.norms[name] for step in self.steps]) for name in self.steps[0].norms}

    def levels(self) -> list[MapSize]:
        """The sizes (h, w) at which the network attends to the prompt, largest first."""
        self._latent()
        self._made()
        return sorted({(m.shape[1], m.shape[2]) for m in self.steps[0].attention.values()}, reverse=True)

    def words(self, image: int = 0) -> list[str]:
        """The words of a picture's prompt that have tokens, in order."""
        self._made()
        return [word for word, _ in self._worded().text.places(self.prompts[image])]

    def attention(
        self, word: str, *, steps: Sequence[int] | None = None, level: MapSize | None = None
    ) -> Tensor:
        """How much each position attends to a word, (B, H, W) at the latent's size: the sum over its tokens,
        the mean over layers and steps.

        ``word``: one of the prompt, or several that stand together ("red apple"). ``steps``: indices into the
        run, None for all. ``level``: one of `levels`, None for all, enlarged bilinearly. ValueError for a
        word that a prompt does not have, which names those it has, or another level.
        """
        made, places = self._made(), [self._places(word, prompt) for prompt in self.prompts]
        if level is not None and tuple(level) not in self.levels():
            raise ValueError(f"level: expected one of {self.levels()}, got {level}")
        chosen = self.steps if steps is None else [self.steps[i] for i in steps]
        if not chosen:
            raise ValueError("steps: expected at least one")
        factor = self._latent().vae.config.factor
        size = (made.tensor.shape[-2] // factor, made.tensor.shape[-1] // factor)
        total, count = torch.zeros(len(self.prompts), *size), 0
        for step in chosen:
            for probabilities in step.attention.values():
                if level is None or probabilities.shape[1:3] == tuple(level):
                    # (B, h, w)
                    own = torch.stack(
                        [probabilities[b, :, :, place].sum(-1) for b, place in enumerate(places)]
                    )
                    total += F.interpolate(own[:, None], size, mode="bilinear", align_corners=False)[:, 0]
                    count += 1
        return total / count

    def heatmap(
        self, word: str, *, steps: Sequence[int] | None = None, level: MapSize | None = None
    ) -> Images:
        """The pictures in grey with the attention to a word laid over them in red: none where it is least in
        the picture, full where it is most.

        Arguments and errors as in `attention`; the values are enlarged to the picture's size bilinearly.
        """
        made, values = self._made(), self.attention(word, steps=steps, level=level)
        low, high = values.amin((1, 2), keepdim=True), values.amax((1, 2), keepdim=True)
        values = ((values - low) / (high - low).clamp_min(1e-12))[:, None]
        values = F.interpolate(values, made.tensor.shape[-2:], mode="bilinear", align_corners=False)
        grey, red = reduce(made.tensor, "b c h w -> b 1 h w", "mean"), torch.tensor(RED)[:, None, None]
        tensor = grey + OPAQUE * values * (red - grey)
        return Images(
            tensor=tensor, seeds=made.seeds, prompts=tuple(f"{word} in: {prompt}" for prompt in made.prompts)
        )

    def _places(self, word: str, prompt: str) -> list[int]:
        """The places in the context of all tokens of a word, wherever the prompt has it."""
        text = self._worded().text
        own = text.places(prompt)
        there, wanted = [w for w, _ in own], [w for w, _ in text.places(word)] or [word.lower()]
        starts = [i for i in range(len(there)) if there[i : i + len(wanted)] == wanted]
        if not starts:
            raise ValueError(
                f"word {word!r}: expected one of the prompt's that have tokens,"
                f" {', '.join(map(repr, there)) or 'of which it has none'}"
            )
        return [place for i in starts for _, places in own[i : i + len(wanted)] for place in places]

    def _latent(self) -> LatentDiffusion:
        """The model, if maps are recorded of its kind; ValueError otherwise."""
        if isinstance(self.pipe, UnCLIP):
            raise ValueError(
                f"{self.pipe.card.name!r}: attention is recorded of LatentDiffusion alone; of unCLIP's"
                " decoder, predictions, norms, modules' outputs"
            )
        return self.pipe

    def _worded(self) -> LatentDiffusion:
        """The model, if it is conditioned on words that can be found; ValueError otherwise."""
        if not hasattr(self._latent().text, "places"):
            raise ValueError(
                f"{self.pipe.card.name!r} is not conditioned on words, so none can be looked for"
            )
        return self._latent()

    def _made(self) -> Images:
        if self.images is None or not self.steps:
            raise ValueError("nothing was recorded yet: run a task of the traced model first")
        return self.images

    # What the pipeline tells: a run begins, steps, ends (`ldm.pipelines.conditions.Watcher`).

    def begin(self, call: Call) -> None:
        """A new run: what an earlier one left is dropped."""
        self.steps, self.images, self.prompts = [], None, tuple(map(str, call.prompts))
        self.outputs.clear()
        self._now.clear()

    def told(self, pair: Pair) -> None:
        """What the network will be told."""
        self._told = pair[0].context

    def step(self, i: int, x: Tensor, d: Denoised) -> None:
        """The end of a step."""
        norms = {
            name: reduce(value.float().square(), "b ... -> b", "mean").sqrt().cpu()
            for name, value in (("x", x), ("x0", d.x0), ("eps", d.eps))
        }
        attention = {name: torch.stack(seen).mean(0) for name, seen in self._now.items()}
        self.steps.append(
            StepRecord(index=i, t=self._t, x0=d.x0.float().cpu(), norms=norms, attention=attention)
        )
        self._now.clear()

    def end(self, images: Images) -> None:
        """The pictures of the run."""
        self.images = images

    # What the network's own hooks tell.

    def saw_inputs(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        """The network is called: where in its batch the conditional branch stands is found by the context."""
        _, t, cond = inputs
        self._t = float(torch.as_tensor(t).reshape(-1)[0])
        self._rows, told = None, self._told
        if told is None or cond.context is None:
            return
        n, told = len(told), told.to(cond.context.device, cond.context.dtype)
        for start in range(0, len(cond.context), n):
            if torch.equal(cond.context[start : start + n, : told.shape[1]], told):
                self._rows = slice(start, start + n)
                return

    def saw_attention(self, name: str, probabilities: Tensor) -> None:
        """A cross-attention has computed its probabilities (rows, H, L, M)."""
        if self._rows is None or self._told is None:
            return
        owner = next(owner for owner in self._sizes if name == owner or name.startswith(f"{owner}."))
        h, w = self._sizes[owner]
        mean = reduce(probabilities[self._rows].detach().float(), "b heads l m -> b l m", "mean")
        self._now[name].append(
            rearrange(mean[..., : self._told.shape[1]], "b (h w) m -> b h w m", h=h, w=w).cpu()
        )


@contextmanager
def trace(
    pipe: LatentDiffusion | UnCLIP, hooks: Mapping[str, Hook | None] | Sequence[str] = ()
) -> Iterator[Trace]:
    """Within it, every task of a model is recorded; what is recorded of the last one stays when it is left.
    Of `UnCLIP`, see `Trace`.

    ``hooks``: modules by their dotted names below the model's `networks` ("unet.mid_block", "vae.decoder"): a
    list, whose outputs are collected in `Trace.outputs` (of both branches of guidance, at every call); or a
    mapping to functions as of torch's forward hooks, which may return another output. The traced run's
    pictures are the untraced one's to the bit, as attention is looked at beside the fused kernel and not in
    its place. Memory: one float32 (B, h, w, M) a cross-attention and step.

    TypeError for what is neither a `LatentDiffusion` nor an `UnCLIP`; ValueError for a module that is not
    there, with the nearest name.
    """
    if not isinstance(pipe, LatentDiffusion | UnCLIP):
        raise TypeError(f"trace: expected a LatentDiffusion or an UnCLIP, got {type(pipe).__name__}")
    record = Trace(pipe=pipe)
    named = {
        f"{part}.{name}".rstrip("."): module
        for part, network in pipe.networks().items()
        for name, module in network.named_modules()
    }
    wanted = hooks if isinstance(hooks, Mapping) else dict.fromkeys(hooks)
    for name in wanted:
        if name not in named:
            raise ValueError(f"no module {name!r}; {nearest(name, list(named))}")
    net: Any = (pipe.decoder if isinstance(pipe, UnCLIP) else pipe).denoiser.net
    with ExitStack() as stack:
        for name, fn in wanted.items():
            collect: Hook = fn or (
                lambda module, inputs, output, name=name: record.outputs[name].append(_kept(output))
            )
            stack.callback(named[name].register_forward_hook(collect).remove)
        stack.callback(net.register_forward_pre_hook(record.saw_inputs).remove)
        stack.enter_context(_maps(net, record) if isinstance(pipe, LatentDiffusion) else nullcontext())
        pipe.watchers.append(record)
        stack.callback(pipe.watchers.remove, record)
        yield record


@contextmanager
def _maps(net: nn.Module, record: Trace) -> Iterator[None]:
    """Within it, a trace sees what a network's cross-attentions attend to."""
    with ExitStack() as stack:
        attends = [
            (name, part)
            for name, part in net.named_modules()
            if isinstance(part, SpatialTransformer | AttentionBlock)
        ]
        for name, part in attends:

            def note(module: nn.Module, inputs: tuple[Any, ...], name: str = name) -> None:
                record._sizes[name] = (inputs[0].shape[-2], inputs[0].shape[-1])

            stack.callback(part.register_forward_pre_hook(note).remove)
        if any(getattr(part, "cross", False) for part in net.modules()):
            stack.enter_context(attention_control(net, record.saw_attention))
        yield


def _kept(output: Any) -> Any:
    """A copy of a module's output, apart from the graph."""
    return output.detach().clone() if isinstance(output, Tensor) else output
