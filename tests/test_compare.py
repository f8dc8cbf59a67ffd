"""``srpkd compare``: which networks it finds, what its server answers and refuses, and the page in a browser."""

from __future__ import annotations

import base64
import http.client
import json
import re
import shutil
import socket
import struct
import threading
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path

import chromium
import numpy as np
import pytest
import torch
from PIL import Image
from wrong_files import full_disk

from srpkd import compare
from srpkd.finite import NonFiniteError
from srpkd.models.checkpoints import load_generator, save_weights
from srpkd.models.inference import translate
from srpkd.models.networks import define_generator
from srpkd.reporting import comparison as comparison_module
from srpkd.reporting.comparison import Comparison, layers_of, networks_of, samples_of
from srpkd.reporting.comparison_server import ComparisonServer
from srpkd.reporting.pictures import relation_picture

NET = {"init_gain": 0.2}


@pytest.fixture
def run(tmp_path):
    """Return the folder of a run with a teacher, two students, and a test image."""
    folder = tmp_path / "run"
    for name, ngf in (("teacher", 4), ("kd", 2), ("kd+srp", 2)):
        (folder / name).mkdir(parents=True)
        save_weights(define_generator("resnet_1blocks", ngf=ngf, **NET), folder / name / "latest_net_G.pth")
        (folder / name / "latest_net_D.pth").write_text("a discriminator is not read")
    (folder / "images").mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (30, 41, 3), dtype=np.uint8)
    Image.fromarray(noise).save(folder / "images" / "000.png")
    (folder / "config.yaml").write_text("normalize: row\nteacher: null\nlayers: {model.9: model.9}\n")
    images = [{"label": "input", "file": "images/000.png"}, {"label": "teacher", "file": "images/missing.png"}]
    (folder / "report.json").write_text(json.dumps({"samples": [{"caption": "test <image> 0", "images": images}]}))
    return folder


def comparison_of(run: Path, **options) -> Comparison:
    return Comparison(networks_of([str(run)])[0], **options)


def pixels(data_url: str) -> np.ndarray:
    kind, data = data_url.split(",")
    assert kind == "data:image/png;base64"
    return np.array(Image.open(BytesIO(base64.b64decode(data))))


# --- networks and pictures ------------------------------------------------------------------------------------------


def test_the_networks_of_a_run(run):
    weights, config, notes = networks_of([str(run)])
    assert list(weights) == ["teacher", "kd", "kd+srp"] and not notes
    assert config["normalize"] == "row"
    assert layers_of(config, weights) == dict.fromkeys(weights, "model.9")
    layers = layers_of({"layers": {"s": "t"}}, networks_of([str(run), str(run)])[0])
    assert layers == {"teacher": "t", "kd": "s", "kd+srp": "s", "teacher (2)": "t", "kd (2)": "s", "kd+srp (2)": "s"}
    assert samples_of([run]) == {"test <image> 0": run / "images" / "000.png"}


def test_a_given_teacher_and_a_run_of_one_student(run, tmp_path, monkeypatch):
    only = tmp_path / "h2z"
    only.mkdir()
    for direction in "AB":
        save_weights(define_generator("resnet_1blocks", ngf=2, **NET), only / f"latest_net_G_{direction}.pth")
    teacher = run / "teacher" / "latest_net_G.pth"
    (only / "config.yaml").write_text(f"teacher: {teacher}\nteacher_B: {tmp_path}/gone.pth\n")
    assert networks_of([str(only)])[0] == {"teacher": teacher, "h2z": only / "latest_net_G_A.pth"}
    weights, _, [note] = networks_of([str(only)], "B")
    assert weights == {"h2z": only / "latest_net_G_B.pth"} and "gone.pth does not exist" in note
    assert networks_of([str(teacher)], "B")[2] == [
        "--direction B has no effect: it selects generators of a CycleGAN run"
    ]
    assert list(networks_of([str(teacher), str(only)])[0]) == ["teacher/latest_net_G.pth", "teacher", "h2z"]
    assert list(networks_of([str(only), str(only)])[0]) == ["teacher", "h2z", "teacher (2)", "h2z (2)"]
    monkeypatch.chdir(only)
    assert list(networks_of(["."])[0]) == ["teacher", "h2z"]
    shutil.copytree(only, only / "ngf 1.5")
    assert list(networks_of([str(only)])[0]) == ["teacher", "h2z", "ngf 1.5"]


