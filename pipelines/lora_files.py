"""LoRA files: what people exchange, read into a neutral form and written from it.

``lora_layer.py`` has the neutral form, ``lora_read.py`` and ``lora_write.py`` the ways in and out; ``lora_stock.py``
and ``lora_kohya.py`` know the names, ``lora_notes.py`` the metadata, ``lora_tools.py`` what is done with such files.
"""

from __future__ import annotations

from .lora_layer import Component, Layer, LoraFile
from .lora_read import Format, look_into, read_lora
from .lora_write import FORMATS, family_of, write_lora

__all__ = ["FORMATS", "Component", "Format", "Layer", "LoraFile", "family_of", "look_into", "read_lora", "write_lora"]
