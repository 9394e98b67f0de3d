"""ComfyUI as a host. The only file that imports ComfyUI's own modules.

ComfyUI imports this at its start: what takes longer than a moment is imported when it is used, in all of this room.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from i2l_ext.engine.job import Job
    from i2l_ext.service.service import Service
    from i2l_ext.service.settings import SettingsFile

POLL_SECONDS = 0.1
"""Between two looks at a job; an interrupt is heeded as fast."""

BAR = 1000
"""Of ComfyUI's progress bar, for a whole job."""

WEIGHTS = ("clip_vision", "text_encoders", "diffusion_models", "style_models", "model_patches", "checkpoints")
"""Kinds of ComfyUI's folders in which the files of our models may lie."""


HINTS = {
    "package_missing": "A Python package is missing or too old: run install.py of this folder once with ComfyUI's "
    "Python, which puts it into a folder of the engine's own.",
    "out_of_memory": "Memory ran out. Close other programs, or take fewer pictures.",
    "weights_missing": 'Here the node "i2L models" downloads it.',
}
"""Code of a failure -> what helps here, where it is not what helps in a WebUI."""


class ComfyHost:
    """A Host that is ComfyUI, in whose process we run."""

    name = ""
    title = "ComfyUI"
    applies_loras = True
    is_local = True
    serves_api = False

    def __init__(self, state: Path) -> None:
        import folder_paths

        from i2l_ext.service.settings import SettingsFile

        self._paths = folder_paths
        self._file = SettingsFile(state / "settings.json")
        self.settings_file: SettingsFile | None = self._file

    def option(self, key: str) -> Any:
        if key == "i2l_device" and _on_processor():
            return "cpu"
        return self._file.read()[key]

    def lora_folder(self) -> Path:
        return self.lora_folders()[0]

    def lora_folders(self) -> list[Path]:
        return [Path(folder).absolute() for folder in self._paths.get_folder_paths("loras")]

    def models_folders(self) -> list[Path]:
        from i2l_ext.service.host import named_models_folders

        models = Path(self._paths.models_dir).absolute()
        known = [Path(folder).absolute() for kind in WEIGHTS for folder in self._folders(kind)]
        others = [folder for folder in known if models not in folder.parents]
        named = named_models_folders(self.option("i2l_models_folder"))
        return list(dict.fromkeys((*named, models / "i2l", models, *others)))

    def _folders(self, kind: str) -> list[str]:
        return self._paths.get_folder_paths(kind) if kind in self._paths.folder_names_and_paths else []

    def language(self) -> str:
        """The nodes are in English, as ComfyUI's own are."""
        return ""

    def refresh_loras(self) -> None:
        self._paths.filename_list_cache.pop("loras", None)

    def exclusive_gpu(self, job: Job) -> AbstractContextManager[Any]:
        """ComfyUI runs one node at a time: its models leave the card before the job is asked for, in `finished`."""
        return nullcontext()


@cache
def comfy_service() -> Service:
    """The Service of this process."""
    from i2l_ext.engine.queue import state_folder
    from i2l_ext.service.service import Service

    state = state_folder()
    return Service(ComfyHost(state), state)


def finished(ask: Callable[[], Job], node: str | None, *, computes: bool = True) -> Job:
    """Ask for a job and wait for its end, with ComfyUI's progress bar and a line on the node.

    ``computes``: ComfyUI's models leave the card before. Raises UserError where it fails, and ComfyUI's own exception
    where the user interrupts; then the job is over within a second and has left nothing.
    """
    from comfy import model_management
    from comfy.utils import ProgressBar

    from i2l_ext.converters.errors import UserError
    from i2l_ext.engine.job import ENDED

    queue = comfy_service().queue
    if computes and comfy_service().host.option("i2l_free_vram") and not _on_processor():
        model_management.unload_all_models()
        model_management.soft_empty_cache()
    job, bar, told = ask(), ProgressBar(BAR), ""
    try:
        while job.state not in ENDED:
            with suppress(TimeoutError):
                queue.wait(job.id, POLL_SECONDS)
            model_management.throw_exception_if_processing_interrupted()
            bar.update_absolute(round(BAR * job.total))
            if (line := progress_line(job)) != told:
                told = line
                tell(line, node)
    except BaseException:  # the user's interrupt is one
        queue.cancel(job.id)
        raise
    if job.state != "done":
        hint = HINTS.get(job.code or "", job.hint)
        line = (job.error or "The job was cancelled").rstrip(".")
        raise UserError(f"{line}. {hint or ''}".rstrip(), job.code or "invalid")
    return job


def drop_tracebacks(record: logging.LogRecord) -> bool:
    """A filter for the log: what ComfyUI prints of a node that ends with a UserError is its line, without the traceback
    that it prints of every node."""
    errors = sys.modules.get("i2l_ext.converters.errors")
    is_users = errors is not None and isinstance(sys.exc_info()[1], errors.UserError)
    return not (is_users and record.getMessage().startswith("Traceback "))


def interruptible_sleep() -> None:
    """Wait a moment. Raises ComfyUI's exception where the user interrupts."""
    from comfy import model_management

    time.sleep(POLL_SECONDS)
    model_management.throw_exception_if_processing_interrupted()


def progress_line(job: Job) -> str:
    """Where a job is, for people: its step, by number and bytes."""
    if job.state == "waiting":
        return "waiting for another job"
    step = job.progress.current()
    if step is None:
        return "starting"
    size, share = step.get("bytes"), step["share"]
    done = f"{share * size / 1e9:.1f} of {size / 1e9:.1f} GB" if size and size >= 10**8 else f"{share:.0%}"
    return f"{step['title']} ({step['number']} of {step['of']}): {done}"


def tell(text: str, node: str | None) -> None:
    """Show a text on the node, where this ComfyUI can."""
    server: Any = getattr(getattr(sys.modules.get("server"), "PromptServer", None), "instance", None)
    if node is not None and hasattr(server, "send_progress_text"):
        server.send_progress_text(text, node)


def lora_names() -> list[str]:
    """Every LoRA, as ComfyUI's lists show it."""
    import folder_paths

    return list(folder_paths.get_filename_list("loras"))


def lora_path(name: str) -> Path:
    """The file of a LoRA that lists show under this name. Raises UserError."""
    import folder_paths

    from i2l_ext.converters.errors import UserError

    found = folder_paths.get_full_path("loras", name)
    if found is None or not Path(found).is_file():
        raise UserError(f"There is no LoRA {str(name)[:120]!r} in ComfyUI's loras folders. Refresh the lists (R).")
    return Path(found).absolute()


def shown_name(file: str) -> str:
    """The name under which lists show a LoRA file of the first loras folder, given by its path below it."""
    return str(Path(file))


def load_as_comfyui_does(model: Any, name: str, strength: float) -> Any:
    """What ComfyUI's own LoraLoaderModelOnly makes of a model and a LoRA."""
    import nodes

    return nodes.LoraLoaderModelOnly().load_lora_model_only(model, name, strength)[0]


def patch_weights(model: Any, tensors: dict[str, Any], strength: float) -> Any:
    """The same of a LoRA in memory: {key: tensor}."""
    import comfy.sd

    return comfy.sd.load_lora_for_models(model, None, tensors, strength, 0.0)[0]


def temp_folder() -> Path:
    """Where pictures lie that a node shows."""
    import folder_paths

    return Path(folder_paths.get_temp_directory())


def _on_processor() -> bool:
    """Whether ComfyUI was told to compute without a graphics card."""
    from comfy import model_management

    return model_management.cpu_state == model_management.CPUState.CPU
