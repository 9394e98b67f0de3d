"""LoRA files: read, inspect, convert, resize, merge, check, export. Imports nothing else of this package.

Reached as ``i2l_ext.converters``: inside a WebUI another extension may own the bare name. Importing it imports
neither torch nor numpy; what needs them imports them when it runs.
"""

from .architectures import ARCHITECTURES, Architecture
from .errors import UserError
from .inspection import inspect
from .key_formats import KEY_FORMATS
from .lora import Lora, concatenate
from .select import select

__all__ = ["ARCHITECTURES", "KEY_FORMATS", "Architecture", "Lora", "UserError", "concatenate", "inspect", "select"]
