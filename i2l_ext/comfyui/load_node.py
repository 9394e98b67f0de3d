"""The node that puts a LoRA on a model: on both branches of guidance, or on the one it belongs to.

On both it is ComfyUI's own patching of weights, as by LoraLoaderModelOnly. On one branch nothing is patched: the LoRA's
term is added to the layers' outputs on the rows of that branch (i2l_ext.branch). ComfyUI's own hooks on a conditioning
patch all weights anew for each branch in each step, and predict the branches one after the other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from i2l_ext.comfyui import widgets
from i2l_ext.comfyui.host import load_as_comfyui_does, lora_path, patch_weights

if TYPE_CHECKING:
    from i2l_ext.branch import Strength

BOTH, POSITIVE, GREY = "both", "positive only", "positive, grey on the negative"
APPLY, KEY = "apply_model", "i2l"
"""ComfyUI's name for a call of the model that can be wrapped, and ours for the wrapper."""


class LoadI2LLora:
    """A model with a LoRA."""

    DESCRIPTION = (
        "Puts a LoRA on a model. Both: as LoraLoaderModelOnly, whatever keys the file has. Positive only: the negative "
        "branch is predicted without it, as the authors run Z-Image's; no weights are patched."
    )
    CATEGORY = "Image to LoRA"
    FUNCTION = "load"
    RETURN_TYPES = ("MODEL",)
    RETURN_NAMES = ("model",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "model": ("MODEL", {"tooltip": "the diffusion model"}),
                "lora_name": widgets.lora("the LoRA"),
                "strength": widgets.strength(),
                "branch": widgets.choice((BOTH, POSITIVE, GREY), "the predictions on which it acts"),
            },
            "optional": {
                "grey_lora": widgets.lora("a LoRA made from a grey picture, for the negative branch", optional=True)
            },
        }

    @classmethod
    def VALIDATE_INPUTS(cls, branch: str | None = None, grey_lora: str | None = widgets.NONE) -> bool | str:
        """A grey LoRA that is wanted and not chosen is told before anything is computed. None stands for a link."""
        return widgets.refusal(lambda: check_grey(branch, grey_lora)) or True

    @classmethod
    def IS_CHANGED(cls, lora_name: str | None = None, grey_lora: str | None = None, **_: Any) -> str:
        """Another file under the same name is another LoRA."""
        return f"{file_time(lora_name)} {file_time(grey_lora)}"

    def load(
        self, model: Any, lora_name: str, strength: float, branch: str, grey_lora: str = widgets.NONE
    ) -> tuple[Any]:
        """Raises UserError where a file is no LoRA of this model."""
        path = lora_path(lora_name)
        if strength == 0:
            return (model,)
        if branch == BOTH:
            return (on_both(model, lora_name, path, strength),)
        from i2l_ext.branch import Strength

        check_grey(branch, grey_lora)
        loras = [(path, Strength(positive=strength))]
        if branch == GREY:
            loras.append((lora_path(grey_lora), Strength(positive=0.0, negative=strength)))
        return (on_branches(model, loras),)


def check_grey(branch: str | None, grey_lora: str | None) -> None:
    """Raises UserError for a branch that there is not, a LoRA that there is not, and a grey one that is not chosen."""
    from i2l_ext.converters.errors import UserError

    if branch not in (BOTH, POSITIVE, GREY, None):
        raise UserError(f"branch is one of {BOTH}; {POSITIVE}; {GREY}, not {branch!r}.", "unknown_choice")
    if branch == GREY and grey_lora == widgets.NONE:
        raise UserError("Choose the grey_lora: a LoRA that was made from a grey picture.")
    if grey_lora not in (widgets.NONE, None):
        lora_path(grey_lora)


def file_time(name: str | None) -> str:
    """When the file of a LoRA was last written; "" where there is none."""
    from i2l_ext.converters.errors import UserError

    with suppress(UserError, OSError):
        return str(lora_path(name).stat().st_mtime_ns) if name and name != widgets.NONE else ""
    return ""


