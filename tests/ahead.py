"""What a training run imports. A server of forks, and a process that forks, do it once for all of their children."""

import importlib

for name in (
    "diffusers.optimization",
    "matplotlib.figure",
    "transformers.models.clip.modeling_clip",
    "training.evaluate.report",
    "training.run",
    "training.tasks.autoencoder",
    "training.tasks.clip",
    "training.tasks.diffusion",
):
    importlib.import_module(name)
