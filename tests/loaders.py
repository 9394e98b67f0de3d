"""What loaders of LoRA files do with each spelling (`spellings`): those of a package registry, run as they are, and
what was recorded of others (`recorded/loaders.json`).

`LOADERS` maps a name to a function that puts a file into a model with the loader's own code and says, by module path,
which update the model then has. `outcome` puts that beside what the file means.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import re
import signal
import tempfile
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path

import torch

from peers import diffsynth
from spellings import QWEN, Spelling, Z

RECORDED = Path(__file__).parent / "recorded" / "loaders.json"
Updates = Mapping[str, torch.Tensor]


def outcome(spelling: Spelling, load: Callable[[Spelling], Updates]) -> str:
    """What a loader does with a file, in words that can be compared: ``nothing``; ``hangs``; ``error TYPE: first line``
    (keys as KEY); ``whole`` or ``part without KIND KIND``.

    Then, where an update is not the true one: ``, x0.5`` (times what it should be, in all modules) or ``, x0.5 KIND
    KIND, x0.25 KIND`` (in these); ``wrong`` where it is no multiple of it; ``empty`` where the layer is there but a
    factor has no data, so that the first picture ends in noise or an error.
    """
    _warm(load)
    try:
        with _quiet(), _limit(1):
            found = load(spelling)
    except TimeoutError:
        return "hangs"
    except Exception as error:  # noqa: BLE001 what a loader raises is what we want to know
        first = " ".join(str(error).strip().splitlines()[:1])
        first = re.sub(r"'[^' ]+\.[^' ]+'", "KEY", first)
        first = re.sub(r"[{\[(].*", "", first)  # what is listed there has no order
        return f"error {type(error).__name__}: {first[:60]}".strip(" :")
    return judge(spelling, found)


@cache
def _warm(load: Callable[[Spelling], Updates]) -> None:
    """Imports are done before the clock runs."""
    with _quiet():
        for family in (QWEN, Z):
            load(Spelling(family, "diffusion_model.", "A/B"))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


@contextlib.contextmanager
def _limit(seconds: float) -> Iterator[None]:
    """TimeoutError after so much processor time. (Only where the system has such a clock; Windows has none.)"""
    if not hasattr(signal, "setitimer"):
        yield
        return

    def stop(*_: object) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def judge(spelling: Spelling, found: Updates) -> str:
    """The same, of updates that are at hand."""
    true = spelling.updates()
    ratios = {path: _ratio(found.get(path), update) for path, update in true.items()}
    for path in found.keys() - true.keys():
        if found[path].is_meta or found[path].any():
            ratios[path] = "empty" if found[path].is_meta else "wrong"
    loaded = [path for path, ratio in ratios.items() if ratio != "x0"]
    if not loaded:
        return "nothing"
    lacking = [path for path in true if ratios[path] == "x0"]
    words = f"part without {_named(lacking, true)}" if lacking else "whole"
    by_ratio: dict[str, list[str]] = defaultdict(list)
    for path in loaded:
        by_ratio[ratios[path]].append(path)
    if len(by_ratio) == 1:
        return words if loaded[0] in by_ratio["x1"] else f"{words}, {ratios[loaded[0]]}"
    told = (f"{ratio} {_named(paths, true)}" for ratio, paths in sorted(by_ratio.items()) if ratio != "x1")
    return ", ".join([words, *told])


def _ratio(found: torch.Tensor | None, true: torch.Tensor) -> str:
    if found is None:
        return "x0"
    if found.is_meta:
        return "empty"
    if not found.any():
        return "x0"
    found, true = found.double(), true.double()
    ratio = float((found * true).sum() / (true * true).sum())
    close = (found - ratio * true).norm() <= 1e-4 * found.norm()
    return f"x{round(ratio, 4):g}" if close else "wrong"


def _named(paths: Iterable[str], of: Iterable[str]) -> str:
    """These modules of those in a file: the kinds of which all are among them, then the blocks, then what is left."""
    left, words, block = set(paths), [], r"(\w+\.\d+)\.(.+)"
    for part in (2, 1):
        groups = defaultdict(set)
        for path in of:
            if found := re.fullmatch(block, path):
                groups[found[part]].add(path)
        for name, group in groups.items():
            if group <= left:
                words.append(name)
                left -= group
    return " ".join([*words, *sorted(left)])


@cache
def _base(family: str) -> torch.nn.Module:
    """diffusers' own class at small widths."""
    from diffusers import QwenImageTransformer2DModel, ZImageTransformer2DModel

    rope = (4, 6, 6)
    if family == QWEN:
        sizes = {"attention_head_dim": 16, "num_attention_heads": 1, "joint_attention_dim": 8, "axes_dims_rope": rope}
        return QwenImageTransformer2DModel(in_channels=4, out_channels=1, num_layers=2, **sizes)
    sizes = {"dim": 16, "n_heads": 1, "n_kv_heads": 1, "cap_feat_dim": 8, "axes_dims": list(rope)}
    return ZImageTransformer2DModel(in_channels=2, n_layers=2, n_refiner_layers=1, **sizes)


