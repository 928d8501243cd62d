"""Pushes with the real client over HTTP to the small Hub of `hub_server.py`: their result, with and without faults."""

import logging
import re
import shlex
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import huggingface_hub
import pytest
import yaml
from PIL import Image
from support.exported import export, facts
from support.hub_server import TOKEN, Fault, Hub
from support.toy import ID2LABEL

from cps_hf.commands.main import main
from cps_hf.hub import push

COMMIT = "POST .*/commit/"


@pytest.fixture
def hub(monkeypatch):
    with Hub() as server:
        for name, value in {"HF_HUB_OFFLINE": False, "ENDPOINT": server.url, "HF_HUB_DISABLE_XET": True}.items():
            monkeypatch.setattr(huggingface_hub.constants, name, value)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setattr(push, "_WAITS", (0.01, 0.01))
        yield server
        huggingface_hub.close_session()


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    return export(tmp_path_factory.mktemp("run") / "best", id2label=ID2LABEL, card=facts(base_model=None))


SHARDS = {"model-00001-of-00001.safetensors", "model.safetensors.index.json"}


def in_shards(exported, folder):
    """The branch in the layout of a large model."""
    sharded = folder / "sharded"
    shutil.copytree(exported, sharded)
    (sharded / "model.safetensors").rename(sharded / "model-00001-of-00001.safetensors")
    (sharded / "model.safetensors.index.json").write_text("{}")
    return sharded


def metadata(card: bytes):
    return yaml.safe_load(card.decode().split("---\n")[1])


# ------------------------------------------------------------------------------------------------ results


def test_a_push_is_one_commit_of_the_folder_and_leaves_it_as_it_is(hub, exported):
    before = {path.name: path.read_bytes() for path in exported.iterdir()}
    address = push.push_branch(exported, "x", private=True)
    assert address == f"{hub.url}/me/x/commit/{hub.repos['models', 'me/x'].find('main').id}"
    assert hub.titles("me/x") == ["Upload a branch trained with cps_hf"] and hub.repos["models", "me/x"].private
    pushed = hub.files("me/x")
    assert {name: data for name, data in pushed.items() if name in before and name != "README.md"} == {
        name: data for name, data in before.items() if name != "README.md"
    }
    assert set(pushed) == {*before, ".gitattributes"}
    assert b'\nmodel_id = "me/x"\n' in pushed["README.md"]
    assert {path.name: path.read_bytes() for path in exported.iterdir()} == before
    # Pushing the same again makes no second commit.
    assert push.push_branch(exported, "me/x") == address and len(hub.titles("me/x")) == 1


def test_revision_and_tag_are_used(hub, exported):
    push.push_branch(exported, "me/x", revision="v2", tag="v2.0", commit_message="It's new")
    repo = hub.repos["models", "me/x"]
    assert hub.titles("me/x") == [] and hub.titles("me/x", "v2") == ["It's new"]
    assert repo.tags == {"v2.0": repo.find("v2").id}
    card = hub.files("me/x", "v2.0")["README.md"].decode()
    assert 'pipeline("image-segmentation", model=model_id, revision="v2")' in card
    assert card.count('from_pretrained(model_id, revision="v2")') == 2
    with pytest.raises(ValueError, match="`tag` v2.0 is already used for a commit of me/x"):
        push.push_branch(exported, "me/x", tag="v2.0")
    assert hub.titles("me/x") == [], "said before anything is uploaded"


def test_the_licence_falls_back_to_the_base_model(hub, exported, tmp_path):
    base = b"---\nlicense: other\nlicense_name: nvidia\nlicense_link: LICENSE\n---\n"
    hub.add_repo("some/backbone", files={"README.md": base})
    child = export(tmp_path / "b", card=facts(base_model="some/backbone"))
    push.push_branch(child, "me/a")
    data = metadata(hub.files("me/a")["README.md"])
    assert (data["license"], data["license_name"], data["license_link"]) == ("other", "nvidia", "LICENSE")
    push.push_branch(child, "me/b", license="mit")
    assert metadata(hub.files("me/b")["README.md"])["license"] == "mit"
    orphan = export(tmp_path / "c", card=facts(base_model="not/there"))
    push.push_branch(orphan, "me/c")
    assert metadata(hub.files("me/c")["README.md"])["license"] == "unknown"


