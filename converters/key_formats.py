"""Key formats: how each program names the factors of a LoRA.

A key is PREFIX + MODULE + SUFFIX. Prefixes and suffixes are tables; the modules are those of an architecture, with
dots or with underscores. `keys.py` reads every combination; the key formats in `KEY_FORMATS` are also written.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class KeyFormat:
    """One way to write the keys of a LoRA.

    ``down``, ``up``, ``alpha``: suffixes. ``dotted``: the module's name keeps its dots. ``native``: it is the name in
    the model's first implementation (`Architecture.native`). Who reads which: `consumer_table`.
    """

    name: str
    prefix: str
    down: str
    up: str
    alpha: str | None = None
    dotted: bool = True
    native: bool = False

    def keys(self, path: str) -> tuple[str, str, str | None]:
        """The keys of a module's down factor, up factor and alpha (None if the key format has none)."""
        stem = self.prefix + (path if self.dotted else path.replace(".", "_"))
        return stem + self.down, stem + self.up, stem + self.alpha if self.alpha else None


_PEFT = (".lora_A.weight", ".lora_B.weight")
_KOHYA = (".lora_down.weight", ".lora_up.weight", ".alpha")

KEY_FORMATS: dict[str, KeyFormat] = {
    key_format.name: key_format
    for key_format in (
        KeyFormat("webui", "diffusion_model.", *_PEFT),
        KeyFormat("kohya", "lora_unet_", *_KOHYA, dotted=False),
        KeyFormat("diffusers", "transformer.", *_PEFT),
        KeyFormat("diffsynth", "", ".lora_A.default.weight", ".lora_B.default.weight"),
        KeyFormat("webui-fused", "diffusion_model.", *_PEFT, native=True),
        KeyFormat("kohya-fused", "lora_unet_", *_KOHYA, dotted=False, native=True),
    )
}
"""By name, those that are written. The two ``-fused`` differ from those without it for Z-Image, FLUX.1 and FLUX.2 only,
whose q, k and v they write as one layer. Which is written unless another is asked for: `Architecture.key_format`."""
VARIANTS: tuple[KeyFormat, ...] = (
    KeyFormat("flymyai", "transformer.", ".lora.down.weight", ".lora.up.weight"),
    KeyFormat("bare", "", *_PEFT),
    KeyFormat("peft", "base_model.model.", *_PEFT),
    KeyFormat("lycoris", "lycoris_", *_KOHYA, dotted=False),
    KeyFormat("videox-fun", "lora_unet__", *_KOHYA, dotted=False),
)
"""Those that are read only but have a name. Any other combination of prefix and suffix is called "other"."""

PREFIXES = (
    "base_model.model.",
    "model.",
    "diffusion_model.",
    "transformer.",
    "pipe.dit.",
    "dit.",
    "unet.",
    "lora_unet__",
    "lora_unet_",
    "lora_transformer_",
    "lycoris_",
    "",
)
"""What may precede the module's name, also one after another. If one begins with another, the longer comes first."""

WRAPPER = r"_orig_mod[._]"
"""Pattern of what torch.compile puts into names, at any place."""

FACTOR_PAIRS = {
    ".lora_A": ".lora_B",
    ".lora_down": ".lora_up",
    ".lora.down": ".lora.up",
    "_lora.down": "_lora.up",
    ".lora_linear_layer.down": ".lora_linear_layer.up",
}
"""What may follow the module's name in the key of a down factor -> in that of its up factor. Both may also end in
``.weight``, with an adapter's name before it."""

SUFFIXES = dict.fromkeys(FACTOR_PAIRS, "down") | dict.fromkeys(FACTOR_PAIRS.values(), "up") | {".alpha": "alpha"}
"""What may follow the module's name -> which of its tensors that is."""


def ends_with(suffixes: Iterable[str]) -> re.Pattern[str]:
    """A pattern of the end of a key: one of the suffixes, group 1, and an adapter's name and ``.weight``, group 2."""
    return re.compile(rf"({'|'.join(map(re.escape, suffixes))})((?:\.[^.]+)?\.weight)?\Z")


UNSUPPORTED = {
    r"\.lora_mid": "a convolution's LoRA (lora_mid)",
    r"\.b?oft_": "OFT",
    r"\.[ab][12]\.weight$": "GLoRA",
    r"\.ia3_": "IA3",
    r"\.lora_[AB]\.([^.]+\.)?bias$": "LoRA biases",
    r"\.(weight_scale|scale_weight|scaled_fp8|lora_(A|B|up|down)\.scale)": "scaled fp8",
}
"""Pattern of a key -> the kind of network that it belongs to, which is not read (those that are: `networks.py`). The
error names it; such keys are never dropped."""

OTHER_MODELS = {
    r"img_mlp[._](proj|out|gate_layer)[._]": "Qwen-Image 2.x",
    r"(img|txt)_mlp[._]fc[12]|token_refiner|refiner_blocks": "HunyuanVideo",
    r"single_transformer_blocks|(single|double)_blocks": "FLUX or HunyuanVideo",
    r"joint_blocks": "Stable Diffusion 3",
    r"(down|up|input|output)_blocks|mid_block|middle_block": "Stable Diffusion",
    r"(^|[._])blocks[._]\d+[._](self_attn|cross_attn|ffn)": "Wan",
}
"""Pattern of a key -> the model that it belongs to, unless the architecture has layers of such names itself. FLUX and
HunyuanVideo share names and even shapes with each other and with Qwen-Image."""

TEXT_ENCODER = ("lora_te", "text_encoder", "te_", "lora_llm", "conditioner.", "text_model.")
