"""``<i2l:...>`` in the prompts of Forge Neo and SD.Next: the LoRAs act while they sample. Imported inside a WebUI only.

The order of calls in Forge Neo: tags are handed over (`BranchNetwork.activate`), then, before each pass of sampling,
what the pass uses is set (`BranchScript.process_before_every_sampling`). Errors in either would be swallowed, so they
become comments under the picture. In SD.Next the tags are handed over once the pipeline is chosen, and that is all
(`PipelineNetwork`).
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modules import extra_networks, scripts

from i2l_ext.converters.errors import UserError
from i2l_ext.library.names import grey_name
from i2l_ext.webui.prompt_tags import NETWORK, BranchTag, parse_tag

if TYPE_CHECKING:
    from i2l_ext.branch import Strength
    from i2l_ext.branch.pipelines import AppliedLora

INFOTEXT = "i2l LoRAs"
"""The infotext's line that says which files acted; the tags themselves stand in its prompt."""
TAGS = "i2l_tags"
"""The attribute of a generation that holds its tags, each as its parts."""


class BranchNetwork(extra_networks.ExtraNetwork):
    """Takes the tags from the prompt. ``applies_loras``: whether this WebUI runs models that these LoRAs are for."""

    def __init__(self, applies_loras: bool) -> None:
        super().__init__(NETWORK)
        self._applies_loras = applies_loras

    def activate(self, p: Any, params_list: list[Any], *args: Any, **kwargs: Any) -> None:
        """Called for each batch, and again for the hires pass and the refiner."""
        setattr(p, TAGS, [list(params.items) for params in params_list])
        if params_list and not self._applies_loras:
            _comment(p, f"<{NETWORK}:...> needs Forge Neo or SD.Next: this WebUI has no model that such a LoRA is for.")

    def deactivate(self, p: Any, *args: Any, **kwargs: Any) -> None:
        """Nothing: the next pass sets what it uses."""


class RunningPipeline:
    """SD.Next's pipeline of this moment: img2img and the hires pass have another around the same transformer."""

    def __getattr__(self, name: str) -> Any:
        from modules import shared

        return getattr(shared.sd_model, name)


class PipelineNetwork(BranchNetwork):
    """Takes the tags from the prompt and puts the LoRAs on SD.Next's pipeline, until a prompt asks for others. After an
    interrupt or an error they stay until the next picture."""

    def __init__(self) -> None:
        super().__init__(applies_loras=True)
        self._pipeline, self._model = RunningPipeline(), lambda: None
        self._applied: list[AppliedLora] = []

    def activate(self, p: Any, params_list: list[Any], *args: Any, **kwargs: Any) -> None:
        """Called for each batch, with the pipeline chosen."""
        from i2l_ext.branch.pipelines import apply_strength

        transformer, wanted = getattr(self._pipeline, "transformer", None), list(_wanted(p, params_list))
        if wanted != [(one.file, one.strength) for one in self._applied] or transformer is not self._model():
            for one in self._applied:
                one.remove()
            self._applied = []
            for file, strength in wanted:
                try:
                    self._applied.append(apply_strength(self._pipeline, file, strength))
                except UserError as error:
                    _comment(p, str(error))
                else:
                    _comment_missing(p, file, self._applied[-1].missing)
                    self._model = weakref.ref(transformer)
        if self._applied:
            p.extra_generation_params[INFOTEXT] = "; ".join(_described(one.file, one.strength) for one in self._applied)


def _wanted(p: Any, tags: list[Any]) -> Iterator[tuple[Path, Strength]]:
    """The files of the tags with their strengths. What is wrong with others becomes a comment."""
    for tag in tags:
        try:
            yield from tag_files(parse_tag(tag.items))
        except UserError as error:
            _comment(p, str(error))


class BranchScript(scripts.Script):
    """Sets the LoRAs of the tags for each pass of sampling. It has no controls."""

    def title(self) -> str:
        return "Image to LoRA on one branch"

    def show(self, is_img2img: bool) -> Any:
        return scripts.AlwaysVisible

    def after_extra_networks_activate(self, p: Any, *args: Any, **kwargs: Any) -> None:
        """The refiner changes the model in the middle of a pass, and activates again."""
        _set_pass(p)

    def process_before_every_sampling(self, p: Any, *args: Any, **kwargs: Any) -> None:
        _set_pass(p)

    def postprocess_batch(self, p: Any, *args: Any, **kwargs: Any) -> None:
        """Says where a LoRA acted in part only."""
        adapter = getattr(p, "i2l_adapter", None)
        if adapter is not None and (names := adapter.uncalled):
            _comment(
                p, f"{len(names)} layers are computed in one piece with others by this model ({names[0]}), so the LoRA "
                f"did not act there. Use a base model that is not fused or compiled, or <lora:...>."
            )  # fmt: skip


