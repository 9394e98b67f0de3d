"""For ComfyUI, which takes its nodes from here where this checkout lies in ``custom_nodes/``."""

import importlib.util
import sys
from pathlib import Path

if "folder_paths" in sys.modules and "nodes" in sys.modules:  # ComfyUI's own modules
    if "i2l_ext" not in sys.modules:  # found without a new entry on the path, where our other folders would be seen too
        _spec = importlib.util.spec_from_file_location("i2l_ext", Path(__file__).parent / "i2l_ext" / "__init__.py")
        sys.modules["i2l_ext"] = importlib.util.module_from_spec(_spec)
        _spec.loader.exec_module(sys.modules["i2l_ext"])
    from i2l_ext.comfyui.extension import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS

    WEB_DIRECTORY = "i2l_ext/comfyui/web"
    __all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS", "WEB_DIRECTORY"]
