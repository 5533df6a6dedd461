"""What the page's server gives away, over HTTP: nothing but its own pages and the pictures in its own folder."""

import asyncio
import http.client
import io
import json
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from PIL import Image

from pipelines.app import ready
from pipelines.app_guard import UPLOAD, Guard, check_address
from pipelines.picture_files import save_png
from tests.app_served import PASSWORD, address, served, slowed
from tests.browser import wait

# The page's events by number: three that enable Cancel come before the jobs.
DRAW, FROM_IMAGE, INPAINT, REPEAT = 3, 4, 5, 15
API = "/gradio_api"


class Site:
    """Asks with paths as they are given: no client in between tidies them."""

    def __init__(self, page: Any, studio: Any, out: Path):
        self.page, self.studio, self.out = page, studio, out
        self.cookie: dict[str, str] = {}

    def ask(self, path: str, body: bytes | None = None, method: str | None = None, **headers: str) -> tuple[int, bytes]:
        line = http.client.HTTPConnection(*address(self.page), timeout=20)
        line.putrequest(method or ("GET" if body is None else "POST"), path, skip_host="Host" in headers)
        sent = {**self.cookie, **{k.replace("_", "-"): v for k, v in headers.items()}}
        for name, value in {**sent, **({} if body is None else {"Content-Length": str(len(body))})}.items():
            line.putheader(name, value)
        line.endheaders(body)
        answer = line.getresponse()
        self.headers = answer.headers
        found = answer.status, answer.read()
        line.close()
        return found

    def file(self, name: object) -> tuple[int, bytes]:
        return self.ask(f"{API}/file={name}")

    def json(self, path: str, value: Any) -> tuple[int, bytes]:
        return self.ask(path, json.dumps(value).encode(), Content_Type="application/json")

    def upload(self, name: str, data: bytes = b"x") -> tuple[int, bytes]:
        mark = uuid.uuid4().hex
        head = f'--{mark}\r\nContent-Disposition: form-data; name="files"; filename="{name}"\r\n\r\n'
        body = head.encode() + data + f"\r\n--{mark}--\r\n".encode()
        return self.ask(f"{API}/upload", body, Content_Type=f"multipart/form-data; boundary={mark}")

    def refused(self, fn: int, *data: Any) -> str:
        """What a job was refused with; empty where it was done."""
        session = uuid.uuid4().hex
        assert self.json(f"{API}/queue/join", {"data": data, "fn_index": fn, "session_hash": session})[0] == 200
        told = self.ask(f"{API}/queue/data?session_hash={session}")[1].decode().split("data: ")
        last = next(m for x in told if x and (m := json.loads(x))["msg"] == "process_completed")
        return "" if last["success"] else str(last["output"]["error"])

    def layer(self, index: str, name: str, end: bool = True) -> int:
        """What the editor sends of a drawing."""
        (editor,) = (i for i, x in self.page.blocks.items() if x.get_block_name() == "imageeditor")
        said = dict(component_id=editor, session_hash="a", fn_name="accept_blobs", type="layer", index=index, id=name)
        head = 'Content-Disposition: form-data; name="{}"{}\r\n\r\n{}\r\n'
        parts = [head.format(k, "", v) for k, v in said.items()] + [head.format("file", '; filename="b.png"', "x")]
        body = "--B\r\n" + "--B\r\n".join(parts) + "--B--\r\n"
        sent = (body if end else body.removesuffix("\r\n--B--\r\n")).encode()
        return self.ask(f"{API}/component_server", sent, Content_Type="multipart/form-data; boundary=B")[0]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("http")
    with served(folder) as parts:
        (folder / "secret.png").write_bytes(b"secret")
        (folder / "out" / "notes.png").write_bytes(b"secret")  # beside the folders that are shown
        Image.new("RGB", (4, 4)).save(folder / "out" / "pictures" / "mine.png")
        (folder / "out" / "pictures" / "link.png").symlink_to(folder / "secret.png")
        (folder / "out" / "pictures" / "etc").symlink_to("/etc")
        (folder / "out" / "pictures" / "run.html").write_text("<script>")
        yield Site(*parts)


def test_the_page_and_its_pictures_are_given(site: Site):
    status, page = site.ask("/")
    assert status == 200 and b"tiny" in page
    assert "default-src 'self'" in site.headers["content-security-policy"]
    assert site.file(site.studio.pictures / "mine.png")[0] == 200
    assert site.ask("/config")[0] == 200


