"""How to generate with a LoRA of i2L: the settings of the authors' own examples. Every place that advises reads them
here."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

Z_NEGATIVE = (
    "泛黄，发绿，模糊，低分辨率，低质量图像，扭曲的肢体，诡异的外观，"
    "丑陋，AI感，噪点，网格感，JPEG压缩条纹，异常的肢体，水印，乱码，意义不明的字符"
)
"""Yellowed, greenish, blurred, of low resolution and quality, distorted limbs, ugly, noise, grids, watermarks, garbled
letters: what the base models of Alibaba are asked to avoid, in the language that they know best."""


@dataclass(frozen=True)
class GenerationSettings:
    """What to set where pictures are generated. ``shift``: of the sigmas; None: as the base has it. ``branch``: which
    branch of the guidance gets the LoRA. ``source``: where it is known from."""

    steps: int
    cfg: float
    shift: float | None = None
    size: str = "1024x1024"
    negative_prompt: str = ""
    branch: Literal["both", "positive"] = "both"
    source: str = "DiffSynth-Studio's example"

    @property
    def line(self) -> str:
        """In words: ``50 steps, cfg 4, shift 8, ...``."""
        parts = [f"{self.steps} steps", f"cfg {self.cfg:g}"]
        parts += [f"shift {self.shift:g}"] if self.shift else [self.size]
        parts += ["a negative prompt"] if self.negative_prompt else []
        parts += ["the LoRA on the positive branch only"] if self.branch == "positive" else []
        return ", ".join(parts)

    def json(self) -> dict[str, Any]:
        return asdict(self)


QWEN_SETTINGS = GenerationSettings(50, 4)
Z_SETTINGS = GenerationSettings(50, 4, 8, negative_prompt=Z_NEGATIVE, branch="positive")
OMNI_SETTINGS = GenerationSettings(50, 7, 8, negative_prompt=Z_NEGATIVE, branch="positive")
