"""What ComfyUI asks a folder in ``custom_nodes/`` for."""

from __future__ import annotations

import logging

from i2l_ext.comfyui import file_nodes, load_node, make_node, model_nodes
from i2l_ext.comfyui.host import drop_tracebacks

logging.getLogger().addFilter(drop_tracebacks)

_NODES = {**make_node.NODES, **load_node.NODES, **model_nodes.NODES, **file_nodes.NODES}

NODE_CLASS_MAPPINGS = {name: node for name, (node, _) in _NODES.items()}
NODE_DISPLAY_NAME_MAPPINGS = {name: title for name, (_, title) in _NODES.items()}
