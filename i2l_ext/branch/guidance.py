"""Following a host that says in each call of its model which rows are of which branch: Forge Neo and ComfyUI do, in the
argument ``transformer_options``."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from i2l_ext.converters.errors import UserError

from .adapter import BranchAdapter
from .rows import Strength

if TYPE_CHECKING:
    from torch import nn
    from torch.utils.hooks import RemovableHandle

OPTION = "i2l_branch"
"""The key of ``transformer_options`` under which a call carries `GuidedLoras`."""
POSITIVE = 0
"""The positive branch in the host's ``cond_or_uncond``."""
SCHEDULES = ("sampling_sigmas", "sample_sigmas")
"""Forge Neo's and ComfyUI's name of the noise levels at which steps begin, with the last step's end."""


@dataclass
class GuidedLoras:
    """An adapter and its strengths, for one pass of sampling. ``first``: the noise level at which the pass began."""

    adapter: BranchAdapter
    strengths: tuple[Strength, ...]
    first: float | None = None

    def switch_on(self, rows: int, options: Mapping[str, Any]) -> None:
        """Switch the adapter on for a batch of so many ``rows``, as the host's options say.

        Raises UserError where a LoRA is to act on some steps only and the sampler does not tell its steps.
        """
        sigmas = options["sigmas"]
        sigma = float(sigmas.max())
        self.first = sigma if self.first is None else self.first
        schedule = next((options[key].tolist() for key in SCHEDULES if key in options), None)
        if schedule is None and any((one.start, one.stop) != (0, 1) for one in self.strengths):
            raise UserError(
                "This sampler does not tell its steps, so a LoRA cannot act on some only: leave out from, to."
            )
        progress = 0.0 if schedule is None else steps_done(sigma, self.first, schedule)
        self.adapter.switch_on(self.strengths, positive_rows(rows, options["cond_or_uncond"], len(sigmas)), progress)


def positive_rows(rows: int, cond_or_uncond: Sequence[int], pictures: int) -> list[bool]:
    """For each of the ``rows`` of a batch whether it is of the positive branch.

    ``cond_or_uncond``: the branch of each chunk of ``pictures`` rows, 0 for positive. A host that cuts pictures into
    tiles repeats the whole sequence for each tile.
    """
    period = pictures * len(cond_or_uncond)
    return [cond_or_uncond[row % period // pictures] == POSITIVE for row in range(rows)]


def steps_done(sigma: float, first: float, schedule: Sequence[float]) -> float:
    """The share of a pass's steps, 0 to 1, that are done at the noise level ``sigma``. The pass begins at ``first``;
    ``schedule``: falling noise levels at which steps begin, and the last one's end, perhaps from a higher level on.

    Between two levels, where some samplers look too, the step is not done.
    """
    ends = [level for level in schedule if level < first * (1 - 1e-4)]
    done = sum(level >= sigma * (1 - 1e-4) for level in ends[:-1])
    return done / max(len(ends), 1)


def follow(model: nn.Module) -> None:
    """From now on each call of ``model`` that carries `GuidedLoras` has their terms, and its layers none afterwards,
    also after an error. Other calls are as before. A model that is followed already stays so."""
    if model not in _followed:
        _followed[model] = (
            model.register_forward_pre_hook(_before, with_kwargs=True),
            model.register_forward_hook(_after, with_kwargs=True, always_call=True),
        )


def unfollow(model: nn.Module) -> None:
    """The model is as it was before `follow`."""
    for handle in _followed.pop(model, ()):
        handle.remove()


_followed: weakref.WeakKeyDictionary[nn.Module, tuple[RemovableHandle, ...]] = weakref.WeakKeyDictionary()


def _carried(kwargs: Mapping[str, Any]) -> GuidedLoras | None:
    return (kwargs.get("transformer_options") or {}).get(OPTION)


def _before(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if guided := _carried(kwargs):
        guided.switch_on(len(args[0] if args else kwargs["x"]), kwargs["transformer_options"])


def _after(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
    if guided := _carried(kwargs):
        guided.adapter.switch_off()
