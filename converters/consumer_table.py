"""What each program that takes LoRA files reads, and on what it fails: the data of `consumers`.

A rule names layers as a file spells them: prefix, suffix, names, parts. The first that fits a layer tells what becomes
of it; a layer that none fits is unknown to the program. Files of every spelling were put into the programs' own loaders
(`tests/recorded/loaders.json`); `tests/test_loaders.py` holds this table against what came of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

TRIED = "tried with its own loader"
READ = "read in its source"
NOT_TRIED = "not tried"

FAMILIES = QWEN, Z, FLUX2 = "qwen-image", "z-image", "flux2"
"""Of which something is known."""

OURS, NATIVE, DOTTED, ALIAS = "ours", "native", "dotted refiners", "alias"
"""Kinds of names: diffusers'; the model's first implementation's (Z-Image's qkv, out, final_layer); Z-Image's
``context.refiner`` for ``context_refiner``; any other by which the layer is known."""

A_B, A_B_DEFAULT, A_B_NAMED = r"\.lora_A\.weight", r"\.lora_A\.default\.weight", r"\.lora_A\.(?!default\.)[^.]+\.weight"
DOWN_UP, DOTTED_DOWN, BARE = r"\.lora_down\.weight", r"\.lora\.down\.weight", r"\.lora_A"
LINEAR, PROCESSOR = r"\.lora_linear_layer\.down\.weight", r"_lora\.down\.weight"
ANY_A_B = (A_B, A_B_DEFAULT, A_B_NAMED)
"""Suffixes of the down factor, as patterns: PEFT's, kohya's, and older ones of diffusers."""


@dataclass(frozen=True)
class Rule:
    """Which layers are meant; what is left empty is any.

    ``names``: kinds of names. ``modules``: a regular expression that the paths of all its modules fit. ``has``,
    ``lacks``: facts of a layer: "down", "up", "alpha", "other alpha" (not the rank), "negative alpha", "false header"
    (it tells other ranks than the file has). ``if_keys``, ``unless_keys``: patterns of which some key of the file fits
    one, or none.
    """

    prefixes: tuple[str, ...] = ()
    suffixes: tuple[str, ...] = ()
    names: tuple[str, ...] = ()
    families: tuple[str, ...] = ()
    modules: str = ""
    has: tuple[str, ...] = ()
    lacks: tuple[str, ...] = ()
    if_keys: tuple[str, ...] = ()
    unless_keys: tuple[str, ...] = ()


@dataclass(frozen=True)
class Reads(Rule):
    """These are read where both factors are there. ``alpha``: and their alpha."""

    names: tuple[str, ...] = (OURS,)
    alpha: bool = True


@dataclass(frozen=True)
class Fails(Rule):
    """One of these, and nothing of the file is loaded. ``because``: in words."""

    because: str = ""


@dataclass(frozen=True)
class Notes(Rule):
    """Not of what becomes of these, but of what does in other versions. ``words``: say it."""

    words: str = ""


@dataclass(frozen=True)
class OwnRules:
    """What a program does with a family that it reads in another way than the rest: its rules, the key format to
    convert to, and of when that is known. All were tried with the program's own loader."""

    rules: tuple[Rule, ...]
    wants: str
    date: str


@dataclass(frozen=True)
class Consumer:
    """A program that takes LoRA files, and its rules.

    ``source``: TRIED, READ or NOT_TRIED; ``version`` and ``date``: of what was tried or read. ``models``: families
    that it can run; ``untried``: those of which nobody here knows. ``rules``: the first Reads or Fails that fits a
    layer tells what becomes of it; ``own``: by family, those that stand in their place. ``uses``: by family, the id
    of the program whose loader it has. ``needs``: factors whose absence ends in an error. ``nothing_fails``:
    patterns; with such a key, a file of which it knows no name ends in an error. ``header``: it applies a scale that
    stands in the header. ``adds_twice``: a fused layer and its parts both count. ``wants``: the key format to convert
    to. ``alpha_fails``: why it misreads every alpha. ``lacks``: by family, a pattern of modules that it does not
    have. ``refuses_above``: share of unmatched tensors above which it loads nothing. ``one_rank``: groups of modules,
    as a pattern, that must have one rank (an empty pattern: all modules). ``trainer``: its name in `TRAINERS`, where
    `i2l export` repairs what conversion cannot. ``missing``: what to say of a family that it has not; ``not_tried``:
    of every file, where the source is NOT_TRIED.
    """

    id: str
    title: str
    source: str
    version: str = ""
    date: str = ""
    models: tuple[str, ...] = (QWEN, Z)
    untried: tuple[str, ...] = (FLUX2,)
    rules: tuple[Rule, ...] = ()
    own: Mapping[str, OwnRules] = field(default_factory=dict)
    uses: Mapping[str, str] = field(default_factory=dict)
    needs: tuple[str, ...] = ()
    nothing_fails: tuple[str, ...] = ()
    header: bool = False
    adds_twice: bool = False
    wants: str = "webui"
    alpha_fails: str | None = None
    lacks: Mapping[str, str] = field(default_factory=dict)
    refuses_above: float = 1.0
    one_rank: str | None = None
    trainer: str | None = None
    missing: str = "it has no such model; it only lists the file"
    not_tried: str = "nobody here has tried it"

    def for_family(self, family: str) -> Consumer:
        """The same, as it treats a family of models."""
        own = self.own.get(family)
        if own is None:
            return self
        return replace(
            self, source=TRIED, date=own.date, models=(*self.models, family), untried=(), rules=own.rules,
            wants=own.wants, nothing_fails=(),
        )  # fmt: skip