def on_both(model: Any, name: str, path: Path, strength: float) -> Any:
    """A copy of ``model``, a ModelPatcher, with the LoRA patched into its weights.

    A file that ComfyUI does not read wholly, or at another scale, is given to it in keys that it does. Raises UserError
    where the LoRA is another model's.
    """
    from i2l_ext.branch import match_lora
    from i2l_ext.converters import Lora, consumers
    from i2l_ext.converters.errors import UserError

    try:
        _, verdicts = consumers.check(path)
        status = next(one.status for one in verdicts if one.consumer.id == "comfyui")
    except UserError:  # a LoRA of a model that we do not know, which ComfyUI may
        status = "untried"
    if status == "untried":
        return load_as_comfyui_does(model, name, strength)
    lora = Lora.read(path)
    with closing(lora.read_from.file):
        match_lora(model.model.diffusion_model, lora, path.name)
        if status == "all" and not scales_apart(lora):
            return load_as_comfyui_does(model, name, strength)
        return patch_weights(model, plain_tensors(lora), strength)


def scales_apart(lora: Any) -> bool:
    """Whether a Lora's file has a scale that does not stand in an alpha beside the factors: ComfyUI reads no other."""
    source = lora.read_from
    return any(scale != 1 and not source.reading.slots[path].alpha for path, scale in source.scales.items())


def plain_tensors(lora: Any) -> dict[str, Any]:
    """The factors of a Lora under keys that ComfyUI reads wholly: {key: tensor}, alpha multiplied in."""
    from i2l_ext.converters.key_formats import KEY_FORMATS

    key_format = KEY_FORMATS[lora.arch.key_format]
    tensors: dict[str, Any] = {}
    for path in lora:
        down, up, _ = key_format.keys(path)
        tensors[down], tensors[up] = lora[path]
    return tensors


def on_branches(model: Any, loras: list[tuple[Path, Strength]]) -> Any:
    """A copy of ``model``, a ModelPatcher, with LoRAs beside its layers, each on the branches of its Strength; those
    that it has already stay. Raises UserError where one does not fit the model."""
    from i2l_ext.branch import adapter_of

    copy = model.clone()
    before = copy.get_wrappers(APPLY, KEY)
    all_loras = (*(one for wrapper in before for one in wrapper.loras), *loras)
    adapter_of(copy.model.diffusion_model, [path for path, _ in all_loras])  # refuses what does not fit before sampling
    copy.remove_wrappers_with_key(APPLY, KEY)
    copy.add_wrapper_with_key(APPLY, KEY, BranchWrapper(all_loras))
    return copy


@dataclass(frozen=True)
class BranchWrapper:
    """Around each prediction: the LoRAs are switched on for the rows of their branches, and off again."""

    loras: tuple[tuple[Path, Strength], ...]

    def __call__(self, predict: Callable[..., Any], x: Any, *args: Any, **kwargs: Any) -> Any:
        """``predict``: ComfyUI's executor, whose ``class_obj`` is the model. ``x``: [B, ...]."""
        from i2l_ext.branch import adapter_of
        from i2l_ext.branch.guidance import positive_rows

        options = next(one for one in (*args, *kwargs.values()) if isinstance(one, dict) and "cond_or_uncond" in one)
        adapter = adapter_of(predict.class_obj.diffusion_model, [path for path, _ in self.loras])  # type: ignore[attr-defined]
        strengths = [strength for _, strength in self.loras]
        rows = positive_rows(len(x), options["cond_or_uncond"], len(options["sigmas"]))
        with adapter.active(strengths, rows):
            return predict(x, *args, **kwargs)


NODES: Mapping[str, tuple[type, str]] = {"I2LLoad": (LoadI2LLora, "Load i2L LoRA")}
"""ComfyUI's name -> the class, and its title."""