@pytest.mark.parametrize("given", ["", "latest_net_G_A.pth"])
def test_the_teacher_is_that_of_the_run(run, tmp_path, given):
    """A folder, or the file of one direction beside that of the other."""
    teacher, student = tmp_path / "h2z teacher", tmp_path / "h2z"
    for folder in (teacher, student):
        for direction in "AB":
            save_weights(define_generator("resnet_1blocks", ngf=2, **NET), folder / f"latest_net_G_{direction}.pth")
    (student / "config.yaml").write_text(f"model: cycle_gan\nteacher: {teacher / given}\n")
    for direction in "AB":
        weights, _, notes = networks_of([str(student)], direction)
        assert weights == {
            "teacher": teacher / f"latest_net_G_{direction}.pth",
            "h2z": student / f"latest_net_G_{direction}.pth",
        }
        assert not notes
    (student / "config.yaml").write_text(f"model: pix2pix\nteacher: {run}\n")  # the folder of a run with a teacher
    assert networks_of([str(student)])[0]["teacher"] == run / "teacher" / "latest_net_G.pth"


def test_samples_of_one_direction(tmp_path):
    for name in ("a.png", "output.png"):
        (tmp_path / name).touch()
    images = [{"label": "teacher", "file": "output.png"}, {"label": "input", "file": "a.png"}]
    samples = [{"caption": f"test image 0 {direction}", "images": images} for direction in ("A to B", "B to A")]
    samples.append({"caption": "test image 1 A to B", "images": [{"label": "input", "file": "gone.png"}]})
    (tmp_path / "report.json").write_text(json.dumps({"samples": samples}))
    assert samples_of([tmp_path]) == {"test image 0 A to B": tmp_path / "a.png"}
    assert list(samples_of([tmp_path], "B")) == ["test image 0 B to A"]


def test_wrong_paths(run, tmp_path):
    with pytest.raises(ValueError, match="gone does not exist: expected a file of weights, or the folder of a run"):
        networks_of([str(tmp_path / "gone")])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty contains no generator: expected latest_net_G.pth or latest_net_G_A"):
        networks_of([str(tmp_path / "empty")])
    with pytest.raises(SystemExit, match="error: --port 70000: expected 0 to 65535"):
        compare.main([str(run), "--port=70000"])
    gray = tmp_path / "gray.pth"
    save_weights(define_generator("resnet_1blocks", ngf=2, input_nc=1, **NET), gray)
    with pytest.raises(ValueError, match=r"different numbers of channels: {'teacher': 3, .*gray.pth': 1}"):
        Comparison(networks_of([str(run), str(gray)])[0])


def image_of(run: Path) -> torch.Tensor:
    """The test image as (1, 3, H, W) in [-1, 1]."""
    return torch.from_numpy(np.array(Image.open(run / "images" / "000.png"))).permute(2, 0, 1)[None] / 127.5 - 1


def assert_image(data_url: str, expected: torch.Tensor) -> None:
    assert abs(pixels(data_url).transpose(2, 0, 1) - ((expected[0] + 1) * 127.5).numpy()).max() <= 0.51


def test_outputs_are_those_of_translate(run):
    result = comparison_of(run).translate(run / "images" / "000.png")
    assert (result["width"], result["height"], result["resized"]) == (41, 30, None)
    assert (pixels(result["input"]) == np.array(Image.open(run / "images" / "000.png"))).all()
    assert [network["label"] for network in result["networks"]] == ["teacher", "kd", "kd+srp"]
    for network in result["networks"]:
        file = run / network["label"] / "latest_net_G.pth"
        assert_image(network["image"], translate(load_generator(file).eval(), image_of(run)))
        assert network["ms"] > 0 and network["bytes"] == file.stat().st_size
    assert result["networks"][0]["parameters"] > result["networks"][1]["parameters"]


def test_a_unet_that_needs_padding(run):
    unet = define_generator("unet_16", ngf=2, norm="batch", **NET)
    for name, mean in unet.named_buffers():
        if name.endswith("running_mean"):
            mean.normal_()
    save_weights(unet, run / "unet.pth")
    comparison = Comparison({"unet": run / "unet.pth"}, layers={"unet": "model.9"})  # a layer of another network
    calls: list[object] = []
    comparison.networks["unet"].register_forward_hook(lambda *_: calls.append(_))
    [result] = comparison.translate(run / "images" / "000.png")["networks"]
    assert_image(result["image"], translate(unet.eval(), image_of(run)))
    assert len(calls) == 1 + comparison_module.TIMED_CALLS
    [(_, features)] = comparison._kept.values()
    assert features["unet"].shape[1:] == (15, 21)  # of 16 x 24, for 30 x 41 of 32 x 48 pixels
    next(comparison.networks["unet"].parameters()).fill_(torch.nan)
    with pytest.raises(NonFiniteError, match="unet"):
        comparison.translate(run / "images" / "000.png")