def test_nothing_else_is_read(site: Site):
    folder, pictures = site.out.parent, site.studio.pictures
    names = [
        "/etc/passwd", "/etc/hostname", "etc/passwd", "//etc/passwd", "/proc/self/environ", folder / "secret.png",
        site.out / "notes.png", pictures / "run.html", pictures, f"{pictures}/",
        f"{pictures}/mine.png/../../../secret.png",
        f"{pictures}/../../secret.png", f"{pictures}/..%2f..%2fsecret.png", f"{pictures}/%2e%2e/%2e%2e/secret.png",
        f"{pictures}/%252e%252e/%252e%252e/secret.png", quote(str(folder / "secret.png"), safe=""),
        quote(quote(str(folder / "secret.png"), safe=""), safe=""), pictures / "link.png", pictures / "etc" / "passwd",
        f"{pictures}/mine.png%00.html", "../../../../etc/passwd", "file:///etc/passwd", "~/.bashrc", "C:/x.png",
        "http://127.0.0.1:1/x.png", "https://example.com/x.png", Path(__file__), Path.cwd() / "pyproject.toml",
    ]  # fmt: skip
    for name in names:
        for path in (f"{API}/file={name}", f"{API}/file/{name}", f"/file={name}", f"/file/{name}"):
            status, body = site.ask(path)
            assert status in (403, 404) and b"secret" not in body and b"root:" not in body, path


def test_other_addresses_of_gradio_are_closed(site: Site):
    for path in (
        f"{API}/proxy=https://example.com/x", f"{API}/info", f"{API}/openapi.json", f"{API}/runs", "/monitoring",
        "/monitoring/summary", f"{API}/run-history/buckets", f"{API}/stream/a/b/c/playlist.m3u8", "/svelte/x", "/docs",
        "/openapi.json", f"{API}/vibe-code/", f"{API}/deep_link", "/assets/../../../../../../etc/passwd",
        "/assets/%2e%2e/%2e%2e/%2e%2e/%2e%2e/etc/passwd", "/static/..%2f..%2f..%2fapp.py", "/assets//etc/passwd",
        f"{API}/custom_component/x/client/component/../../../../../etc/passwd",
    ):  # fmt: skip
        status, body = site.ask(path)
        assert status in (403, 404) and b"root:" not in body, path
    for path in (f"{API}/run/draw", f"{API}/api/draw", f"{API}/call/draw", f"{API}/process_recording"):
        assert site.json(path, {"data": []})[0] == 404


def test_an_upload_lands_in_the_temp_folder_whatever_its_name(site: Site):
    before = {x for x in site.out.parent.rglob("*") if x.is_file()}
    for name in ("../../evil.png", "/etc/evil.png", "..\\\\evil.png", "%2e%2e%2fevil.png", "a/../../evil.png", ".."):
        status, body = site.upload(name)
        assert status in (200, 400), name
        for file in json.loads(body) if status == 200 else []:
            assert Path(file).resolve().is_relative_to(site.out / "temp")
    new = {x for x in site.out.parent.rglob("*") if x.is_file()} - before
    assert new and all(x.is_relative_to(site.out / "temp") for x in new)
    assert not Path("/etc/evil.png").exists()


def test_what_is_uploaded_is_no_page_and_not_endless(site: Site):
    status, body = site.upload("evil.html", b"<script>alert(1)</script>")
    assert status == 200 and site.file(json.loads(body)[0])[0] == 404
    assert site.upload("large.png", bytes(21 * 2**20))[0] == 413
    assert site.upload("larger.png", bytes(33 * 2**20))[0] == 413
    assert site.json(f"{API}/queue/join", {"data": "x" * 2**20})[0] == 413


def test_a_job_cannot_name_a_file_that_was_not_uploaded(site: Site):
    """gradio copies what it is told of into its own folder, and fetches an address."""
    _, body = site.upload("mine.png", (site.studio.pictures / "mine.png").read_bytes())
    mine = json.loads(body)[0]

    def join(path: Any, **more: Any) -> int:
        image = {"path": path, "meta": {"_type": "gradio.FileData"}, **more}
        call = {"data": [None, image], "fn_index": FROM_IMAGE, "session_hash": uuid.uuid4().hex}
        return site.json(f"{API}/queue/join", call)[0]

    for path in ("/etc/hostname", "/etc/passwd", str(site.out.parent / "secret.png"), "http://127.0.0.1:1/x.png",
                 "https://example.com/x.png", f"{site.out}/temp/../../secret.png", 5, ["/etc/passwd"],
                 str(site.studio.pictures / "link.png")):  # fmt: skip
        assert join(path) == 403, path
    assert join(mine) == 200


