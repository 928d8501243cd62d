"""Branches that are loaded from folders or the Hub."""

import pytest
from huggingface_hub.errors import RepositoryNotFoundError
from transformers import AutoConfig, SegformerConfig

from cps_hf.inference import ensemble
from cps_hf.inference.ensemble import Ensemble


@pytest.fixture
def hub(monkeypatch):
    """Records requests to the cache and to the Hub. Both have nothing, and the Hub does not respond."""
    asked = []

    def not_there(*args, **options):
        asked.append((args, options))
        raise ensemble.LocalEntryNotFoundError("not in the cache")

    def no_answer(url, **options):
        asked.append(url)
        raise ConnectionError("[Errno -2] Name or service not known")

    monkeypatch.setattr(ensemble, "hf_hub_download", not_there)
    monkeypatch.setattr(ensemble, "get_hf_file_metadata", no_answer)
    monkeypatch.setattr(AutoConfig, "from_pretrained", None)  # would try for half a minute
    return asked


def test_the_hub_is_contacted_once_for_a_name_without_folder(hub):
    with pytest.raises(
        ValueError,
        match=r"^`some/branch`: no model could be read: there is no folder of that name here, and the Hub cannot be "
        r"reached \(HF_HUB_OFFLINE=1 is set\)\. Check the path of the folder\.$",
    ):
        Ensemble.from_pretrained(["some/branch"], revision="v1")
    (cached, options), url = hub
    assert cached == ("some/branch", "config.json") and options == {"revision": "v1", "local_files_only": True}
    assert url.endswith("/some/branch/resolve/v1/config.json")


def test_the_hubs_error_for_a_missing_model_is_passed_on(hub, monkeypatch):
    def absent(url, **options):
        raise RepositoryNotFoundError.__new__(RepositoryNotFoundError)

    monkeypatch.setattr(ensemble, "get_hf_file_metadata", absent)
    with pytest.raises(ValueError, match="`branch`: no model could be read: there is no such folder") as error:
        Ensemble.from_pretrained(["branch"])
    assert isinstance(error.value.__cause__, RepositoryNotFoundError)


def test_an_invalid_hub_name_is_an_error_without_a_request(monkeypatch):
    monkeypatch.setattr(ensemble, "get_hf_file_metadata", None)
    monkeypatch.setattr(AutoConfig, "from_pretrained", None)
    with pytest.raises(ValueError, match="`a b`: no model could be read.*The Hub said: .*a b"):
        Ensemble.from_pretrained(["a b"])


def test_folders_and_cached_models_are_read_without_a_request(tmp_path, monkeypatch):
    SegformerConfig().save_pretrained(tmp_path)
    monkeypatch.setattr(ensemble, "get_hf_file_metadata", None)
    monkeypatch.setattr(ensemble, "hf_hub_download", lambda *args, **options: str(tmp_path / "config.json"))
    reads = []

    def read(source, **options):
        reads.append(source)
        raise OSError("read")

    monkeypatch.setattr(AutoConfig, "from_pretrained", read)
    for source in (str(tmp_path), "some/branch"):
        with pytest.raises(ValueError, match="transformers said: read"):
            Ensemble.from_pretrained([source])
    assert reads == [str(tmp_path), "some/branch"]
