"""What the page's server gives away, over HTTP: nothing but its own pages and the pictures in its own folder."""

import http.client
import json
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from PIL import Image

from pipelines.app import ready
from pipelines.app_guard import Guard, check_address
from tests.app_served import PASSWORD, address, served, slowed
from tests.browser import wait

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
        call = {"data": [None, image], "fn_index": 1, "session_hash": uuid.uuid4().hex}
        return site.json(f"{API}/queue/join", call)[0]

    for path in ("/etc/hostname", "/etc/passwd", str(site.out.parent / "secret.png"), "http://127.0.0.1:1/x.png",
                 "https://example.com/x.png", f"{site.out}/temp/../../secret.png", 5, ["/etc/passwd"],
                 str(site.studio.pictures / "link.png")):  # fmt: skip
        assert join(path) == 403, path
    assert join(mine) == 200


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
                 lambda: site.json(f"{API}/queue/join", {"data": [], "fn_index": 0, "session_hash": "a"}),
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
            call = {"data": [None, *form], "fn_index": 0, "session_hash": uuid.uuid4().hex}
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