def test_a_picture_is_of_few_formats_and_of_bounded_size(site: Site):
    """By what it is, not by its name: Pillow reads dozens of formats, some by running a program."""
    form = ["a zebra", "", "", 2, 3.0, 0, False, 16, 16, 1, False, "", 1.0]

    def refused(picture: Image.Image, kind: str) -> tuple[str, str]:
        data = io.BytesIO()
        picture.save(data, kind)
        path = json.loads(site.upload("mine.png", data.getvalue())[1])[0]
        file = {"path": path, "meta": {"_type": "gradio.FileData"}}
        drawn = {"background": file, "layers": [file], "composite": None}
        return site.refused(FROM_IMAGE, None, file, 0.5, *form), site.refused(INPAINT, None, drawn, 1.0, *form)

    small = Image.new("RGBA", (16, 16), "red")
    assert [refused(small, kind) for kind in ("PNG", "WEBP")] == [("", "")] * 2
    assert all("cannot be read as PNG" in x for kind in ("TIFF", "GIF") for x in refused(small, kind))
    assert all("9000 x 9000" in x for x in refused(Image.new("1", (9000, 9000)), "PNG"))
    data = {"path": None, "url": "data:image/png;base64,x", "meta": {"_type": "gradio.FileData"}}
    assert "there is none" in site.refused(FROM_IMAGE, None, data, 0.5, *form)


def test_an_editor_holds_few_drawings_of_few_layers(site: Site):
    """gradio makes a list as long as it is told, and keeps what no job asks for."""
    assert [site.layer(index, "a") for index in ("0", "null", "1000000000", "-1", "x")] == [200, 200, 400, 400, 400]
    assert all(site.layer("0", f"drawing {i}") == 200 for i in range(20))
    (editor,) = (x for x in site.page.blocks.values() if x.get_block_name() == "imageeditor")
    assert len(editor.blob_storage) == 16 and "drawing 19" in editor.blob_storage


def test_what_is_drawn_lies_in_one_place(site: Site):
    before = set(site.out.rglob("*.png"))
    assert site.refused(DRAW, None, "a zebra", "", "", 2, 3.0, 0, False, 16, 16, 1, False, "", 1.0) == ""
    (new,) = set(site.out.rglob("*.png")) - before
    assert new.parent == site.studio.pictures and site.file(new)[0] == 200


def test_half_a_request_leaves_nothing_outside(site: Site):
    before = set((site.out / "temp").iterdir())
    assert site.layer("0", "half", end=False) == 400
    assert len(set((site.out / "temp").iterdir()) - before) == 1


def test_what_a_png_is_refused_with_is_told_once(site: Site, tmp_path: Path):
    save_png(Image.new("RGB", (4, 4)), tmp_path / "a.png", {"prompt": "x", "num_inference_steps": 10**400})
    path = json.loads(site.upload("a.png", (tmp_path / "a.png").read_bytes())[1])[0]
    told = site.refused(REPEAT, {"path": path, "meta": {"_type": "gradio.FileData"}}, "", 1.0)
    assert told.startswith("Steps: 1000") and "&" not in told


def test_a_request_that_makes_no_sense_is_refused(site: Site):
    assert site.ask("/config", Host="[")[0] == 403
    assert site.ask(f"{API}/queue/join", b"{}", Origin="http://[")[0] == 403
    assert site.ask(f"{API}/upload", None, "POST", Transfer_Encoding="chunked")[0] == 411
    assert site.ask(f"{API}/queue/join", Connection="Upgrade", Upgrade="websocket", Sec_WebSocket_Version="13",
                    Sec_WebSocket_Key="x3JJHMbDL1EzLkh9GBhXDw==")[0] in (403, 404, 405)  # fmt: skip


def test_an_upload_is_not_held_for_those_who_are_not_let_in():
    """gradio asks for the password first, and reads then."""
    read, said = [], []

    async def receive() -> Any:
        read.append(1)
        return {"type": "http.request", "body": bytes(UPLOAD), "more_body": True}

    async def send(message: Any) -> None:
        said.append(message.get("status"))

    async def refuse(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 401, "headers": []})

    def ask(length: int) -> None:
        headers = [(b"content-length", str(length).encode())]
        scope = {"type": "http", "method": "POST", "path": f"{API}/upload", "headers": headers}
        asyncio.run(Guard(refuse, [])(scope, receive, send))

    ask(UPLOAD)
    assert said == [401] and not read
    ask(UPLOAD + 1)
    assert said[1] == 413 and len(read) == 2  # read on a little, for the answer to be seen, and not for ever


