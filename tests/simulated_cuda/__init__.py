"""A CUDA device made of CPU tensors: what a GPU would refuse raises here, and what would make the host wait is noted.

``build.py`` compiles ``guard.cpp``, which tells torch that one device is there. ``device.py`` makes tensors that say
``cuda:0`` and hold their numbers on the CPU; ``rules.py`` holds what CUDA's kernels refuse and CPU's do not,
``syncs.py`` where the host waits, ``patches.py`` what had to be replaced in ``torch.cuda``.

It knows no kernels, no streams, no memory limit and no time: ``tests/test_gpu.py`` is for these. Not simulated:
``torch.Generator("cuda")``, CUDA graphs, torch.compile, bitsandbytes' and xFormers' kernels, more than one device.
"""