def _fresh(base: torch.nn.Module) -> torch.nn.Module:
    """The same module tree for one use: its modules may be exchanged, its parameters are shared. (A deep copy takes
    most of the time of a trial.)"""
    copied = base._replicate_for_data_parallel()
    copied.__dict__.pop("_is_replica", None)
    copied._parameters = base._parameters.copy()
    for name, child in base._modules.items():
        copied._modules[name] = _fresh(child)
    return copied


def _injected(base: torch.nn.Module, adapter: str) -> Updates:
    """The updates that PEFT's layers in a model make."""
    found = {}
    for path, layer in base.named_modules():
        if adapter in getattr(layer, "lora_A", {}):
            down, up = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
            if down.is_meta or up.is_meta:  # torch multiplies them with others all the same, and the result is noise
                down, up = down.to("meta"), up.to("meta")
            found[path.removeprefix("base_model.model.")] = (layer.scaling[adapter] * up @ down).detach()
    return found


def by_diffusers(spelling: Spelling) -> Updates:
    """``load_lora_weights`` of the pipeline's class, which takes only the transformer from its pipeline."""
    from diffusers.loaders.lora_pipeline import QwenImageLoraLoaderMixin, ZImageLoraLoaderMixin

    logging.getLogger("diffusers").setLevel(logging.CRITICAL)
    mixin = QwenImageLoraLoaderMixin if spelling.family == QWEN else ZImageLoraLoaderMixin
    pipeline = type("Pipeline", (mixin,), {"hf_device_map": None, "components": {}})()
    pipeline.transformer = _fresh(_base(spelling.family))
    with tempfile.TemporaryDirectory() as folder:
        spelling.save(Path(folder, "lora.safetensors"))
        pipeline.load_lora_weights(folder, weight_name="lora.safetensors", adapter_name="x")
    return _injected(pipeline.transformer, "x")


def by_peft(spelling: Spelling) -> Updates:
    """``PeftModel.from_pretrained`` of a folder: the file beside an ``adapter_config.json`` that names our modules and
    says what the header says."""
    from peft import PeftModel

    with tempfile.TemporaryDirectory() as folder:
        spelling.save(Path(folder, "adapter_model.safetensors"))
        config = {"peft_type": "LORA", "target_modules": spelling.targets(), **spelling.config()}
        Path(folder, "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
        base = PeftModel.from_pretrained(_fresh(_base(spelling.family)), folder)
    return _injected(base, "default")


def by_diffsynth(spelling: Spelling) -> Updates:
    """``GeneralLoRALoader.fuse_lora_to_base_model``, which adds updates to the layers of the same names. (DiffSynth's
    classes have fixed widths and want einops; the names of their layers are diffusers'.)"""
    base = _fresh(_base(spelling.family))
    linear = {path: layer for path, layer in base.named_modules() if isinstance(layer, torch.nn.Linear)}
    for layer in linear.values():
        layer.weight = torch.nn.Parameter(torch.zeros_like(layer.weight), requires_grad=False)
    diffsynth("utils.lora.general").GeneralLoRALoader().fuse_lora_to_base_model(base, spelling.tensors())
    return {path: layer.weight.detach() for path, layer in linear.items()}


LOADERS: dict[str, Callable[[Spelling], Updates]] = {
    "diffusers": by_diffusers,
    "peft": by_peft,
    "diffsynth": by_diffsynth,
}
"""The loaders that a package registry has."""


@cache
def recorded() -> dict:
    return json.loads(RECORDED.read_text(encoding="utf-8"))


@cache
def recorded_outcomes(loader: str) -> dict[str, str]:
    """What was recorded of a loader, by the id of the spelling."""
    place = list(recorded()["loaders"]).index(loader)
    words = recorded()["outcomes"]
    return {id: words[row[place]] for id, row in recorded()["rows"].items()}


def by_rules(rules: Iterable[Mapping], spelling: Spelling) -> str:
    """The outcome by a loader's rules: that of the first of which every condition holds."""
    return next(
        rule["then"]
        for rule in rules
        if all(getattr(spelling, part) in values for part, values in rule["when"].items())
    )


def lacking(spelling: Spelling, outcome: str) -> set[str]:
    """The modules that take no effect: all where it is nothing, an error or layers without data."""
    paths = set(spelling.updates())
    words = outcome.split(", ")
    if not words[0].startswith(("whole", "part")) or words[-1].startswith("empty"):
        return paths
    if words[0] == "whole":
        return set()
    names = words[0].removeprefix("part without ").split()
    return {p for p in paths for name in names if p == name or p.endswith(f".{name}") or p.startswith(f"{name}.")}


def agrees(spelling: Spelling, outcome: str, status: str, loads: int) -> bool:
    """Whether a verdict of `converters.consumers.check` (its status, and how many modules load) tells an outcome."""
    without = lacking(spelling, outcome)
    count = len(spelling.updates())
    if len(without) == count:
        return status == "refused" or (status == "nothing" and outcome == "nothing")
    scaled = any(word.startswith(("x", "wrong")) for word in outcome.split(", ")[1:])
    if without:
        return status == "part" and loads == count - len(without)
    # in a few modules only: those that a fused layer holds once more
    twice = spelling.names == "both" and " " in outcome.removeprefix("whole, ")
    return status == ("wrong strength" if twice else "ignores alpha" if scaled else "all") and loads == count