def _set_pass(p: Any) -> None:
    """What the next pass of sampling has: the LoRAs of the tags, or none."""
    objects = getattr(p.sd_model, "forge_objects", None)
    if objects is None:
        return
    from i2l_ext import branch

    model = objects.unet.model.diffusion_model
    p.i2l_adapter = None
    files, strengths = [], []
    for file, strength in _chosen(p, model, getattr(p, TAGS, [])):
        files.append(file)
        strengths.append(strength)
    if not files:
        branch.unfollow(model)
        branch.forget_adapter(model)
        return
    adapter = p.i2l_adapter = branch.adapter_of(model, files)
    branch.follow(model)
    unet = objects.unet.clone()
    unet.set_transformer_option(branch.OPTION, branch.GuidedLoras(adapter, tuple(strengths)))
    unet.add_extra_preserved_memory_during_sampling(adapter.nbytes)
    objects.unet = unet
    p.extra_generation_params[INFOTEXT] = "; ".join(map(_described, files, strengths))


def _chosen(p: Any, model: Any, tags: list[list[str]]) -> Iterator[tuple[Path, Strength]]:
    """The files of the tags that fit the model, with their strengths. What is wrong with others becomes a comment."""
    from i2l_ext import branch

    for items in tags:
        try:
            for file, strength in tag_files(parse_tag(items)):
                _comment_missing(p, file, branch.check_file(model, file).missing)
                yield file, strength
        except UserError as error:
            _comment(p, str(error))


def _comment_missing(p: Any, file: Path, missing: tuple[str, ...]) -> None:
    if missing:
        _comment(p, f"{file.stem}: {len(missing)} of its modules are not in this model.")


def tag_files(tag: BranchTag) -> list[tuple[Path, Strength]]:
    """The files that a tag stands for, with their strengths: the LoRA, and its grey one if the negative branch is to
    have that. Raises UserError where there is no LoRA of the name."""
    from i2l_ext.branch import Strength

    file = _network_file(tag.name)
    if file is None:
        raise UserError(f"<{NETWORK}:{tag.name}>: there is no LoRA of this name.")
    grey = None if tag.both or tag.negative == 0 else _network_file(grey_name(tag.name))
    if grey is None:
        return [(file, Strength(tag.positive, tag.negative or 0.0, tag.start, tag.stop))]
    weight = tag.positive if tag.negative is None else tag.negative
    return [
        (file, Strength(tag.positive, 0.0, tag.start, tag.stop)),
        (grey, Strength(0.0, weight, tag.start, tag.stop)),
    ]


def _network_file(name: str) -> Path | None:
    """The file that ``<lora:NAME:1>`` would name; a new one is looked for, as there."""
    networks: Any = sys.modules.get("networks") or sys.modules.get("modules.lora.lora_load")
    if networks is None:
        return None

    def find() -> Any:
        known = networks.available_network_aliases
        if name.lower() in networks.forbidden_network_aliases:
            known = networks.available_networks
        return known.get(name)

    entry = find()
    if entry is None:
        add = getattr(networks, "update_available_networks_by_names", None)
        add([name]) if add else networks.list_available_networks()
        entry = find()
    return None if entry is None else Path(entry.filename)


def _described(file: Path, strength: Strength) -> str:
    """For the infotext: the name, the weights, and the steps unless it is all of them."""
    parts = [f"{file.stem} {strength.positive:g} {strength.negative:g}"]
    if (strength.start, strength.stop) != (0, 1):
        parts.append(f"from {strength.start:g} to {strength.stop:g}")
    return " ".join(parts)


def _comment(p: Any, text: str) -> None:
    """A line under the picture, once however often it is said; on the console where the WebUI shows none."""
    line = f"Image to LoRA: {text}"
    if hasattr(p, "comment") and "modules.lora.lora_load" not in sys.modules:  # SD.Next keeps comments to itself
        p.comment(line)
    else:
        print(line, flush=True)