def test_large_images_are_scaled_down(run):
    result = comparison_of(run, size=20).translate(run / "images" / "000.png")
    assert (result["width"], result["height"], result["resized"]) == (20, 15, (41, 30))
    assert pixels(result["networks"][0]["image"]).shape == (15, 20, 3)


def test_relations_are_rows_of_the_relation_matrix(run):
    comparison = comparison_of(run, normalize="cosine")
    name = comparison.translate(run / "images" / "000.png")["id"]
    result = comparison.relations(name, 0.99, 0.1)
    assert list(result["maps"]) == ["teacher", "kd", "kd+srp"]
    feature = comparison._kept[name][1]["kd"]
    # 30 x 41 pixels are padded to 32 x 44, which gives 8 x 11 cells: those of the padding are left out
    assert feature.shape[1:] == (8, 11)
    assert (pixels(result["maps"]["kd"]) == relation_picture(feature, (0, 10), (30, 41), "cosine")).all()
    assert (pixels(result["input"]) != np.array(Image.open(run / "images" / "000.png"))).any()
    for x, y in ((1.0, 0.5), (0.5, -0.1), (float("nan"), 0.5)):
        with pytest.raises(ValueError, match="expected fractions of the image's sides"):
            comparison.relations(name, x, y)


def test_relations_of_several_images(run, tmp_path, monkeypatch):
    """Two tabs of a browser do not show each other's image."""
    monkeypatch.setattr(comparison_module, "KEPT_IMAGES", 2)
    comparison = comparison_of(run)
    Image.new("RGB", (16, 24)).save(tmp_path / "other.png")
    first = comparison.translate(run / "images" / "000.png")["id"]
    expected = comparison.relations(first, 0.9, 0.2)
    second = comparison.translate(tmp_path / "other.png")["id"]
    assert pixels(comparison.relations(second, 0.9, 0.2)["input"]).shape == (24, 16, 3)
    assert comparison.relations(first, 0.9, 0.2) == expected
    comparison.translate(tmp_path / "other.png")  # forgets the one that was not looked at for longest
    assert comparison.relations(first, 0.9, 0.2) == expected
    for name in (second, "", "unknown"):
        with pytest.raises(ValueError, match=r"features of this image are not kept \(the last 2 are\): open it again"):
            comparison.relations(name, 0.9, 0.2)


# --- the server -----------------------------------------------------------------------------------------------------


@contextmanager
def serving(run):
    with ComparisonServer(comparison_of(run), samples=samples_of([run])) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def ask(server, method, path, body=None, **headers):
    """Return (status, JSON or text) of a request."""
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=60)
    connection.request(method, path, body, {name: value for name, value in headers.items() if value is not None})
    answer = connection.getresponse()
    data = answer.read()
    connection.close()
    return answer.status, json.loads(data) if answer.getheader("Content-Type") == "application/json" else data.decode()


def test_requests(run):
    with serving(run) as server:
        assert server.server_address[0] == "127.0.0.1"
        status, page = ask(server, "GET", "/")
        assert status == 200 and "test &lt;image&gt; 0" in page and "<image>" not in page
        assert "http://" not in page and "https://" not in page  # it loads nothing from elsewhere
        status, result = ask(server, "POST", "/translate", (run / "images" / "000.png").read_bytes())
        assert status == 200 and len(result["networks"]) == 3
        assert ask(server, "POST", "/sample?file=test%20%3Cimage%3E%200")[1]["input"] == result["input"]
        status, maps = ask(server, "GET", f"/relations?image={result['id']}&x=0.5&y=0.25")
        assert status == 200 and len(maps["maps"]) == 3


def test_a_name_that_is_not_utf_8(run):
    """Linux allows any bytes; Python has them as characters that cannot be encoded."""
    (run / "kd").rename(run / "k\udce9")
    with serving(run) as server:
        status, page = ask(server, "GET", "/")
    assert status == 200 and "k?" in page


