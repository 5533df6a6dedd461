"""``ldm app``: the web page of a pipeline folder."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from .cli_sample import Dtype
from .says import say

PASSWORD = "LDM_APP_PASSWORD"  # where a password is looked for: it is not to stand in the list of processes


def page(
    folder: Annotated[str, typer.Argument(help="Pipeline folder, run folder or hub name.")],
    out: Annotated[
        Path, typer.Option(help="Folder for pictures and uploads; the page reads and writes nothing outside it.")
    ] = Path("outputs/app"),
    loras: Annotated[Path | None, typer.Option(help="Folder of LoRA files to choose from.")] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="Port to listen on. Default: the first free one from 7860.")
    ] = None,
    password_file: Annotated[
        Path | None, typer.Option(help=f"File with the password. Default: the environment variable {PASSWORD}.")
    ] = None,
    ask_password: Annotated[
        bool, typer.Option("--ask-password", help="Set the password by typing it at the start.")
    ] = False,
    no_password: Annotated[
        bool, typer.Option("--no-password", help="Allow access without a password to everybody who reaches --host.")
    ] = False,
    dtype: Dtype = None,
    waiting: Annotated[int, typer.Option(min=1, help="Number of requests that may wait in the queue.")] = 8,
    max_side: Annotated[int, typer.Option(min=8, help="Longest side of a picture, in pixels.")] = 2048,
    max_pictures: Annotated[int, typer.Option(min=1, help="Most pictures in one request.")] = 8,
) -> None:
    """Serve a web page that draws, on this machine: previews, LoRA, image to image, inpainting."""
    password = _password(password_file, ask_password, no_password)
    say()
    from pipelines.app import ready, serve
    from pipelines.app_guard import is_loopback

    from .run_folder import model_of

    ready(out, host, password, no_password)
    model = model_of(folder)
    import torch

    from pipelines.app_draw import Studio, find_loras
    from pipelines.precision import sampling_dtype
    from pipelines.text_to_image import TextToImagePipeline

    device = "cuda" if torch.cuda.is_available() else "cpu"
    kind = sampling_dtype(device, dtype)
    files = {} if loras is None else find_loras(loras)
    if model.lora:
        files = {folder: Path(model.lora)} | files
    pipe = TextToImagePipeline.from_pretrained(model.folder, dtype=kind)
    for tokens in model.embeddings:
        pipe.load_textual_inversion(tokens)
    pipe.to(device)
    studio = Studio(
        pipe, out / "pictures", files, model=model.folder, chosen=folder if model.lora else "",
        embeddings=model.embeddings, max_side=max_side, max_pictures=max_pictures,
    )  # fmt: skip
    served = serve(
        studio, out, title=model.name, host=host, port=port, password=password, no_password=no_password,
        waiting=waiting,
    )  # fmt: skip
    print(f"preview   explains {studio.preview.r2:.0%} of the colours that the autoencoder makes of latents")
    print(f"pictures  {studio.pictures}")
    if not is_loopback(host):
        print("careful   what goes over the network is not encrypted: put it behind a server that speaks https")
    print(f"page      {served.local_url}  (Ctrl-C ends it)", flush=True)
    served.block_thread()


def _password(file: Path | None, ask: bool, none: bool) -> str | None:
    """From a file, a question or the environment, in this order.

    Raises:
        ValueError: two of them, or an empty one.
    """
    if (file is not None) + ask + none > 1:
        raise ValueError("--password-file, --ask-password and --no-password: give one of them")
    if none:
        return None
    if file is not None:
        password = file.read_text(encoding="utf-8").strip()
    elif ask:
        password = typer.prompt("Password", hide_input=True, confirmation_prompt=True)
    else:
        password = os.environ.get(PASSWORD)
    if password == "":
        raise ValueError("the password is empty")
    return password
