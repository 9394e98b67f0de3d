"""The authors' package, installed without what it needs: its modules are loaded one by one, by path."""

import sys
from importlib import import_module, util
from pathlib import Path
from types import ModuleType


def diffsynth(name: str) -> ModuleType:
    """A module of the ``diffsynth`` package, such as "models.qwen_image_image2lora", without running the package's
    own start, which imports a whole framework."""
    spec = util.find_spec("diffsynth")
    assert spec and spec.submodule_search_locations, "diffsynth is missing: run `python install.py test`"
    root = Path(spec.submodule_search_locations[0])
    parts = name.split(".")
    for depth in range(len(parts)):
        package = ".".join(("peer_diffsynth", *parts[:depth]))
        if package not in sys.modules:
            sys.modules[package] = ModuleType(package)
            sys.modules[package].__path__ = [str(root.joinpath(*parts[:depth]))]
    return import_module(f"peer_diffsynth.{name}")
