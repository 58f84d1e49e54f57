"""Record a run: attention to each word, predictions of the clean image, norms, and outputs of any module."""

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
from ldm.models.dit import DiT
from ldm.models.layers.attention import AttentionBlock, attention_control
from ldm.models.layers.transformer import SpatialTransformer
from ldm.pipelines.call import Call
from ldm.pipelines.conditions import Pair
from ldm.pipelines.latent import LatentDiffusion
from ldm.pipelines.unclip import UnCLIP
from ldm.support.config import nearest
from ldm.support.defaults import as_tensor

RED, OPAQUE = (0.9, 0.1, 0.1), 0.8  # colour of heat maps, and their opacity where attention is largest
MapSize = tuple[int, int]
# (module, inputs, output) -> another output, or None to keep it; modules take and return anything, hence Any
Hook = Callable[[nn.Module, Any, Any], Any]


@dataclass(frozen=True, kw_only=True)
class StepRecord:
    """What is recorded of one step.

    Args:
        index: Index of the step, from 0.
        t: Timestep of the step's last evaluation of the network.
        x0: Prediction of the clean state under guidance, shape (B, C, h, w).
        norms: Root mean squares, shape (B,): of "x", the state after the step, and of the predictions "x0"
            and "eps".
        attention: Attention probabilities of the conditional branch by the name of each cross-attention, of
            shape (B, h, w, M): the mean over heads and over the step's evaluations. They sum to 1 over the M
            tokens.
    """

    index: int
    t: float
    x0: Tensor
    norms: Mapping[str, Tensor]
    attention: Mapping[str, Tensor]


