"""A LoRA on one branch of a diffusers pipeline, for Qwen-Image and Z-Image: what i2l_ext.hooks.branch offers.

The pipeline says which branch a call of its transformer is of, and how far its steps are. No weight is changed, so the
transformer may be quantized or offloaded. Several LoRAs add up.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from i2l_ext.converters import UserError

from .adapter import BranchAdapter, read_adapter
from .rows import Strength

if TYPE_CHECKING:
    from torch import nn

BRANCHES: Mapping[str, tuple[bool, bool]] = {"positive": (True, False), "negative": (False, True), "both": (True, True)}
"""Branch -> whether the LoRA acts on the positive and on the negative one."""


@dataclass(eq=False)
class AppliedLora:
    """A LoRA that a pipeline has, until `remove` or the end of a ``with``. ``missing``: its modules that the pipeline's
    transformer has not."""

    file: Path
    strength: Strength
    missing: tuple[str, ...] = ()
    _guide: PipelineGuide | None = field(default=None, repr=False)

    def remove(self) -> None:
        """The pipeline is without it; without the last it is as it was before. A second time does nothing. The memory
        of several LoRAs is freed with the last."""
        if self._guide is not None:
            guide, self._guide = self._guide, None
            guide.drop(self)

    def __enter__(self) -> AppliedLora:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()


def apply(
    pipe: Any,
    source: Path | str,
    *,
    branch: str = "positive",
    weight: float = 1.0,
    start: float = 0.0,
    stop: float = 1.0,
) -> AppliedLora:
    """Let a LoRA file act on one branch of guidance in all further calls of ``pipe``. It is read once.

    ``branch``: positive, negative or both. ``weight``: the LoRA weight. It acts from the share ``start`` of the steps
    to the share ``stop``. The pipeline must have a transformer of Qwen-Image's or Z-Image's class, from diffusers.

    Raises UserError for another pipeline, an unknown branch, a wrong range, and a LoRA that cannot be read or does not
    fit; then the pipeline is as it was. A call of the transformer outside of the pipeline raises UserError where
    nothing says which branch it is.
    """
    if branch not in BRANCHES:
        raise UserError(f"branch is one of {', '.join(BRANCHES)}, not {branch!r}.", "unknown_choice")
    if not 0 <= start < stop <= 1:
        raise UserError(f"start and stop are shares of the steps, 0 <= start < stop <= 1, not {start:g} and {stop:g}.")
    positive, negative = (weight * acts for acts in BRANCHES[branch])
    return apply_strength(pipe, source, Strength(positive, negative, start, stop))


def apply_strength(pipe: Any, source: Path | str, strength: Strength) -> AppliedLora:
    """The same with a strength for each branch. Of ``pipe`` a weak reference is kept. Raises UserError for another
    pipeline and for a LoRA that cannot be read or does not fit."""
    kind = type(getattr(pipe, "transformer", None)).__name__
    if kind not in ROWS:
        raise UserError(f"The pipeline's transformer is a {kind}; a branch is known of {' and '.join(ROWS)}.")
    applied = AppliedLora(Path(source), strength)
    (_guides.get(pipe.transformer) or PipelineGuide(pipe)).add(applied)
    return applied


class PipelineGuide:
    """What a pipeline's transformer has while LoRAs are applied: hooks that switch their adapter on for each call.

    ``context``: the name of the pipeline's `cache_context`, "cond" or "uncond"; None outside.
    """

    def __init__(self, pipe: Any) -> None:
        self._pipe, self._model = weakref.ref(pipe), weakref.ref(pipe.transformer)
        self._loras: list[AppliedLora] = []
        self._adapter: BranchAdapter | None = None
        self._handles: list[Any] = []
        self.context: str | None = None

    def add(self, applied: AppliedLora) -> None:
        """Raises UserError where a file cannot be read or does not fit; then nothing has changed."""
        model: Any = self._model()
        loras = [*(one for one in self._loras if one._guide), applied]
        self._adapter = read_adapter(model, [one.file for one in loras])
        applied.missing, applied._guide = self._adapter.matches[-1].missing, self
        self._loras = loras
        if not self._handles:
            self._handles = [
                model.register_forward_pre_hook(self._before, with_kwargs=True),
                model.register_forward_hook(self._after, always_call=True),
            ]
            if hasattr(model, "cache_context"):
                model.cache_context = self._watched(model.cache_context)
            _guides[model] = self

    def drop(self, applied: AppliedLora) -> None:
        model = self._model()
        if model is not None and not any(one._guide for one in self._loras):
            for handle in self._handles:
                handle.remove()
            model.__dict__.pop("cache_context", None)
            del _guides[model]
            self._handles, self._loras, self._adapter = [], [], None

    def _watched(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """The model's `cache_context`, noting its name."""

        @contextmanager
        def cache_context(name: str, **kwargs: Any) -> Iterator[None]:
            before, self.context = self.context, name
            try:
                with original(name, **kwargs):
                    yield
            finally:
                self.context = before

        return cache_context

    def _before(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        pipe: Any = self._pipe()
        if pipe is None or self._adapter is None:
            return
        strengths = [one.strength if one._guide else Strength(0.0, 0.0) for one in self._loras]
        positive = ROWS[type(model).__name__](self, pipe, args, kwargs)
        self._adapter.switch_on(strengths, positive, _steps_done(pipe))

    def _after(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self._adapter is not None:
            self._adapter.switch_off()


def _qwen_rows(guide: PipelineGuide, pipe: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[bool]:
    """A call for each branch, in a cache context of that name."""
    x = args[0] if args else kwargs["hidden_states"]
    if guide.context not in ("cond", "uncond"):
        raise UserError(
            "The transformer was called outside of its pipeline, so a LoRA's branch is not known: remove the LoRA, or "
            "use i2l_ext.branch."
        )
    return [guide.context == "cond"] * len(x)


def _z_image_rows(guide: PipelineGuide, pipe: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[bool]:
    """One call: the pictures with the prompt, then the same with the negative prompt unless guidance is cut off."""
    x, t = args[0] if args else kwargs["x"], args[1] if len(args) > 1 else kwargs["t"]
    cut = getattr(pipe, "_cfg_truncation", None)
    is_cut = cut is not None and float(cut) <= 1 and float(t.max()) > cut
    guided = pipe.do_classifier_free_guidance and not is_cut
    return [not guided or row < len(x) // 2 for row in range(len(x))]


def _steps_done(pipe: Any) -> float:
    """The share of the pipeline's steps, 0 to 1, that are done."""
    scheduler = pipe.scheduler
    first = scheduler.begin_index or 0
    now = first if scheduler.step_index is None else scheduler.step_index
    return (now - first) / max(len(scheduler.timesteps) - first, 1)


ROWS: Mapping[str, Callable[[PipelineGuide, Any, tuple[Any, ...], dict[str, Any]], list[bool]]] = {
    "QwenImageTransformer2DModel": _qwen_rows,
    "ZImageTransformer2DModel": _z_image_rows,
}
"""Class of the transformer -> whether each row of its call is of the positive branch."""

_guides: weakref.WeakKeyDictionary[nn.Module, PipelineGuide] = weakref.WeakKeyDictionary()