def test_old_weights_do_not_stay_next_to_new_shards(hub, exported, tmp_path):
    push.push_branch(exported, "me/x")
    push.push_branch(in_shards(exported, tmp_path), "me/x")
    assert len(hub.titles("me/x")) == 2
    assert {name for name in hub.files("me/x") if name.startswith("model")} == SHARDS


def test_concurrent_weights_do_not_stay_next_to_new_shards(hub, exported, tmp_path):
    repo = hub.add_repo("me/x")
    hub.faults = [Fault(COMMIT, "hold")]
    with ThreadPoolExecutor() as pool:
        pushed = pool.submit(push.push_branch, in_shards(exported, tmp_path), "me/x")
        while not any(re.search(COMMIT, line) for line in hub.requests) and not pushed.done():
            time.sleep(0.01)
        files = {**hub.files("me/x"), "model.safetensors": b"of another run"}
        repo.commit("main", "Another run", "", files, {"model.safetensors"})
        hub.released.set()
        address = pushed.result()
    assert hub.titles("me/x") == [push.MESSAGE, "Another run"] and address.endswith(repo.find("main").id)
    assert {name for name in hub.files("me/x") if name.startswith("model")} == SHARDS


def test_pictures_are_only_pushed_if_set(hub, tmp_path):
    directory = export(tmp_path / "best", card=facts())
    (tmp_path / "pictures").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "pictures" / "predictions.png")
    push.push_branch(directory, "me/x")
    assert "predictions.png" not in hub.files("me/x") and b"![" not in hub.files("me/x")["README.md"]
    push.push_branch(directory, "me/x", push_pictures=True)
    assert b"](<predictions.png>)\n\n## How to use" in hub.files("me/x")["README.md"]
    assert hub.files("me/x")["predictions.png"] == (tmp_path / "pictures" / "predictions.png").read_bytes()
    (tmp_path / "pictures" / "predictions.png").unlink()
    with pytest.raises(ValueError, match="predictions.png does not exist"):
        push.push_branch(directory, "me/x", push_pictures=True)


# --------------------------------------------------------------------------------------------------- errors


def test_invalid_pushes_fail_before_contacting_the_hub(hub, exported, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="no config.json and no preprocessor_config.json"):
        push.push_branch(tmp_path, "me/x")
    with pytest.raises(ValueError, match=r'like "user/name", got \'me/x/y\''):
        push.push_branch(exported, "me/x/y")
    broken = tmp_path / "b"
    shutil.copytree(exported, broken)
    (broken / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="no model.safetensors"):
        push.push_branch(broken, "me/x")
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(ValueError, match="hf auth login"):
        push.push_branch(exported, "me/x")
    assert hub.requests == []


def test_private_pushes_to_public_repositories_are_rejected(hub, exported):
    hub.add_repo("me/x")
    with pytest.raises(ValueError, match="me/x exists and is public"):
        push.push_branch(exported, "me/x", private=True)
    assert hub.titles("me/x") == []
    push.push_branch(exported, "me/x")
    assert len(hub.titles("me/x")) == 1


@pytest.mark.parametrize("status", [401, 403])
def test_a_rejected_token_is_reported_and_never_shown(hub, exported, caplog, status):
    hub.faults = [Fault("POST /api/repos/create", status, times=9)]
    with (
        caplog.at_level(logging.DEBUG),
        pytest.raises(RuntimeError, match="Does the token have write access there") as failure,
    ):
        push.push_branch(exported, "me/x", token="hf_secret")
    assert "hf_secret" not in str(failure.value) + caplog.text
    assert hub.faults[0].times == 8, "not tried again"


# ------------------------------------------------------------------------------------------------------ faults


@pytest.mark.parametrize("fault", [500, 409, 429, "cut", "lose"])
def test_a_commit_that_fails_once_is_made_exactly_once(hub, exported, fault, monkeypatch):
    hub.faults = [Fault(COMMIT, fault)]
    if fault == "lose":
        monkeypatch.setattr(push, "_WAITS", ())  # no further try: it is found in the history
    address = push.push_branch(exported, "me/x", tag="v1")
    assert hub.titles("me/x") == ["Upload a branch trained with cps_hf"]
    assert address.endswith(hub.repos["models", "me/x"].tags["v1"])
    assert sum(bool(re.search(COMMIT, line)) for line in hub.requests) == (1 if fault == "lose" else 2)