@dataclass(kw_only=True)
class Trace:
    """The record of the last task that ran in a `trace` context.

    For an unCLIP model this is the run of the decoder, before upsampling, and without attention: methods that
    need attention raise ValueError.

    Args:
        pipe: The traced pipeline.
        steps: The steps, in order.
        images: The images of the task; None before it ends.
        prompts: The prompt of each image.
        outputs: Outputs of the hooked modules, a list by module name.
    """

    pipe: LatentDiffusion | UnCLIP
    steps: list[StepRecord] = field(default_factory=list)
    images: Images | None = None
    prompts: tuple[str, ...] = ()
    outputs: dict[str, list[Any]] = field(default_factory=lambda: defaultdict(list))
    _context: Tensor | None = None  # the conditional context (B, M, D)
    _step_attention: dict[str, list[Tensor]] = field(default_factory=lambda: defaultdict(list))
    _rows: slice | None = None  # the rows of the conditional branch in the network's batch
    _t: float = 0.0
    _sizes: dict[str, MapSize] = field(default_factory=dict)

    def x0(self) -> list[Images]:
        """Return the decoded predictions of the clean image, one `Images` per step."""
        images = self._recorded_images()
        space = self.pipe.stage.images
        return [
            Images(
                tensor=space.decode(step.x0.to(self.pipe.device)),
                seeds=images.seeds,
                prompts=images.prompts,
            )
            for step in self.steps
        ]

    def norms(self) -> dict[str, Tensor]:
        """Return root mean squares over the run, each (N, B), by the names of `StepRecord.norms`."""
        self._recorded_images()
        return {name: torch.stack([step.norms[name] for step in self.steps]) for name in self.steps[0].norms}

    def levels(self) -> list[MapSize]:
        """Return the sizes (h, w) at which the network attends to the prompt, largest first."""
        self._attending_pipe()
        self._recorded_images()
        return sorted({(m.shape[1], m.shape[2]) for m in self.steps[0].attention.values()}, reverse=True)

    def words(self, image: int = 0) -> list[str]:
        """Return the words of the prompt of image number ``image`` that have tokens, in order."""
        self._recorded_images()
        return [word for word, _ in self._word_pipe().text.places(self.prompts[image])]

    def attention(
        self, word: str, *, steps: Sequence[int] | None = None, level: MapSize | None = None
    ) -> Tensor:
        """Return how much each position attends to a word.

        Attention is summed over the tokens of the word and averaged over layers and steps.

        Args:
            word: A word of the prompt, or several consecutive ones ("red apple").
            steps: Indices of the steps to average; None for all.
            level: Size (h, w) of the layers to average, one of `levels`; None for all. Smaller layers are
                enlarged bilinearly.

        Returns:
            Attention at the latent's size, in [0, 1], shape (B, h, w).

        Raises:
            ValueError: If a prompt does not contain the word (the message lists its words), ``level`` is not
                a level of the network, or ``steps`` is empty.
        """
        images = self._recorded_images()
        places = [self._token_positions(word, prompt) for prompt in self.prompts]
        if level is not None and tuple(level) not in self.levels():
            raise ValueError(f"level: expected one of {self.levels()}, got {level}")
        chosen = self.steps if steps is None else [self.steps[i] for i in steps]
        if not chosen:
            raise ValueError("steps: expected at least one")
        factor = self._attending_pipe().stage.images.factor
        size = (images.tensor.shape[-2] // factor, images.tensor.shape[-1] // factor)
        total, count = torch.zeros(len(self.prompts), *size, device="cpu", dtype=torch.float32), 0
        for step in chosen:
            for probabilities in step.attention.values():
                if level is None or probabilities.shape[1:3] == tuple(level):
                    # (B, h, w)
                    attended = torch.stack(
                        [probabilities[b, :, :, place].sum(-1) for b, place in enumerate(places)]
                    )
                    total += F.interpolate(attended[:, None], size, mode="bilinear", align_corners=False)[
                        :, 0
                    ]
                    count += 1
        return total / count

    def heatmap(
        self, word: str, *, steps: Sequence[int] | None = None, level: MapSize | None = None
    ) -> Images:
        """Return the images in grey with the attention to a word over them in red.

        Each map is scaled from its smallest value (transparent) to its largest, and enlarged bilinearly to
        the size of the image. Arguments and errors are those of `attention`.
        """
        images, values = self._recorded_images(), self.attention(word, steps=steps, level=level)
        low, high = values.amin((1, 2), keepdim=True), values.amax((1, 2), keepdim=True)
        values = ((values - low) / (high - low).clamp_min(1e-12))[:, None]
        # (B, 1, H, W)
        values = F.interpolate(values, images.tensor.shape[-2:], mode="bilinear", align_corners=False)
        grey, red = (
            reduce(images.tensor, "b c h w -> b 1 h w", "mean"),
            torch.tensor(RED, device=images.tensor.device, dtype=torch.float32)[:, None, None],
        )
        return Images(
            tensor=grey + OPAQUE * values * (red - grey),
            seeds=images.seeds,
            prompts=tuple(f"{word} in: {prompt}" for prompt in images.prompts),
        )

    def _token_positions(self, word: str, prompt: str) -> list[int]:
        """Return the positions in the context of all tokens of a word, for every occurrence in the prompt."""
        text = self._word_pipe().text
        positions = text.places(prompt)
        words, wanted = [w for w, _ in positions], [w for w, _ in text.places(word)] or [word.lower()]
        starts = [i for i in range(len(words)) if words[i : i + len(wanted)] == wanted]
        if not starts and len(wanted) == 1:  # a word of a phrase that is read as one, such as "red apple"
            starts = [i for i, phrase in enumerate(words) if wanted[0] in phrase.split()]
        if not starts:
            raise ValueError(
                f"word {word!r}: expected a word of the prompt that has tokens:"
                f" {', '.join(map(repr, words)) or 'it has none'}"
            )
        return [place for i in starts for _, places in positions[i : i + len(wanted)] for place in places]

    def _attending_pipe(self) -> LatentDiffusion:
        """Return the pipeline; ValueError if attention is not recorded for its kind."""
        if isinstance(self.pipe, UnCLIP):
            raise ValueError(
                f"{self.pipe.card.name!r}: attention is recorded for LatentDiffusion only; for the decoder of"
                " unCLIP, predictions, norms and outputs of modules are recorded"
            )
        return self.pipe

    def _word_pipe(self) -> LatentDiffusion:
        """Return the pipeline; ValueError if its text encoder does not map words to tokens."""
        if not hasattr(self._attending_pipe().text, "places"):
            raise ValueError(
                f"{self.pipe.card.name!r} is not conditioned on words: there are none to look up"
            )
        return self._attending_pipe()

    def _recorded_images(self) -> Images:
        if self.images is None or not self.steps:
            raise ValueError("nothing is recorded yet: run a task of the traced model first")
        return self.images

    # The methods of `ldm.pipelines.protocol.Watcher`, which the pipeline calls.

    def begin(self, call: Call) -> None:
        """Discard the record of an earlier run."""
        self.steps, self.images, self.prompts = [], None, tuple(map(str, call.prompts))
        self.outputs.clear()
        self._step_attention.clear()

    def conditioned(self, pair: Pair) -> None:
        """Keep the context of the conditional branch."""
        self._context = pair[0].context

    def step(self, i: int, x: Tensor, d: Denoised) -> None:
        """Record a step."""
        norms = {
            name: reduce(value.float().square(), "b ... -> b", "mean").sqrt().cpu()
            for name, value in (("x", x), ("x0", d.x0), ("eps", d.eps))
        }
        attention = {name: torch.stack(seen).mean(0) for name, seen in self._step_attention.items()}
        self.steps.append(
            StepRecord(index=i, t=self._t, x0=d.x0.float().cpu(), norms=norms, attention=attention)
        )
        self._step_attention.clear()

    def end(self, images: Images) -> None:
        """Keep the images of the run."""
        self.images = images

    # The methods that hooks of the network call.

    @property
    def watches(self) -> bool:
        """Whether the call that runs now, in this thread, is traced."""
        return any(watcher is self for watcher in self.pipe.watchers)

    def saw_inputs(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        """Find the rows of the conditional branch in the network's batch, by their context."""
        if not self.watches:
            return
        _, t, cond = inputs
        self._t = float(as_tensor(t).reshape(-1)[0])
        self._rows, context = None, self._context
        if context is None or cond.context is None:
            return
        n, context = len(context), context.to(cond.context.device, cond.context.dtype)
        for start in range(0, len(cond.context), n):
            if torch.equal(cond.context[start : start + n, : context.shape[1]], context):
                self._rows = slice(start, start + n)
                return

    def saw_attention(self, name: str, probabilities: Tensor) -> None:
        """Record the probabilities (rows, H, L, M) of a cross-attention."""
        if self._rows is None or self._context is None:
            return
        owner = next(owner for owner in self._sizes if owner in ("", name) or name.startswith(f"{owner}."))
        h, w = self._sizes[owner]
        mean = reduce(probabilities[self._rows].detach().float(), "b heads l m -> b l m", "mean")
        self._step_attention[name].append(
            rearrange(mean[..., : self._context.shape[1]], "b (h w) m -> b h w m", h=h, w=w).cpu()
        )


@contextmanager
def trace(
    pipe: LatentDiffusion | UnCLIP, hooks: Mapping[str, Hook | None] | Sequence[str] = ()
) -> Iterator[Trace]:
    """Record every task of a pipeline inside the context; the record of the last one remains afterwards.

    Tasks that other threads run on the same pipeline are not recorded.

    The images are bit-identical to those of an untraced run: attention probabilities are computed in addition
    to the fused kernel, not in place of it. Each step takes one float32 tensor (B, h, w, M) per
    cross-attention.

    Args:
        pipe: The pipeline. See `Trace` for what is recorded of an `UnCLIP`.
        hooks: Modules by dotted name below `pipe.networks()`, such as "unet.mid_block" or "vae.decoder".
            Outputs of the modules in a list are collected in `Trace.outputs`, for both branches of guidance
            and every call. A mapping gives each module a function with the signature of a torch forward hook,
            which may return another output; None collects the outputs.

    Yields:
        The `Trace`.

    Raises:
        TypeError: If ``pipe`` is neither a `LatentDiffusion` nor an `UnCLIP`.
        ValueError: If there is no module of a given name; the message offers the nearest.
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
    net = pipe.stage.denoiser.net
    with ExitStack() as stack:
        for name, fn in wanted.items():
            hook = TracedHook(record, fn or _collecting_hook(record, name))
            stack.callback(named[name].register_forward_hook(hook).remove)
        stack.callback(net.register_forward_pre_hook(record.saw_inputs).remove)
        stack.enter_context(
            _attention_recorded(net, record) if isinstance(pipe, LatentDiffusion) else nullcontext()
        )
        stack.enter_context(pipe.watched_by(record))
        yield record


@contextmanager
def _attention_recorded(net: nn.Module, record: Trace) -> Iterator[None]:
    """Record the probabilities of a network's cross-attentions inside the context."""
    with ExitStack() as stack:
        attends = [
            (name, part)
            for name, part in net.named_modules()
            if isinstance(part, SpatialTransformer | AttentionBlock | DiT)
        ]
        for name, part in attends:

            def note(module: nn.Module, inputs: tuple[Any, ...], name: str = name) -> None:
                if record.watches:
                    patch = module.config.patch if isinstance(module, DiT) else 1
                    record._sizes[name] = (inputs[0].shape[-2] // patch, inputs[0].shape[-1] // patch)

            stack.callback(part.register_forward_pre_hook(note).remove)
        if any(getattr(part, "cross", False) for part in net.modules()):
            stack.enter_context(attention_control(net, record.saw_attention))
        yield


class TracedHook:
    """Forward hook that leaves the calls of other threads alone.

    Args:
        record: The trace.
        hook: Called in the traced calls.
    """

    def __init__(self, record: Trace, hook: Hook) -> None:
        self.record, self.hook = record, hook

    def __call__(self, module: nn.Module, inputs: Any, output: Any) -> Any:  # as `Hook`
        return self.hook(module, inputs, output) if self.record.watches else None

    def applies(self) -> bool:
        """Return whether the call that runs now, in this thread, is traced."""
        return self.record.watches


def _collecting_hook(record: Trace, name: str) -> Hook:
    """Return a forward hook that appends a detached copy of each output to ``record.outputs[name]``."""

    def hook(module: nn.Module, inputs: Any, output: Any) -> None:
        record.outputs[name].append(output.detach().clone() if isinstance(output, Tensor) else output)

    return hook
