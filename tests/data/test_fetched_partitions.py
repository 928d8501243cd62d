"""Published lists: downloaded once, cached, rejected if they differ, or read from a folder instead."""

import hashlib
import http.server
import threading

import pytest

from cps_hf.data import partitions
from cps_hf.data.partitions import partition

IDS = [f"img_{i:03d}" for i in range(100)]
LABELED, UNLABELED = "".join(f"{i}\r\n" for i in IDS[:5]).encode(), "".join(f"{i}\n" for i in IDS[5:90]).encode()


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A loopback server with two lists of five and 85 images, under the real paths."""
    files = {
        f"/{partitions._SOURCES['U']}/pascal/92/labeled.txt": LABELED,
        f"/{partitions._SOURCES['U']}/pascal/92/unlabeled.txt": UNLABELED,
    }

    class Handler(http.server.BaseHTTPRequestHandler):
        requests, cut = [], False

        def do_GET(self):
            self.requests.append(self.path)
            if self.path not in files:
                self.send_error(404)
                return
            content = files[self.path]
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content[: len(content) // 2] if Handler.cut else content)

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    monkeypatch.setattr(partitions.constants, "HF_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(partitions.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv(partitions.URL_VARIABLE, f"http://127.0.0.1:{server.server_port}")
    for side, content in (("labeled", LABELED), ("unlabeled", UNLABELED)):
        monkeypatch.setitem(partitions._SHA256, f"U/pascal/92/{side}.txt", hashlib.sha256(content).hexdigest())
    Handler.files = files
    yield Handler
    server.shutdown()
    server.server_close()


def cached(tmp_path):
    return sorted(str(p.relative_to(tmp_path / "home")) for p in (tmp_path / "home").rglob("*") if p.is_file())


def test_a_list_is_downloaded_once_and_then_cached(hub, tmp_path, monkeypatch):
    first = partition("unimatch/voc/92", IDS)
    assert first.labeled_ids == tuple(IDS[:5]) and first.unlabeled_ids == tuple(IDS[5:90])
    assert [path.rsplit("/", 1)[1] for path in hub.requests] == ["labeled.txt", "unlabeled.txt"]
    folder = "cps_hf/partitions/U/pascal/92/"
    assert cached(tmp_path) == [f"{folder}labeled.txt", f"{folder}unlabeled.txt"], "and no temporary file"
    monkeypatch.setattr(partitions.constants, "HF_HUB_OFFLINE", True)
    assert partition("unimatch/voc/92", IDS) == first and len(hub.requests) == 2


def test_a_damaged_cache_is_downloaded_again(hub, tmp_path, caplog):
    first = partition("unimatch/voc/92", IDS)
    (tmp_path / "home" / "cps_hf" / "partitions" / "U" / "pascal" / "92" / "labeled.txt").write_text("img_050\n")
    assert partition("unimatch/voc/92", IDS) == first and len(hub.requests) == 3
    assert "is not the published list" in caplog.text


def test_a_list_with_another_hash_is_rejected(hub, tmp_path):
    address = next(path for path in hub.files if path.endswith("/labeled.txt"))
    hub.files[address] = LABELED.replace(b"\r\n", b"\n")
    with pytest.raises(ValueError) as error:
        partition("unimatch/voc/92", IDS)
    for content in (LABELED, hub.files[address]):
        assert hashlib.sha256(content).hexdigest() in str(error.value)
    assert cached(tmp_path) == []
    (tmp_path / "copy" / "deep").mkdir(parents=True)
    (tmp_path / "copy" / "deep" / "labeled.txt").write_bytes(hub.files[address])
    with pytest.raises(ValueError) as error:
        partition("unimatch/voc/92", IDS, lists_dir=tmp_path / "copy")
    for content in (LABELED, hub.files[address]):
        assert hashlib.sha256(content).hexdigest() in str(error.value)


def test_a_failed_download_suggests_alternatives(hub, tmp_path, monkeypatch):
    advice = r"put it at .*cps_hf/partitions/U/pascal/92/labeled\.txt"
    hub.cut = True
    with pytest.raises(ConnectionError, match=rf"IncompleteRead.*{advice}"):
        partition("unimatch/voc/92", IDS)
    with pytest.raises(ConnectionError, match=r"pascal/183/labeled.txt cannot be downloaded: HTTPError.*404"):
        partition("unimatch/voc/183", IDS)
    with pytest.raises(ConnectionError, match=rf"URLError.*Connection.*{advice}"):
        partition("unimatch/voc/92", IDS, base_url="http://127.0.0.1:9")
    with pytest.raises(ConnectionError, match="not-a-url.*cannot be downloaded"):
        partition("unimatch/voc/92", IDS, base_url="not-a-url")
    assert cached(tmp_path) == []
    asked = len(hub.requests)
    monkeypatch.setattr(partitions.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConnectionError, match=rf"HF_HUB_OFFLINE is set.*{advice}"):
        partition("unimatch/voc/92", IDS)
    assert len(hub.requests) == asked
    # Following the advice helps.
    folder = tmp_path / "home" / "cps_hf" / "partitions" / "U" / "pascal" / "92"
    folder.mkdir(parents=True)
    (folder / "labeled.txt").write_bytes(LABELED)
    (folder / "unlabeled.txt").write_bytes(UNLABELED)
    assert partition("unimatch/voc/92", IDS).labeled_ids == tuple(IDS[:5])


def test_an_unwritable_cache_is_only_a_warning(hub, tmp_path, caplog):
    (tmp_path / "home").write_text("a file where the folder should be")
    assert partition("unimatch/voc/92", IDS).labeled_ids == tuple(IDS[:5])
    assert "cannot be cached" in caplog.text


def test_a_folder_of_lists_replaces_the_download(hub, tmp_path):
    (tmp_path / "copy" / "a" / "b").mkdir(parents=True)
    (tmp_path / "copy" / "labeled.txt").write_bytes(b"img_099\n")  # another list with the same name
    (tmp_path / "copy" / "a" / "b" / "labeled.txt").write_bytes(LABELED)
    (tmp_path / "copy" / "a" / "unlabeled.txt").write_bytes(UNLABELED)
    assert partition("unimatch/voc/92", IDS, lists_dir=tmp_path / "copy").labeled_ids == tuple(IDS[:5])
    with pytest.raises(ValueError, match="no pascal/183/labeled.txt as published"):
        partition("unimatch/voc/183", IDS, lists_dir=tmp_path / "copy")
    assert hub.requests == []
