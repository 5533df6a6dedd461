"""The web page: ``ldm app FOLDER``. A form over the pipelines, for one machine and those who are let in."""

from __future__ import annotations

import hmac
import os
import socket
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.extras import pip_install

from .app_guard import Guard, check_address, is_loopback
from .outputs import check_output

if TYPE_CHECKING:
    from .app_draw import Studio

CSS = """
footer { display: none !important }
#header h1 { font-size: 1.4rem; font-weight: 600; margin: 0 }
#header p { color: var(--body-text-color-subdued); margin: 0 }
#main { display: grid; gap: 1rem; align-items: start;
  grid-template: "ask results" auto "options results" 1fr / minmax(22rem, 2fr) minmax(0, 3fr) }
#ask { grid-area: ask; min-width: 0 }
#results { grid-area: results; min-width: 0 }
#options { grid-area: options; min-width: 0 }
@media (max-width: 800px) {
  #main { grid-template: "ask" "results" "options" / minmax(0, 1fr) }
  #ask .tab-container button { padding: 0 .4rem }  /* three tabs fit on a phone */
  #gallery { --columns: 2 }
}
#status progress { width: 100%; height: .8rem; accent-color: #ea580c }
#status img { height: 12rem; max-width: 100%; object-fit: contain; display: block; margin: .6rem auto }
#gallery .grid-wrap { height: auto; min-height: 12rem; max-height: none }
#gallery .grid-container { grid-template-columns: repeat(var(--columns, 3), minmax(0, 1fr)) }
#gallery .grid-container:has(> :only-child) { grid-template-columns: minmax(0, 28rem) }
"""


def serve(
    studio: Studio,
    out: Path,
    *,
    title: str = "",
    host: str = "127.0.0.1",
    port: int | None = None,
    password: str | None = None,
    no_password: bool = False,
    waiting: int = 8,
) -> Any:
    """Start the page, and return gradio's ``Blocks``: ``.local_url`` is its address, ``.close()`` ends it.

    Args:
        out: the only folder that is written to: ``pictures`` and what gradio keeps, in ``temp``.
        port: None is the first free one from 7860 on.
        password: asked for at the door, with any name.
        no_password: let everybody in who can reach ``host``.
        waiting: requests that may wait; the next is told to come again.
    Raises:
        ValueError: an address that others can reach, and no password; gradio is not installed.
        OSError: the port is taken.
    """
    gr = ready(out, host, password, no_password)
    from starlette.middleware import Middleware

    from .app_page import build

    page = build(studio, title=title, waiting=waiting)
    pictures, temp = studio.pictures, (out / "temp").resolve()
    names = ["localhost", "127.0.0.1", "::1", host] if is_loopback(host) and password is None else None

    def let_in(name: str, given: str) -> bool:
        return hmac.compare_digest(given.encode(), (password or "").encode())

    if port is not None:
        check_port(port)
    tempfile.tempdir = str(temp)  # of this whole process: gradio lays parts of a request there
    gr.set_static_paths([pictures])  # shown from where they lie: of others gradio makes a copy, and lets it stay
    page.launch(
        server_name=f"[{host}]" if ":" in host else host,
        server_port=port,
        share=False,  # said aloud: an environment variable would turn it on
        auth=None if password is None else let_in,
        auth_message="Any name, and the password that the page was started with.",
        allowed_paths=[str(pictures)],
        app_kwargs={"middleware": [Middleware(Guard, folders=[pictures, temp], hosts=names)]},
        max_file_size="20mb",
        state_session_capacity=1000,  # each holds 100 kB, and whoever asks makes one
        prevent_thread_lock=True,
        quiet=True,
        inbrowser=False,
        show_error=False,
        footer_links=[],
        run_history=False,
        enable_monitoring=False,
        mcp_server=False,
        pwa=False,
        ssr_mode=False,
        strict_cors=True,
        theme=gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
        css=CSS,
    )
    return page


def ready(out: Path, host: str = "127.0.0.1", password: str | None = None, no_password: bool = False) -> Any:
    """gradio, told to keep to ``out``, after all checks that need no model. Raises what ``serve`` raises."""
    check_address(host, password, no_password)
    check_output(out, "--out", "folder")
    temp = (out / "temp").resolve()
    temp.mkdir(parents=True, exist_ok=True)
    os.environ["GRADIO_TEMP_DIR"] = str(temp)  # uploads, and copies of what is shown; read when gradio is imported
    os.environ["GRADIO_EXAMPLES_CACHE"] = str(temp / "examples")
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    try:
        import gradio
    except ImportError as error:
        raise ValueError(f"the page needs gradio ({error}): {pip_install('gradio')}") from error
    return gradio


def check_port(port: int) -> None:
    """Raises OSError where something listens there."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise OSError(f"--port {port}: taken, or not allowed ({error.strerror}); choose another") from error
