"""Pushes during a run and at its end, by real processes of `push.py`, to the Hub of `hub_server.py`."""

import json
import logging
import re
import shutil
import time
from hashlib import sha256

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file
from support.exported import export, facts
from support.hub_server import TOKEN, Fault, Hub
from support.processes import launch
from support.toy import ID2LABEL, SUPPORT, settings, toy_models, write_world
from transformers import TrainerCallback

from cps_hf.hub import push
from cps_hf.hub.background import BackgroundPushes
from cps_hf.training.trainer import CPSTrainer

SIZES = [(32, 40), (40, 32)]


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """For this process (`constants`) and for the processes that it starts (environment)."""
    with Hub() as server:
        for name, value in {"HF_HUB_OFFLINE": False, "ENDPOINT": server.url, "HF_HUB_DISABLE_XET": True}.items():
            monkeypatch.setattr(huggingface_hub.constants, name, value)
        for name, value in server.environment(tmp_path / "cache").items():
            monkeypatch.setenv(name, value)
        monkeypatch.delenv("HF_TOKEN")
        monkeypatch.setattr(push, "_WAITS", ())
        yield server
        huggingface_hub.close_session()


def settings_for(tmp_path, **fields):
    values = {"output_dir": str(tmp_path / "out"), "max_steps": 3, "per_device_train_batch_size": 2}
    values |= {"crop_size": [32, 32], "dataloader_num_workers": 0, "logging_steps": 1, "disable_tqdm": True}
    values |= {"push_to_hub": True, "hub_model_id": "me/x", "hub_token": TOKEN, "hub_timeout": 300}
    return settings(**(values | fields))


def pushes_for(tmp_path, **fields):
    return BackgroundPushes(settings_for(tmp_path, **fields)["hub"], tmp_path / "out")


def trainer_for(tmp_path, callbacks=None, **fields):
    return CPSTrainer(
        toy_models(),
        **settings_for(tmp_path, **fields),
        train_dataset=write_world(tmp_path / "labeled", SIZES),
        unlabeled_dataset=write_world(tmp_path / "unlabeled", SIZES, first=50, labels=False),
        eval_dataset=write_world(tmp_path / "eval", SIZES, first=90),
        callbacks=callbacks,
    )


class WaitForPush(TrainerCallback):
    """Run steps until the push of the first save has arrived; with more saves there would be a race."""

    def __init__(self, hub):
        self.hub = hub

    def on_step_begin(self, args, state, control, **kwargs):
        deadline = time.monotonic() + 120
        while state.global_step == 2 and not self.hub.titles("me/x", "v1") and time.monotonic() < deadline:
            time.sleep(0.05)


@pytest.mark.slow
def test_a_run_pushes_at_saves_and_at_its_end(hub, tmp_path, caplog):
    caplog.set_level(logging.DEBUG)
    fields = {"hub_strategy": "checkpoint", "hub_revision": "v1", "save_steps": 2, "report_to": ["tensorboard"]}
    trainer = trainer_for(tmp_path, [WaitForPush(hub)], hub_private_repo=True, hub_license="mit", **fields)
    trainer.train()
    repo, out = hub.repos["models", "me/x"], tmp_path / "out"
    assert hub.titles("me/x", "v1") == ["End of training", "Training in progress, step 2"] and repo.private
    assert [c.title for c in repo.branches["main"]] == ["initial commit"]
    # At step 2 there had been no evaluation: branch 0 in its state then, and the checkpoint of that step.
    first, last = repo.branches["v1"][1], repo.branches["v1"][0]
    for commit, step in ((first, 2), (last, 3)):
        state = json.loads(commit.files["last-checkpoint/trainer_state.json"])
        assert state["step"] == step and state["settings"]["output_dir"] == "out"
        assert str(tmp_path) not in b"".join(commit.files.values()).decode(errors="ignore")
        manifest = json.loads(commit.files["last-checkpoint/manifest.json"])[
            "files"
        ]  # of the files as they were pushed
        found = {name: sha256(commit.files[f"last-checkpoint/{name}"]).hexdigest() for name in manifest}
        assert found == {name: entry["sha256"] for name, entry in manifest.items()}
    for name in ("model.safetensors", "config.json", "preprocessor_config.json"):
        assert last.files[name] == (out / "best" / name).read_bytes(), name
    assert first.files["model.safetensors"] != last.files["model.safetensors"]
    assert b"license: mit" in last.files["README.md"] and b'model_id = "me/x"' in last.files["README.md"]
    assert not any(name.endswith(".png") for name in last.files), "pixels of the data set stay here"
    # The run's own files equal those of a run without pushing.
    assert json.loads((out / "checkpoint-3" / "trainer_state.json").read_text())["settings"]["output_dir"] == str(out)
    assert not [*out.glob("tmp-*")]
    for path in out.rglob("*"):
        assert not path.is_file() or TOKEN.encode() not in path.read_bytes(), path
    assert TOKEN not in caplog.text and TOKEN not in repr(trainer.hub)
    assert all(TOKEN.encode() not in data for commit in (first, last) for data in commit.files.values())
    for name in [name for name in last.files if name.startswith("last-checkpoint/")]:
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_bytes(last.files[name])
    again = {"resume_from_checkpoint": str(tmp_path / "last-checkpoint"), "push_to_hub": False, "max_steps": 4}
    assert trainer_for(tmp_path, output_dir=str(tmp_path / "again"), **again).train()["steps"] == 4
    assert trainer.push_to_hub("By hand", tag="t").endswith(repo.branches["v1"][0].id) and "t" in repo.tags


