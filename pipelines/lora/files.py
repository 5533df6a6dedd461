"""LoRA files: what people exchange, read into a neutral form and written from it.

``layer.py`` has the neutral form, ``read.py`` and ``write.py`` the ways in and out; ``stock.py``
and ``kohya.py`` know the names, ``notes.py`` the metadata, ``tools.py`` what is done with such files.
"""

from __future__ import annotations

from .layer import Component, Layer, LoraFile
from .read import Format, look_into, read_lora
from .write import FORMATS, family_of, write_lora

__all__ = ["FORMATS", "Component", "Format", "Layer", "LoraFile", "family_of", "look_into", "read_lora", "write_lora"]
