"""The page's form in gradio, and what its buttons do. Imported only where the page is served."""

from __future__ import annotations

import base64
import html
import io
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from .app_draw import Step, Studio, mask_of
from .app_fields import bound_editor, bound_image
from .app_settings import Settings, from_picture
from .picture_files import read_settings

log = logging.getLogger(__name__)
SLOTS = 4  # LoRA that can act together
HISTORY = 60  # pictures that the gallery keeps in sight; the files all stay
# The delay lets the last progress message arrive first.
CANCELLED = "async () => { await new Promise(r => setTimeout(r, 300)); return '<div>cancelled</div>' }"
DAY = 24 * 3600  # seconds, after which what was uploaded goes


def build(studio: Studio, *, title: str = "", waiting: int = 8) -> gr.Blocks:
    """The page itself, not yet served."""
    limits, (height, width) = studio.limits, studio.size
    with gr.Blocks(title=title or "ldm", analytics_enabled=False, delete_cache=(DAY, DAY), fill_width=True) as page:
        drawn = gr.State([])  # (file, its settings) of this visitor, the newest first; kept here, never in the browser
        chosen = gr.State(None)
        gr.HTML(_header(studio, title), elem_id="header")
        with gr.Row(elem_id="main"):
            with gr.Column(elem_id="ask"):
                prompt = gr.Textbox(label="Prompt", lines=2, elem_id="prompt", autofocus=True)
                negative = gr.Textbox(label="Negative prompt", lines=1, elem_id="negative")
                with gr.Tabs():
                    with gr.Tab("Text to image", id="text"):
                        draw = gr.Button("Draw", variant="primary", elem_id="draw")
                    with gr.Tab("Image to image", id="image"):
                        image = gr.Image(label="Picture", type="pil", sources=["upload", "clipboard"], elem_id="image")
                        bound_image(image)
                        strength = _strength("image")
                        redraw = gr.Button("Draw from the picture", variant="primary", elem_id="draw_image")
                    with gr.Tab("Inpaint", id="inpaint"):
                        editor = gr.ImageEditor(
                            label="Paint over what is to change",
                            type="pil",
                            image_mode="RGBA",
                            sources=["upload", "clipboard"],
                            brush=gr.Brush(colors=["#000000"], color_mode="fixed"),
                            layers=False,
                            transforms=[],
                            elem_id="editor",
                        )
                        bound_editor(editor, kept=waiting + 8)
                        inpaint_strength = _strength("inpaint", 1.0)
                        inpaint = gr.Button("Draw the painted part", variant="primary", elem_id="draw_inpaint")
                cancel = gr.Button("Cancel", size="sm", interactive=False, elem_id="cancel")
            with gr.Column(elem_id="results"):
                status = gr.HTML(_told(""), elem_id="status")
                gallery = gr.Gallery(
                    label="Pictures", columns=3, object_fit="contain", interactive=False,
                    type="filepath", buttons=["download", "fullscreen"], elem_id="gallery",
                )  # fmt: skip
                details = gr.JSON(label="Settings of the picture", visible=False, elem_id="details")
                reuse = gr.Button("Use these settings", visible=False, elem_id="reuse")
            with gr.Column(elem_id="options"):
                with gr.Accordion("Settings", open=True):
                    with gr.Row():
                        own = ("default", "")  # what the folder's scheduler stands for
                        sampler = gr.Dropdown([own, *limits.samplers], value="", label="Sampler", min_width=120)
                        steps = _whole("Steps", studio.steps, "steps")
                        guidance = gr.Number(
                            studio.guidance, label="Guidance", step=0.5, min_width=80, elem_id="guidance"
                        )
                    with gr.Row():
                        seed = _whole("Seed", 0, "seed")
                        pictures = _whole("Pictures", 1, "pictures")
                        random_seed = gr.Checkbox(False, label="Random seed", min_width=80, elem_id="random")
                    with gr.Row():
                        wide = _whole("Width", width, "width", limits.factor)
                        high = _whole("Height", height, "height", limits.factor)
                    weighting = gr.Checkbox(
                        False,
                        label="Weights: (word:1.3) counts more, [word] less",
                        elem_id="weighting",
                    )
                lora_fields = _lora_fields(limits.loras, studio.chosen)
                with gr.Accordion("Repeat a picture", open=False):
                    again = gr.File(
                        label="A PNG from here fills the fields",
                        file_types=[".png"],
                        type="filepath",
                        elem_id="again",
                    )

        form = [
            prompt,
            negative,
            sampler,
            steps,
            guidance,
            seed,
            random_seed,
            wide,
            high,
            pictures,
            weighting,
            *lora_fields,
        ]
        shown = [status, gallery, drawn]
        page_of = Page(studio)
        one_job: dict[str, Any] = dict(
            concurrency_limit=1, concurrency_id="device", show_progress="hidden", api_visibility="private"
        )
        for button in (draw, redraw, inpaint):  # before the jobs: a button's events run in this order
            button.click(None, None, [cancel], js=_interactive(True))
        jobs: list[Any] = [
            button.click(function, [drawn, *extra, *form], shown, **one_job)
            for button, function, extra in (
                (draw, page_of.draw, []),
                (redraw, page_of.draw_from_image, [image, strength]),
                (inpaint, page_of.inpaint, [editor, inpaint_strength]),
            )
        ]
        quick: dict[str, Any] = dict(concurrency_limit=4, show_progress="hidden", api_visibility="private")
        for job in jobs:
            job.then(None, None, [cancel], js=_interactive(False))  # also where the job failed
        cancel.click(None, cancels=jobs)
        # In the browser, so that it works where the queue is full.
        cancel.click(None, None, [status], js=CANCELLED)
        cancel.click(None, None, [cancel], js=_interactive(False))
        fields = [*form, strength, inpaint_strength]
        gallery.select(page_of.look, [drawn], [chosen, details, reuse], **quick)
        reuse.click(page_of.reuse, [chosen, *lora_fields], fields, **quick)
        again.upload(page_of.repeat, [again, *lora_fields], fields, **quick)
    page.queue(max_size=waiting, api_open=False)
    return page


