"""LoRA: in live networks (``live``, ``targets``, ``quantized``, ``mixin``), in a neutral form (``layer``, ``algebra``)
and as files (``files``, which is ``read`` and ``write``; ``stock``, ``kohya``, ``notes``; ``tools``, ``weights``,
``info``)."""