_COMFY = (A_B, A_B_DEFAULT, DOWN_UP, DOTTED_DOWN, BARE, LINEAR, PROCESSOR)


def _comfy(*flat: str) -> tuple[Reads, ...]:
    """What ComfyUI reads, and what has its loader inside. ``flat``: prefixes of the names with underscores."""
    return (
        Reads(("diffusion_model.", "transformer.", "", "lycoris_"), _COMFY),
        Reads(("diffusion_model.",), _COMFY, (NATIVE,), (Z,)),
        Reads(flat, _COMFY, (OURS,), (QWEN,)),
        Reads(flat, _COMFY, (NATIVE,), (Z,)),
    )


_CONVERTED = ("*.alpha", "lora_unet_*", "diffusion_model.*", "*default.*")
"""If a file has one such key, diffusers converts its names. Else it takes them for PEFT's."""
_STRANGE = "it refuses what it does not know in a file with alpha, lora_unet_ or diffusion_model. (ValueError)"
_NO_PEFT = "it takes this for the name of a layer (IndexError)"
_NO_DATA = "it makes layers without data: the first picture is noise, or an error"

_DIFFUSERS = (
    Fails(has=("negative alpha",), because="a negative alpha makes it hang"),
    Fails(
        ("diffusion_model.", "transformer."), has=("false header",),
        because="its header tells other ranks than the file has: a size mismatch",
    ),
    # as PEFT's names
    Reads(("transformer.",), (A_B, DOTTED_DOWN), unless_keys=_CONVERTED),
    Reads(("transformer.",), (PROCESSOR,), modules=r".*\.to_[qkv]", unless_keys=_CONVERTED),
    Fails(("transformer.", "_orig_mod.transformer."), (DOWN_UP, LINEAR), unless_keys=_CONVERTED, because=_NO_PEFT),
    Fails(("transformer.",), (BARE, A_B_NAMED), unless_keys=_CONVERTED, because=_NO_DATA),
    Fails(("_orig_mod.transformer.",), because=_NO_DATA),
    # converted
    Fails(families=(Z,), has=("alpha",), lacks=("down", "up"), because=_STRANGE),
    Reads(("diffusion_model.", ""), (A_B, A_B_DEFAULT, DOWN_UP), (OURS, DOTTED), if_keys=_CONVERTED),
    Reads(("diffusion_model.", ""), (DOTTED_DOWN,), (OURS, NATIVE, DOTTED), (Z,), if_keys=_CONVERTED),
    Reads(("diffusion_model.", ""), (DOWN_UP,), (NATIVE,), (Z,), modules=r".*\.to_out\.0", if_keys=_CONVERTED),
    Fails(
        (), (A_B, A_B_DEFAULT), (NATIVE,), (Z,), modules=r".*\.to_out\.0", has=("alpha",), unless_keys=("*to_out*",),
        because=_STRANGE,
    ),
    Reads(("lora_unet_",), (A_B, A_B_DEFAULT, DOWN_UP), (OURS,), (QWEN,)),
    Reads(("lora_unet_",), (DOWN_UP,), (OURS,), (Z,)),
    Reads(("lora_unet_",), (DOWN_UP,), (NATIVE,), (Z,), modules=r".*\.to_(q|k|v|out\.0)"),
    Fails(("lora_unet_",), (A_B,), families=(Z,), because=_STRANGE),
    Fails((), (A_B_NAMED, BARE, LINEAR, PROCESSOR), if_keys=_CONVERTED, because=_STRANGE),
    Fails((), (DOTTED_DOWN,), families=(QWEN,), if_keys=_CONVERTED, because=_STRANGE),
    Fails(("_orig_mod.",), if_keys=_CONVERTED, because=_NO_DATA),
    # other versions
    Notes(
        (), (A_B, A_B_DEFAULT), families=(QWEN,), has=("other alpha",),
        words="before version 0.42: alpha ignored",
    ),
    Notes(("lora_unet_",), (DOWN_UP,), families=(QWEN,), lacks=("alpha",), words="before version 0.42: a KeyError"),
)  # fmt: skip