def test_concurrent_commits_are_not_taken_for_ours(hub, exported, monkeypatch):
    hub.add_repo("me/x").commit("main", push.MESSAGE, "Push of another", {"notes.txt": b"x"}, set())
    hub.faults = [Fault(COMMIT, 500, times=9)]
    with pytest.raises(RuntimeError):
        push.push_branch(exported, "me/x")
    assert hub.titles("me/x") == [push.MESSAGE]
    # Lost, and the lookup fails too: the next try finds nothing new.
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # the client's own back-off
    hub.faults = [Fault(COMMIT, "lose"), Fault("GET .*/commits/", 500, times=9)]
    push.push_branch(exported, "me/x")
    assert hub.titles("me/x") == [push.MESSAGE] * 2


@pytest.mark.parametrize("fault", [Fault("POST /api/repos/create", 500), Fault("POST /api/repos/create", "lose")])
def test_a_repository_whose_making_fails_once_is_made(hub, exported, fault):
    hub.faults = [fault]
    push.push_branch(exported, "me/x", private=True)
    assert hub.repos["models", "me/x"].private and len(hub.titles("me/x")) == 1


@pytest.mark.parametrize("fault", [500, "lose"])
def test_a_tag_that_fails_once_is_made(hub, exported, fault, monkeypatch):
    hub.faults = [Fault("POST .*/tag/", fault)]
    if fault == "lose":
        monkeypatch.setattr(push, "_WAITS", ())
    push.push_branch(exported, "me/x", tag="v1")
    repo = hub.repos["models", "me/x"]
    assert repo.tags == {"v1": repo.find("main").id}


def test_interrupted_uploads_are_retried(hub, exported, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # the client's own back-off
    hub.faults = [Fault("PUT /lfs/", "cut", times=2), Fault("POST /lfs-verify", 500)]
    push.push_branch(exported, "me/x")
    assert hub.files("me/x")["model.safetensors"] == (exported / "model.safetensors").read_bytes()
    assert len(hub.titles("me/x")) == 1


def test_a_failed_push_names_the_command_for_later(hub, exported, tmp_path, capsys):
    folder = tmp_path / "it's here" / "best"
    shutil.copytree(exported, folder)
    hub.faults = [Fault(COMMIT, 503, times=3)]
    with pytest.raises(RuntimeError, match="Nothing is lost") as failure:
        push.push_branch(folder, "me/x", revision="v2", tag="v1", private=True, license="mit")
    assert hub.titles("me/x", "v2") == [] and TOKEN not in str(failure.value)
    words = shlex.split(str(failure.value).split("To push it later: ")[1])
    assert words[:3] == ["cps-hf", "push", str(folder)]
    main(words[1:])
    repo = hub.repos["models", "me/x"]
    assert hub.titles("me/x", "v2") == [push.MESSAGE] and repo.private
    assert repo.tags["v1"] == repo.find("v2").id and capsys.readouterr().out.strip().endswith(repo.tags["v1"])
    assert metadata(hub.files("me/x", "v2")["README.md"])["license"] == "mit"
    with pytest.raises(SystemExit, match="2"):
        main(words[1:])
    assert capsys.readouterr().err.startswith("error: `--tag` v1")


def test_the_pushing_file_imports_nothing_from_the_package(hub, exported, tmp_path):
    words = [sys.executable, "-P", push.__file__, str(exported), "--repo_id", "me/x"]  # as `background` starts it
    done = subprocess.run(words, env=hub.environment(tmp_path / "cache"), capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stdout.strip().endswith(hub.repos["models", "me/x"].find("main").id)
    words[-1] = "me/x/y"
    wrong = subprocess.run(words, env=hub.environment(tmp_path), capture_output=True, text=True)
    assert wrong.returncode == 2 and wrong.stderr.startswith("error: ") and "Traceback" not in wrong.stderr


def test_a_space_names_the_pushed_repository(hub, exported, tmp_path, capsys):
    words = ["push", str(exported), "--repo_id", "x", "--private", "--space", str(tmp_path / "space")]
    main(words)
    said = capsys.readouterr().out
    assert f"hf upload me/x-demo {tmp_path / 'space'} --repo-type space --private" in said
    header = metadata((tmp_path / "space" / "README.md").read_bytes())
    assert header["models"] == ["me/x"] and "'me/x'" in (tmp_path / "space" / "app.py").read_text()
    pushes = len(hub.titles("me/x"))
    with pytest.raises(SystemExit):
        main(words)
    assert "already exists" in capsys.readouterr().err and len(hub.titles("me/x")) == pushes