def test_a_port_that_is_in_use(run):
    with serving(run) as server, pytest.raises(SystemExit) as caught:
        compare.main([str(run), "--device=cpu", f"--port={server.server_port}"])
    message = rf"error: --port {server.server_port}: .*: use another port, or 0 for any free one"
    assert re.fullmatch(message, str(caught.value))


def test_closing_waits_for_the_networks(run):
    """Python would abort at exit if a thread were in the middle of a forward pass."""
    server = ComparisonServer(comparison_of(run))
    with server.lock:
        closing = threading.Thread(target=server.server_close)
        closing.start()
        closing.join(0.2)
        assert closing.is_alive()
    closing.join()
    assert server.socket.fileno() == -1
    server.server_close()  # again, as with a context manager: returns at once
    assert not server.lock.acquire(blocking=False)  # a request that comes later does not run


def test_wrong_requests(run):
    with serving(run) as server:
        status, answer = ask(server, "POST", "/translate", b"text")
        assert status == 400 and answer["error"].startswith("the image: not an image; expected one of")
        small = BytesIO()
        Image.new("RGB", (4, 90)).save(small, format="png")
        status, answer = ask(server, "POST", "/translate", small.getvalue())
        assert (status, answer["error"]) == (400, "the image: 4 x 90 pixels; expected at least 8 x 8")
        assert ask(server, "POST", "/translate")[0] == 400
        assert ask(server, "POST", "/translate", b"x", **{"Content-Length": str(1 << 40)})[0] == 413
        status, answer = ask(server, "GET", "/relations?x=0.5&y=0.5")
        assert (status, answer["error"][:42]) == (400, "the features of this image are not kept (t")
        assert ask(server, "GET", "/relations?x=0.5&y=a") == (400, {"error": "y='a': expected a number"})
        assert ask(server, "POST", "/sample?file=..%2Fconfig.yaml")[0] == 404
        assert ask(server, "GET", "/config.yaml")[0] == 404
        for headers in ({"Host": "example.com"}, {"Origin": "http://example.com"}, {"Origin": "null"}):
            assert ask(server, "GET", "/", **headers)[0] == 403
            assert ask(server, "POST", "/translate", b"x", **headers)[0] == 403
        assert ask(server, "GET", "/", Origin=server.url[:-1])[0] == 200


def test_an_error_of_the_networks_is_shown(run, monkeypatch, capsys):
    def fail(path: Path) -> None:
        raise RuntimeError("out of memory\nin a convolution")

    with serving(run) as server:
        monkeypatch.setattr(server.comparison, "translate", fail)
        assert ask(server, "POST", "/translate", b"x") == (500, {"error": "out of memory"})
    assert "RuntimeError: out of memory\nin a convolution" in capsys.readouterr().err


def test_full_disk_of_temporary_files(run):
    with serving(run) as server:
        with full_disk(10):
            answer = ask(server, "POST", "/translate", (run / "images" / "000.png").read_bytes())
        message = "the image cannot be written: File too large; make room on that disk, or write to another"
        assert answer == (400, {"error": message})
        assert ask(server, "POST", "/translate", (run / "images" / "000.png").read_bytes())[0] == 200


def test_broken_requests_and_connections_print_nothing(run, capfd):
    """A browser closes connections when the user leaves the page."""

    def send(server, method, address, headers, body=b""):
        lines = [f"{method} {address} HTTP/1.1", f"Host: 127.0.0.1:{server.server_port}", *headers, "", ""]
        with socket.create_connection(server.server_address, timeout=60) as connection:
            connection.sendall("\r\n".join(lines).encode() + body)
            connection.shutdown(socket.SHUT_WR)
            return connection.makefile("rb").readline()

    def disconnect(server, body):
        with socket.create_connection(server.server_address, timeout=60) as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            connection.sendall(body)

    with serving(run) as server:
        assert send(server, "POST", "/translate", ["Content-Length: 100"], b"half") == b""
        assert b" 400 " in send(server, "POST", "/translate", [f"Content-Length: {'9' * 5000}"])
        assert b" 404 " in send(server, "GET", "http://[::1/", [])
        assert b" 501 " in send(server, "HEAD", "/", [])
        for body in (b"GET / HTTP/1.1\r\n", f"GET / HTTP/1.1\r\nHost: {server.url[7:-1]}\r\n\r\n".encode()):
            disconnect(server, body)
        assert ask(server, "GET", "/")[0] == 200
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("option", "flags", "expected"), [("false", [], False), ("true", [], True), ("false", ["--train_mode_norm"], True)]
)
def test_batch_norms_normalise_as_in_the_run(tmp_path, monkeypatch, option, flags, expected):
    network = define_generator("resnet_1blocks", ngf=2, norm="batch", **NET)
    save_weights(network, tmp_path / "run" / "latest_net_G.pth")
    (tmp_path / "run" / "config.yaml").write_text(f"train_mode_norm: {option}\n")
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "in.png")
    found = []
    monkeypatch.setattr(ComparisonServer, "serve_forever", lambda server: found.append(server.comparison))
    compare.main([str(tmp_path / "run"), "--device=cpu", "--no_browser", *flags])
    [shown] = found[0].translate(tmp_path / "in.png")["networks"]
    image = torch.from_numpy(noise).permute(2, 0, 1)[None] / 127.5 - 1
    outputs = [network.train(mode)(image)[0].permute(1, 2, 0).detach().numpy() for mode in (False, True)]
    differences = [np.abs(pixels(shown["image"]) - 127.5 * (1 + output)).max() for output in outputs]
    assert differences[expected] < 0.51 < 2 < differences[not expected]