def _header(studio: Studio, title: str) -> str:
    """The model's name, and what kind of model it is."""
    height, width = studio.size
    about = f"{type(studio.pipe.net).__name__}, {width} × {height} pixels"
    return f"<h1>{html.escape(title)}</h1><p>{html.escape(about)}</p>"


def _interactive(value: bool) -> str:
    """JavaScript that enables or disables a button without a request to the server."""
    return f"() => ({{__type__: 'update', interactive: {str(value).lower()}}})"


def _whole(label: str, value: int, name: str, step: int = 1) -> gr.Number:
    return gr.Number(value, label=label, precision=0, step=step, min_width=80, elem_id=name)


def _strength(name: str, value: float = 0.6) -> gr.Slider:
    return gr.Slider(0.05, 1.0, value, step=0.05, label="Strength: how much changes", elem_id=f"strength_{name}")


def _lora_fields(names: Sequence[str], chosen: str) -> list[Any]:
    """Name and weight, in turns, for as many LoRA as can act together; the first starts as ``chosen``."""
    fields = []
    if names:
        with gr.Accordion("LoRA", open=bool(chosen)):
            for i in range(min(SLOTS, len(names))):
                with gr.Row():
                    fields.append(
                        gr.Dropdown(["", *names], value="" if i else chosen, label=f"LoRA {i + 1}", elem_id=f"lora_{i}")
                    )
                    fields.append(gr.Slider(-2, 2, 1.0, step=0.05, label="Weight", elem_id=f"weight_{i}"))
    return fields


def _told(text: str, done: int = 0, steps: int = 0) -> str:
    """``text`` is never the visitor's own words."""
    bar = f'<progress value="{done}" max="{steps}"></progress>' if steps else ""
    return f"<div>{text}</div>{bar}"


