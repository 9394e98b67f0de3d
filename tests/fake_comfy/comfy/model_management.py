"""Interrupts, and who is on the graphics card."""

from enum import Enum


class CPUState(Enum):
    GPU = 0
    CPU = 1


cpu_state = CPUState.CPU
interrupted = False
freed = []


class InterruptProcessingException(BaseException):
    pass


def throw_exception_if_processing_interrupted():
    global interrupted  # noqa: PLW0603 - as ComfyUI has it
    if interrupted:
        interrupted = False
        raise InterruptProcessingException


def unload_all_models():
    freed.append(True)


def soft_empty_cache():
    pass
