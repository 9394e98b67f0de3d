"""Image to LoRA: pictures in, a LoRA file out.

``converters`` stands beside this package in a checkout and inside it in a wheel. Appending the checkout's root
to the package path lets both be imported as ``i2l_ext.converters``, a name no other extension can take.
"""

from pathlib import Path

__version__ = "0.1.0"

_checkout = Path(__file__).resolve().parent.parent
if (_checkout / "converters" / "lora.py").is_file() and str(_checkout) not in __path__:
    __path__.append(str(_checkout))