@pytest.mark.parametrize(("flags", "expected"), [([], "row"), (["--normalize=none"], "none")])
def test_relations_are_those_of_the_run_by_default(run, monkeypatch, flags, expected):
    (run / "config.yaml").write_text("normalize: row\nlayers: {model.5: model.5}\n")
    found = []
    monkeypatch.setattr(ComparisonServer, "serve_forever", lambda server: found.append(server.comparison))
    compare.main([str(run), "--device=cpu", "--no_browser", *flags])
    assert found[0].normalize == expected
    assert found[0].taps["kd"].names == ["model.5"]


def test_the_command_prints_the_address(run, monkeypatch, capsys):
    opened = []
    monkeypatch.setattr(compare.webbrowser, "open", opened.append)

    def interrupted(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(ComparisonServer, "serve_forever", interrupted)
    compare.main([str(run), "--device=cpu"])
    [url] = opened
    assert capsys.readouterr().out == f"teacher, kd, kd+srp: {url} (Ctrl-C ends the server)\n\n"
    compare.main([str(run), "--device=cpu", "--no_browser"])
    assert len(opened) == 1


# --- the page -------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(chromium.EXECUTABLE is None, reason="needs chromium or google-chrome")
def test_the_page_in_a_browser(run, tmp_path):
    with serving(run) as server, chromium.browser(tmp_path / "browser") as page:
        page.open(server.url)
        assert page.evaluate("document.title") == "srpkd compare"
        page.choose_file("#file", run / "config.yaml")
        page.wait("document.querySelector('#status').className == 'error'")
        assert "not an image" in page.evaluate("document.querySelector('#status').textContent")
        assert page.evaluate("document.querySelector('#results').hidden")

        page.choose_file("#file", run / "images" / "000.png")
        page.wait("document.querySelectorAll('#outputs img').length == 4")
        page.wait("[...document.images].every(image => image.complete && image.naturalWidth == 41)")
        captions = page.evaluate("[...document.querySelectorAll('#outputs figcaption')].map(c => c.innerText)")
        assert [text.split()[0] for text in captions] == ["input", "teacher", "kd", "kd+srp"]
        assert all("ms" in text and "KB" in text and "parameters" in text for text in captions[1:])
        assert page.evaluate("document.querySelector('#status').textContent") == ""

        page.click("#outputs figure:nth-child(2) img", 0.7, 0.3)
        page.wait("document.querySelectorAll('#relations img').length == 4")
        map_of_kd = "document.querySelectorAll('#relations img')[2].src"
        maps = server.comparison.relations(page.evaluate("shown"), 0.7, 0.3)["maps"]
        assert page.evaluate(map_of_kd) == maps["kd"]

        # another tab opens another image, which this one does not show
        other = BytesIO()
        Image.new("RGB", (16, 24)).save(other, format="png")
        assert ask(server, "POST", "/translate", other.getvalue())[0] == 200
        page.evaluate("document.querySelector('#relations').replaceChildren()")
        page.click("#outputs figure:nth-child(2) img", 0.7, 0.3)
        page.wait("document.querySelectorAll('#relations img').length == 4")
        assert page.evaluate(map_of_kd) == maps["kd"]

        page.click("[data-sample]", 0.5, 0.5)
        page.wait("document.querySelectorAll('#relations img').length == 0")  # those of the previous image
        assert [error for error in page.errors if "400" not in error] == []