_BLOCKS = r".*\.\d+\..*"
_SINGLES = r"(?!transformer_blocks\.|layers\.|context_refiner\.|noise_refiner\.).*"

_SD_CPP = ("diffusion_model.", "transformer.", "unet.", "model.diffusion_model.")
_SD_CPP_SUFFIXES = (A_B, A_B_DEFAULT, DOWN_UP, DOTTED_DOWN, BARE, PROCESSOR)

_INVOKE = ("*transformer_blocks?*", "*layers?*")
"""InvokeAI knows a file for a LoRA of the model by such a key."""
_NO_LORA = "it takes the file for no LoRA (ValueError)"


def _invoke(prefix: str, families: tuple[str, ...] = (), modules: str = "") -> tuple[Rule, ...]:
    limits: dict[str, Any] = {"families": families, "modules": modules, "if_keys": _INVOKE}
    return (
        Fails((prefix,), families=families, has=("alpha",), lacks=("down", "up"), because=_NO_LORA),
        Reads((prefix,), (DOWN_UP,), **limits),
        Reads((prefix,), ANY_A_B, alpha=False, **limits),
    )


def _klein(wants: str, *rules: Rule) -> Mapping[str, OwnRules]:
    return {FLUX2: OwnRules(rules, wants, "2026-11")}


_KLEIN_ALPHA = "it refuses alpha beside lora_A and lora_B (ValueError)"
_KLEIN_SCALE = "it plays such an alpha at another strength"