class Page:
    """What the page's buttons do. What the visitor got wrong becomes a message on the page."""

    def __init__(self, studio: Studio):
        self.studio = studio

    def draw(self, drawn: list, *form: Any) -> Iterator[list[Any]]:
        yield from self._draw(drawn, form)

    def draw_from_image(self, drawn: list, image: Any, strength: Any, *form: Any) -> Iterator[list[Any]]:
        yield from self._draw(drawn, form, "image", strength, image)

    def inpaint(self, drawn: list, edited: Any, strength: Any, *form: Any) -> Iterator[list[Any]]:
        image = (edited or {}).get("background")
        mask = None if image is None else mask_of(edited["layers"], image.size)
        yield from self._draw(drawn, form, "inpaint", strength, image, mask)

    def _draw(
        self,
        drawn: list,
        form: Sequence[Any],
        mode: str = "text",
        strength: Any = None,
        image: Any = None,
        mask: Any = None,
    ) -> Iterator[list[Any]]:
        try:
            settings = self._settings(form, mode, strength)
            for step in self.studio.draw(settings, image, mask):
                if step.files:
                    drawn = [*reversed(step.files), *drawn][:HISTORY]
                    told = _told(f"{len(step.files)} drawn, from seed {settings.seed} on")
                    yield [told, [(str(file), s.line()) for file, s in drawn], drawn]
                else:
                    yield [_progress(step), gr.skip(), gr.skip()]
        except Exception as error:
            yield [_told("not drawn"), gr.skip(), gr.skip()]
            if not isinstance(error, ValueError | OSError | RuntimeError):  # a full disk, no memory left: to be read
                log.exception("not drawn")
                error = RuntimeError("Something went wrong; what it was stands where the page was started")
            raise _message(error) from error

    def _settings(self, form: Sequence[Any], mode: str, strength: Any) -> Settings:
        prompt, negative, sampler, steps, guidance, seed, random_seed, width, height, pictures, weighting, *loras = form
        return Settings.from_form(
            self.studio.limits,
            random_seed=random_seed is True,
            prompt=prompt,
            negative_prompt=negative,
            sampler=sampler,
            num_inference_steps=steps,
            guidance_scale=guidance,
            seed=seed,
            width=width,
            height=height,
            pictures=pictures,
            weighting=weighting,
            loras={name: weight for name, weight in zip(loras[::2], loras[1::2], strict=True) if name},
            strength=strength,
            mode=mode,
        )

    def look(self, drawn: list, event: gr.SelectData) -> list[Any]:
        """The settings of the picture that was pressed."""
        if not isinstance(event.index, int) or not 0 <= event.index < len(drawn):
            return [gr.skip()] * 3
        written = drawn[event.index][1].written()
        return [written, gr.JSON(written, visible=True), gr.Button(visible=True)]

    def reuse(self, written: dict | None, *loras: Any) -> list[Any]:
        return self._filled(written or {}, loras)

    def repeat(self, file: str | None, *loras: Any) -> list[Any]:
        """The fields for the settings in a PNG."""
        if file is None:
            return self._filled({}, loras)
        try:
            found = read_settings(file)
        except (ValueError, OSError) as error:
            raise _message(ValueError(str(error).replace(file, Path(file).name)), "Not read") from error
        return self._filled(found, loras)

    def _filled(self, found: dict, loras: Sequence[Any]) -> list[Any]:
        """A value for each field; those that ``found`` does not name stay."""
        try:
            new = from_picture(found, self.studio.limits)
        except ValueError as error:
            raise _message(error, "Not filled in") from error
        names = ["prompt", "negative_prompt", "sampler", "num_inference_steps", "guidance_scale", "seed"]
        if new:
            new = {"negative_prompt": "", "sampler": "", "weighting": False, "loras": {}, **new, "random": False}
        values = [new.get(name, gr.skip()) for name in [*names, "random", "width", "height", "pictures", "weighting"]]
        if "loras" in new:
            pairs = [*new["loras"].items(), *[("", 1.0)] * len(loras)]
            loras = [value for pair in pairs[: len(loras) // 2] for value in pair]
        return [*values, *loras, *[new.get("strength", gr.skip())] * 2]


def _progress(step: Step) -> str:
    picture = ""
    if step.preview is not None:  # in the page itself: a file for each would fill the disk
        data = io.BytesIO()
        step.preview.save(data, "JPEG", quality=85)
        picture = f'<img alt="preview" src="data:image/jpeg;base64,{base64.b64encode(data.getvalue()).decode()}">'
    return _told(f"step {step.done} of {step.steps}", step.done, step.steps) + picture


def _message(error: Exception, title: str = "Not drawn") -> Exception:
    return gr.Error(html.escape(str(error)), duration=12, title=title, print_exception=False)
