"""The page as a visitor sees it, in a headless Chromium."""

import base64
import io
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipelines.picture_files import read_settings
from tests.app_served import PASSWORD, served, slowed
from tests.browser import browser, requested, wait

pytestmark = pytest.mark.browser
GET = """const done = arguments[1]; fetch(arguments[0]).then(r => r.blob()).then(b => {
const f = new FileReader(); f.onload = () => done(f.result); f.readAsDataURL(b) })"""


class Visitor:
    def __init__(self, driver: Any, page: Any, studio: Any, out: Path):
        self.driver, self.page, self.studio, self.out = driver, page, studio, out

    def open(self) -> None:
        self.driver.get(self.page.local_url)
        wait(lambda: self.all("#draw")[0].is_displayed())

    def all(self, selector: str) -> list[Any]:
        return self.driver.find_elements("css selector", selector)

    def put(self, field: str, value: object) -> None:
        """Into a field, in place of what is there."""
        box = wait(lambda: self.all(f"#{field} textarea, #{field} input")[0])
        box.send_keys("\ue009a\ue000\ue017", str(value), "\t")  # Ctrl-A, Delete, the value, Tab

    def press(self, name: str) -> None:
        button = self.all(f"button#{name}")[0]
        self.driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", button)
        button.click()

    def tab(self, text: str) -> None:
        next(x for x in self.all("button[role=tab]") if x.text == text and x.is_displayed()).click()

    def drop(self, field: str, file: Path) -> None:
        self.all(f"#{field} input[type=file]")[0].send_keys(str(file))

    def status(self) -> str:
        return self.all("#status")[0].text

    def enabled(self, name: str) -> bool:
        return self.all(f"button#{name}")[0].is_enabled()

    def sources(self) -> list[str]:
        return [x.get_attribute("src") for x in self.all("#gallery img")]

    def drawn(self, button: str = "draw") -> np.ndarray:
        """Press it, and wait for the newest picture in the gallery."""
        before = self.sources()
        self.press(button)
        wait(lambda: self.sources()[:1] != before[:1] and "drawn" in self.status())
        data = self.driver.execute_async_script(GET, self.sources()[0])
        return np.asarray(Image.open(io.BytesIO(base64.b64decode(data.split(",")[1]))))

    def toast(self) -> str:
        return wait(lambda: [x.text for x in self.all(".toast-body") if x.text])[-1]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with served(tmp_path_factory.mktemp("app")) as parts, browser() as driver:
        yield Visitor(driver, *parts)


@pytest.fixture
def visitor(site: Visitor) -> Visitor:
    site.open()
    site.put("steps", 3)
    return site


def test_a_prompt_becomes_a_picture_and_a_seed_repeats_it(visitor: Visitor):
    visitor.put("prompt", "a red apple")
    first = visitor.drawn()
    width = "return document.querySelector('#gallery img').naturalWidth"
    assert wait(lambda: visitor.driver.execute_script(width)) == 16  # the browser shows it
    assert first.shape == (16, 16, 3) and first.std() > 5  # not blank
    visitor.put("seed", 1)
    other = visitor.drawn()
    visitor.put("seed", 0)
    again = visitor.drawn()
    assert not np.array_equal(first, other)
    np.testing.assert_array_equal(first, again)
    newest = max(visitor.studio.pictures.glob("*.png"), key=lambda x: x.stat().st_mtime_ns)
    assert read_settings(newest)["prompt"] == "a red apple"


def test_a_long_one_is_shown_as_it_grows_and_can_be_cancelled(visitor: Visitor):
    visitor.put("prompt", "zebra")
    visitor.put("steps", 900)
    before = len(list(visitor.studio.pictures.iterdir()))
    assert not visitor.enabled("cancel")
    with slowed(visitor.studio, 0.02) as calls:  # 18 seconds, if nobody stops it
        visitor.press("draw")
        wait(lambda: visitor.enabled("cancel"))
        shown = wait(lambda: visitor.all("#status img")[0].get_attribute("src"))
        assert np.asarray(Image.open(io.BytesIO(base64.b64decode(shown.split(",")[1])))).std() > 5
        assert float(wait(lambda: visitor.all("#status progress")[0].get_attribute("value"))) > 0
        visitor.press("cancel")
        wait(lambda: "cancelled" in visitor.status())
        assert not visitor.enabled("cancel")
        time.sleep(0.5)
        called = len(calls)
        time.sleep(0.5)
        assert len(calls) == called < 800
    assert len(list(visitor.studio.pictures.iterdir())) == before
    visitor.put("steps", 3)
    assert visitor.drawn().std() > 5  # and the next one is drawn


def test_one_who_waits_is_served_next_and_one_who_leaves_is_not(visitor: Visitor):
    """A closed tab stops its job: nobody would see it."""
    driver = visitor.driver
    visitor.put("prompt", "zebra")
    visitor.put("steps", 900)
    with slowed(visitor.studio, 0.02) as calls:
        visitor.press("draw")
        wait(lambda: "step" in visitor.status() and len(calls) > 3)
        first = driver.current_window_handle
        driver.switch_to.new_window("tab")
        second = driver.current_window_handle
        visitor.open()
        visitor.put("prompt", "zebra")
        visitor.put("steps", 3)
        visitor.press("draw")
        driver.switch_to.window(first)
        driver.close()
        driver.switch_to.window(second)
        wait(lambda: visitor.sources() and "drawn" in visitor.status(), 15)
        assert len(calls) < 800


def test_what_is_wrong_is_said_on_the_page(visitor: Visitor):
    visitor.press("draw")
    assert "Prompt: it is empty" in visitor.toast()
    visitor.open()
    visitor.put("prompt", "zebra")
    visitor.put("width", 63)
    visitor.press("draw")
    told = visitor.toast()
    assert "Width: 63, expected a multiple of 2; the nearest is 64" in told and "Traceback" not in told


