"""One file a trainer; here the table of them. A new trainer is a new file and a new entry."""

from .ai_toolkit import AI_TOOLKIT
from .base import ModelSupport, Trainer, TrainingStart
from .diffsynth import DIFFSYNTH
from .diffusers import DIFFUSERS, FLYMYAI
from .diffusion_pipe import DIFFUSION_PIPE
from .musubi import MUSUBI
from .onetrainer import ONETRAINER
from .simpletuner import SIMPLETUNER

TRAINERS: dict[str, Trainer] = {
    trainer.id: trainer
    for trainer in (
        MUSUBI, AI_TOOLKIT, DIFFSYNTH, SIMPLETUNER, ONETRAINER, DIFFUSION_PIPE, FLYMYAI, DIFFUSERS,
    )
}  # fmt: skip

__all__ = ["TRAINERS", "ModelSupport", "Trainer", "TrainingStart"]
