"""The nodes for ComfyUI. It asks for them by the ``__init__.py`` at the root of a checkout in ``custom_nodes/``.

All but one only ask the engine: they run on the standard library, Pillow and torch's tensors. ``host`` alone imports
ComfyUI's own modules, and nothing here imports anything heavy before a node runs.
"""