CONSUMERS: tuple[Consumer, ...] = (
    Consumer(
        "forge-neo", "Forge Neo", TRIED, "2.26", "2026-08",
        rules=_comfy("lora_unet_", "lora_unet__"), needs=("down",), adds_twice=True, refuses_above=0.5,
    ),
    Consumer(
        "comfyui", "ComfyUI", TRIED, "0.33", "2026-08",
        rules=(
            *_comfy("lora_unet_"),
            Notes(
                (), (A_B, DOWN_UP), (ALIAS,), (QWEN,), modules=r".*\.to_[qkv]",
                words="from version 0.38 on it reads attn.to_qkv too",
            ),
        ),
        needs=("down",), adds_twice=True,
        own=_klein(
            "webui-fused",
            Reads(("transformer.", ""), _COMFY),
            Reads(("diffusion_model.", "lora_unet_"), _COMFY, (NATIVE,)),
        ),
    ),
    Consumer("forge", "Forge (lllyasviel)", TRIED, models=(), untried=()),
    Consumer("a1111", "AUTOMATIC1111", TRIED, "1.10.1", models=(), untried=()),
    Consumer(
        "diffusers", "diffusers", TRIED, "0.42.1", "2026-11",
        rules=_DIFFUSERS, needs=("down", "up"), nothing_fails=(*_CONVERTED, "transformer.*"), header=True,
        wants="diffusers",
        own=_klein(
            "diffusers",
            Fails((), (A_B, A_B_DEFAULT), has=("alpha",), because=_KLEIN_ALPHA),
            Reads(("diffusion_model.", "transformer.", "base_model.model."), (A_B,)),
            Reads(("transformer.",), (DOTTED_DOWN,)),
            Reads(("diffusion_model.",), (A_B,), (NATIVE,)),
            Reads(("lora_unet_",), (DOWN_UP,), (NATIVE,)),
        ),
    ),
    Consumer(
        "diffsynth", "DiffSynth-Studio", TRIED, "2.1.12", "2026-11",
        rules=(
            Fails((), (*ANY_A_B, DOWN_UP), has=("up",), lacks=("down",), because="a factor is missing (KeyError)"),
            Reads(("diffusion_model.", ""), (A_B, A_B_DEFAULT, DOWN_UP)),
            Reads(("diffusion_model.", ""), (A_B_NAMED,), alpha=False),
            Fails(("diffusion_model.", ""), (BARE,), because="a KeyError"),
        ),
        trainer="diffsynth",
        own=_klein("webui", Reads(("diffusion_model.", ""), (A_B, A_B_DEFAULT))),
    ),
    Consumer(
        "musubi-tuner", "musubi-tuner", TRIED, "30c658c", "2026-06",
        rules=(Reads(("lora_unet_",), (DOWN_UP,), alpha=False),),
        lacks={QWEN: _SINGLES, Z: _SINGLES + r"|.*_refiner\..*|.*adaLN_modulation.*"},
        wants="kohya", one_rank="", trainer="musubi-tuner",
        own=_klein("kohya-fused", Reads(("lora_unet_",), (DOWN_UP,), (NATIVE,), alpha=False)),
    ),
    Consumer(
        "ai-toolkit", "ai-toolkit", TRIED, "27a03a9", "2026-08",
        rules=(Reads(("diffusion_model.", "transformer."), (A_B, DOWN_UP), alpha=False),),
        lacks={QWEN: _SINGLES, Z: r"(?!layers\.).*"}, trainer="ai-toolkit",
        own=_klein("webui-fused", Reads(("diffusion_model.",), (A_B,), (NATIVE,), alpha=False)),
    ),
    Consumer(
        "flymyai", "flymyai-lora-trainer", READ, models=(QWEN,), untried=(), trainer="flymyai",
        missing="it trains no such model",
    ),
    Consumer(
        "nunchaku", "Nunchaku", READ, models=(QWEN,), untried=(Z, FLUX2),
        rules=(Reads(("diffusion_model.", "transformer.", ""), (A_B, A_B_DEFAULT)),),
        alpha_fails="alpha is divided by the rank of its fused layer", one_rank=r"attn\.(to|add)_[qkv]",
    ),
    Consumer(
        "sdnext", "SD.Next", TRIED, "058a7f0", "2026-07",
        uses={QWEN: "diffusers"},
        rules=(
            Reads(("diffusion_model.", "lora_unet_"), (*ANY_A_B, DOWN_UP), (OURS, NATIVE, DOTTED)),
            Reads(
                ("transformer.", "lycoris_", "lora_transformer_", "base_model.model."), (*ANY_A_B, DOWN_UP)
            ),
            Reads(("",), (*ANY_A_B, DOWN_UP), modules=_BLOCKS),
        ),
    ),
    Consumer(
        "invokeai", "InvokeAI", TRIED, "8e71a8a", "2026-08",
        rules=(
            *_invoke("transformer."),
            *_invoke("", families=(QWEN,)),
            *_invoke("diffusion_model.", families=(Z,)),
            *_invoke("lora_unet__", families=(Z,), modules=r".*\.(to_[qkv]|w\d)"),
            Reads(("lora_unet_",), (DOWN_UP,), families=(QWEN,), if_keys=_INVOKE),
            Fails(("lora_unet_",), ANY_A_B, families=(QWEN,), because=_NO_LORA),
        ),
        needs=("down", "up"), wants="diffusers",
    ),
    Consumer(
        "musubi-tuner-lora-weight", "musubi-tuner --lora_weight", TRIED, "30c658c", "2026-06",
        rules=(Reads(("lora_unet_",), (DOWN_UP,)),), wants="kohya",
        own=_klein("kohya-fused", Reads(("lora_unet_",), (DOWN_UP,), (NATIVE,))),
    ),
    Consumer(
        "sd-cpp", "stable-diffusion.cpp", READ, "97d2990", "2026-08",
        rules=(
            Reads(_SD_CPP, _SD_CPP_SUFFIXES),
            Reads(_SD_CPP, _SD_CPP_SUFFIXES, (NATIVE,), (Z,)),
            Reads(("", "lycoris_"), _SD_CPP_SUFFIXES, families=(QWEN,), modules=_BLOCKS),
            Reads(("lora_unet_",), _SD_CPP_SUFFIXES, families=(QWEN,), modules=_BLOCKS + "|proj_out"),
            Reads(("lora_unet_",), _SD_CPP_SUFFIXES, (OURS, NATIVE), (Z,), modules=r"layers\.\d+\.attention\..*"),
        ),
    ),
    Consumer(
        "simpletuner", "SimpleTuner", READ, "bc8e6ab", "2026-08",
        rules=(Reads(("transformer.",), (A_B,)),),
        lacks=dict.fromkeys((QWEN, Z), r"(?!.*\.to_(q|k|v|out\.0)$).*"), wants="diffusers",
        own=_klein(
            "diffusers",
            Fails(("transformer.",), (A_B,), has=("other alpha",), because=_KLEIN_SCALE),
            Reads(("transformer.",), (A_B,)),
        ),
    ),
    Consumer(
        "onetrainer", "OneTrainer", NOT_TRIED, models=(QWEN, Z, FLUX2), untried=(),
        not_tried="tried only with the start folder that is written for it",
    ),
)  # fmt: skip