def test_other_sites_cannot_speak_through_a_visitor(site: Site):
    host, port = address(site.page)
    for name in ("evil.example", f"evil.example:{port}", "", "127.0.0.1.evil.example"):
        assert site.ask("/config", Host=name)[0] == 403, name  # a name that an attacker points at 127.0.0.1
    for origin in ("http://evil.example", "null", f"http://{host}:1"):
        assert site.ask(f"{API}/queue/join", b"{}", Origin=origin)[0] == 403, origin
    assert site.ask("/config", Host=f"localhost:{port}", Origin=f"http://localhost:{port}")[0] == 200


def test_a_password_is_asked_for_everywhere(tmp_path: Path):
    with served(tmp_path, password=PASSWORD) as parts:
        site = Site(*parts)
        Image.new("RGB", (4, 4)).save(parts[1].pictures / "mine.png")
        mine = f"{API}/file={parts[1].pictures / 'mine.png'}"
        form = {"Content_Type": "application/x-www-form-urlencoded"}
        asked = [lambda: site.ask("/config"), lambda: site.ask(mine), lambda: site.upload("x.png"),
                 lambda: site.json(f"{API}/queue/join", {"data": [], "fn_index": DRAW, "session_hash": "a"}),
                 lambda: site.ask(f"{API}/queue/data?session_hash=a"),
                 lambda: site.json(f"{API}/component_server", {})]  # fmt: skip
        assert [ask()[0] for ask in asked] == [401] * 6
        for wrong in ("username=a&password=wrong", "username=a&password=", f"username={PASSWORD}&password=a"):
            assert site.ask("/login", wrong.encode(), **form)[0] in (400, 422), wrong
            assert site.ask("/config")[0] == 401
        assert site.ask("/login", f"username=a&password={PASSWORD.replace(' ', '+')}".encode(), **form)[0] == 200
        cookies = [x.split(";")[0] for x in site.headers.get_all("set-cookie") or []]
        site.cookie = {"Cookie": "; ".join(cookies)}
        assert [site.ask("/config")[0], site.ask(mine)[0]] == [200, 200]
        assert site.file("/etc/passwd")[0] == 404


def test_one_draws_one_waits_and_the_next_is_told_to_come_again(tmp_path: Path):
    with served(tmp_path, waiting=1) as parts:
        site, studio = Site(*parts), parts[1]
        form = ["a zebra", "", "", 200, 3.0, 0, False, 16, 16, 1, False, "", 1.0]

        def join() -> int:
            call = {"data": [None, *form], "fn_index": DRAW, "session_hash": uuid.uuid4().hex}
            return site.json(f"{API}/queue/join", call)[0]

        with slowed(studio, 0.02) as calls:
            assert join() == 200
            wait(lambda: calls)  # it runs, and makes room
            assert [join(), join()] == [200, 503]


@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.1.5", "::", "example.com", ""])
def test_an_open_address_needs_a_password(host: str, tmp_path: Path):
    with pytest.raises(ValueError, match="needs a password"):
        ready(tmp_path / "out", host)
    assert not (tmp_path / "out").exists()
    check_address(host, "long enough", False)
    check_address(host, None, True)


def test_loopback_needs_none_and_passwords_are_looked_at():
    for host in ("127.0.0.1", "127.0.0.2", "::1", "localhost"):
        check_address(host, None, False)
    with pytest.raises(ValueError, match="shorter than 8"):
        check_address("127.0.0.1", "short", False)
    with pytest.raises(ValueError, match="one of the two"):
        check_address("127.0.0.1", "long enough", True)


def test_only_true_places_count(tmp_path: Path):
    """A folder that is itself a link is taken for what it points to."""
    (tmp_path / "true").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "true")
    (tmp_path / "true" / "a.PNG").touch()
    guard = Guard(None, [tmp_path / "link"])  # type: ignore[arg-type]
    assert guard.ours(str(tmp_path / "true" / "a.PNG")) and guard.ours(str(tmp_path / "link" / "a.PNG"))
    assert not guard.ours(str(tmp_path / "true" / "b.png")) and not guard.ours("a.PNG")
    assert not guard.ours(f"{tmp_path}/true/{'a' * 300}.png") and not guard.ours(f"{tmp_path}/true/\ud800.png")