def test_image_to_image(visitor: Visitor, tmp_path: Path):
    Image.new("RGB", (40, 40), "red").save(tmp_path / "red.png")
    visitor.put("prompt", "zebra")
    visitor.put("steps", 10)
    visitor.tab("Image to image")
    visitor.drop("image", tmp_path / "red.png")
    wait(lambda: visitor.all("#image img"))
    picture = visitor.drawn("draw_image")
    assert picture.shape == (16, 16, 3) and picture.std() > 1
    visitor.tab("Text to image")
    assert not np.array_equal(visitor.drawn(), picture)


def test_inpainting_with_a_brush(visitor: Visitor, tmp_path: Path):
    from selenium.webdriver import ActionChains

    Image.new("RGB", (64, 64), "red").save(tmp_path / "red.png")
    visitor.put("prompt", "zebra")
    visitor.tab("Inpaint")
    canvas = wait(lambda: visitor.all("#editor canvas")[0])
    time.sleep(1)  # what is dropped before the editor has drawn itself is lost
    visitor.drop("editor", tmp_path / "red.png")
    time.sleep(1)
    visitor.press("draw_inpaint")
    assert "Mask: nothing is painted" in visitor.toast()
    visitor.driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", canvas)
    ActionChains(visitor.driver).move_to_element(canvas).click_and_hold().move_by_offset(30, 20).release().perform()
    assert visitor.drawn("draw_inpaint").shape == (16, 16, 3)


def test_a_picture_fills_the_fields_from_its_file_and_from_the_gallery(visitor: Visitor):
    visitor.put("prompt", "a green apple")
    visitor.put("seed", 77)
    first = visitor.drawn()
    newest = max(visitor.studio.pictures.glob("*.png"), key=lambda x: x.stat().st_mtime_ns)
    visitor.all("#gallery button.thumbnail-item, #gallery button.thumbnail-lg")[0].click()
    shown = wait(lambda: visitor.all("#details")[0].text)
    assert "a green apple" in shown and "77" in shown
    visitor.put("seed", 5)
    visitor.press("reuse")
    wait(lambda: visitor.all("#seed input")[0].get_attribute("value") == "77")
    visitor.open()
    next(x for x in visitor.all("button.label-wrap") if "Repeat" in x.text).click()
    visitor.drop("again", newest)
    wait(lambda: visitor.all("#prompt textarea")[0].get_attribute("value") == "a green apple")
    assert visitor.all("#steps input")[0].get_attribute("value") == "3"
    np.testing.assert_array_equal(visitor.drawn(), first)


def test_a_lora_changes_the_picture(visitor: Visitor):
    visitor.put("prompt", "zebra")
    plain = visitor.drawn()
    next(x for x in visitor.all("button.label-wrap") if "LoRA" in x.text).click()
    box = wait(lambda: visitor.all("#lora_0 input")[0])
    box.send_keys("\ue009a\ue000", "style")
    wait(lambda: visitor.all("ul[role=listbox] li, [role=option]"))[-1].click()
    changed = visitor.drawn()
    assert not np.array_equal(plain, changed)


def test_the_page_needs_no_network(site: Visitor):
    requested(site.driver)
    site.open()
    time.sleep(1)
    asked = requested(site.driver)
    assert len(asked) > 20 and {x for x in asked if not x.startswith(site.page.local_url)} == set()
    policy = [x["message"] for x in site.driver.get_log("browser") if "Content Security Policy" in x["message"]]
    assert policy == []


def test_on_a_phone_the_result_follows_the_button_and_all_tabs_show(site: Visitor):
    size = {"width": 390, "height": 844, "deviceScaleFactor": 1, "mobile": True}
    site.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    try:
        site.open()
        tabs = [x.text for x in site.all("button[role=tab]") if x.is_displayed()]
        assert tabs == ["Text to image", "Image to image", "Inpaint"]
        top = {name: site.all(f"#{name}")[0].location["y"] for name in ("draw", "gallery", "steps")}
        assert top["draw"] < top["gallery"] < 700 < top["steps"]
        width = site.driver.execute_script("return document.documentElement.scrollWidth")
        assert width <= 390  # nothing hangs over the edge
    finally:
        site.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_a_password_opens_the_page(tmp_path: Path):
    with served(tmp_path, password=PASSWORD) as parts, browser() as driver:
        visitor = Visitor(driver, *parts)
        driver.get(visitor.page.local_url)
        fields = wait(lambda: visitor.all("input") if len(visitor.all("input")) == 2 else None)
        for word, let_in in (("wrong password", False), (PASSWORD, True)):
            fields = visitor.all("input")
            fields[0].send_keys("\ue009a\ue000", "anybody")
            fields[1].send_keys("\ue009a\ue000", word)
            next(x for x in visitor.all("button") if "Login" in x.text).click()
            time.sleep(1)
            assert bool(visitor.all("#draw")) is let_in or let_in
        wait(lambda: visitor.all("#draw"))
        visitor.put("steps", 3)
        visitor.put("prompt", "zebra")
        assert visitor.drawn().std() > 5


def test_it_writes_nowhere_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with served(tmp_path / "app") as parts, browser() as driver:
        visitor = Visitor(driver, *parts)
        visitor.open()
        visitor.put("steps", 2)
        visitor.put("prompt", "zebra")
        visitor.drawn()
        found = json.dumps(sorted(str(x.relative_to(tmp_path)) for x in tmp_path.rglob("*") if x.is_file()))
    assert not list((tmp_path / "here").iterdir()), found