@pytest.mark.slow
def test_a_failed_push_ends_well_with_the_command_for_later(hub, tmp_path, caplog):
    hub.faults = [Fault("POST .*/commit/", 403, times=9)]
    results = trainer_for(tmp_path, max_steps=1, push_pictures=True).train()
    best = tmp_path / "out" / "best"
    assert "](<predictions.png>)" in (best / "README.md").read_text() and (best / "predictions.png").is_file()
    assert results["steps"] == 1 and (tmp_path / "out" / "results.json").is_file() and best.is_dir()
    (warning,) = [r.getMessage() for r in caplog.records if "To push it later" in r.getMessage()]
    assert "403" in warning and "tmp-push" not in warning and hub.titles("me/x") == []
    assert f"cps-hf push {best} --repo_id me/x" in warning


@pytest.mark.slow
def test_with_two_processes_each_state_is_pushed_once(hub, tmp_path):
    program = str(SUPPORT / "run_toy_steps.py")
    fields = {"push_to_hub": True, "hub_model_id": "me/x", "hub_strategy": "every_save", "save_steps": 1}
    words = ("--batch", "2", "--settings", json.dumps(fields))
    done = launch(program, str(tmp_path / "steps.pt"), *words, processes=2, HF_TOKEN=TOKEN)
    assert done.returncode == 0, done.stderr[-3000:]
    assert torch.load(tmp_path / "steps.pt")["processes"] == 2
    titles = hub.titles("me/x")
    assert titles[0] == "End of training" and len(titles) > 1 and len(set(titles)) == len(titles)
    asked = [request for request in hub.requests if re.match("POST .*/commit/", request)]
    assert len(asked) == len(titles)
    assert hub.files("me/x")["model.safetensors"] == (tmp_path / "steps.run/branch_0/model.safetensors").read_bytes()


def test_a_missing_or_wrong_token_fails_before_training(hub, tmp_path):
    with pytest.raises(ValueError, match="`push_to_hub`: Pushing needs a token: run `hf auth login`"):
        trainer_for(tmp_path / "a", hub_token=None).train()
    with pytest.raises(ValueError, match=r"401.*Does the token have write access there") as failure:
        trainer_for(tmp_path / "b", hub_token="hf_wrong").train()
    assert "hf_wrong" not in str(failure.value)
    hub.add_repo("me/public")
    with pytest.raises(ValueError, match="me/public exists and is public"):
        trainer_for(tmp_path / "c", hub_model_id="me/public", hub_private_repo=True).train()
    with pytest.raises(ValueError, match="`push_to_hub`: The repository's name"):
        trainer_for(tmp_path / "d", hub_model_id="a/b/c").train()
    assert not any((tmp_path / name / "out").exists() for name in "abcd")


def test_an_unreachable_hub_stops_no_run(hub, tmp_path, caplog):
    hub.faults = [Fault("POST /api/repos/create", 500)]
    pushes = pushes_for(tmp_path)
    assert "The Hub cannot be reached" in caplog.text and "Training continues" in caplog.text
    branch = export(tmp_path / "out" / "best", card=facts())
    assert pushes.finish(branch, "End of training").startswith(f"{hub.url}/me/x/commit/")


def weights(folder):
    return load_file(folder / "model.safetensors")["backbone.embedder.embedder.convolution.weight"]


def test_pushes_are_copies_one_at_a_time_and_the_newest_waiting_one_wins(hub, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    hub.faults = [Fault("POST .*/preupload/", "hold")]
    pushes = pushes_for(tmp_path)
    branch, versions = tmp_path / "out" / "best", {}
    for name in ("a", "b", "c"):
        torch.manual_seed(ord(name))
        export(branch, id2label=ID2LABEL, card=facts(model_name=name))
        versions[name] = (branch / "model.safetensors").read_bytes()
        pushes.submit(branch, name)
        while name == "a" and not any("preupload" in line for line in hub.requests):
            time.sleep(0.01)
    assert sum("/api/repos/create" in line for line in hub.requests) == 2, "the check, and one push"
    shutil.rmtree(branch)
    hub.released.set()
    export(branch, id2label=ID2LABEL, card=facts(model_name="d"))
    with pushes._changed:
        assert pushes._changed.wait_for(lambda: not (pushes._waiting or pushes._running), 120)
    assert hub.titles("me/x") == ["c", "a"] and "The push 'b' is skipped: 'c' is newer" in caplog.text
    commits = dict(zip("ca", hub.repos["models", "me/x"].branches["main"], strict=False))
    for name, commit in commits.items():
        assert (
            commit.files["model.safetensors"] == versions[name] and f"# {name}\n".encode() in commit.files["README.md"]
        )
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["best"]


def test_a_hanging_push_ends_after_the_timeout(hub, tmp_path, caplog):
    hub.faults = [Fault("PUT /lfs/", "stall", times=9)]
    pushes = pushes_for(tmp_path, hub_timeout=4)
    branch = export(tmp_path / "out" / "best", card=facts())
    start = time.monotonic()
    assert pushes.finish(branch, "End of training") is None and 4 <= time.monotonic() - start < 20
    assert re.search(r"took more than `hub_timeout` = 4 seconds\. .*--repo_id me/x", caplog.text)
    assert pushes._process.wait(20) != 0, "no process stays behind"
    assert hub.titles("me/x") == [] and [p.name for p in (tmp_path / "out").iterdir()] == ["best"]


def test_a_full_disk_stops_no_training(hub, tmp_path, caplog, monkeypatch):
    pushes = pushes_for(tmp_path)
    monkeypatch.setattr("cps_hf.files.link_file", lambda *paths: (_ for _ in ()).throw(OSError("no space left")))
    branch = export(tmp_path / "out" / "best", card=facts())
    assert pushes.finish(branch, "End of training") is None
    assert "no space left" in caplog.text and "To push it later" in caplog.text
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["best"]
