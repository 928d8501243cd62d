"""Files that contain code: none of it runs unless allowed. (Malformed files: test_malformed_inputs.py.)"""

import ast
import contextlib
import hashlib
import json
import pickle
import runpy
import sys
from pathlib import Path

import pytest
import torch
from support.toy import settings, tiny_upernet, toy_models, write_world

from cps_hf.config import ModelConfig
from cps_hf.modeling.branches import build_branches
from cps_hf.objectives import Supervised
from cps_hf.training.trainer import CPSTrainer

ROOT = Path(__file__).parents[2]


class Payload:
    """Writes a file when unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def trainer_for(tmp_path, **fields):
    args = settings(
        output_dir=str(tmp_path / "out"),
        max_steps=2,
        per_device_train_batch_size=2,
        crop_size=[16, 16],
        dataloader_num_workers=0,
        disable_tqdm=True,
        **fields,
    )
    dataset = write_world(tmp_path / "labeled", [(20, 20)] * 2)
    return CPSTrainer(toy_models(1), **args, objective=Supervised(), train_dataset=dataset)


def test_the_payload_of_these_tests_would_run(tmp_path):
    pickle.loads(pickle.dumps(Payload(tmp_path / "pwned")))
    assert (tmp_path / "pwned").exists()


def test_a_checkpoint_runs_no_code(tmp_path):
    """Accelerate's pickles are read with `weights_only`; our own files are JSON and safetensors."""
    trainer_for(tmp_path, save_steps=1).train()
    checkpoint, pwned = tmp_path / "out" / "checkpoint-1", tmp_path / "pwned"
    pickles = [path for path in checkpoint.rglob("*") if path.suffix in (".bin", ".pkl", ".pt", ".pth")]
    assert pickles and not [path for path in checkpoint.rglob("*model*") if path.suffix != ".safetensors"]
    for path in pickles:
        whole = path.read_bytes()
        for content in (
            lambda p: p.write_bytes(pickle.dumps(Payload(pwned))),
            lambda p: torch.save(Payload(pwned), p),
        ):
            content(path)
            mend_manifest(checkpoint)
            with contextlib.suppress(Exception):  # an error or a warning of Accelerate is fine here
                trainer_for(tmp_path).train(resume_from_checkpoint=str(checkpoint))
            assert not pwned.exists(), path.name
        path.write_bytes(whole)


def mend_manifest(checkpoint):
    """Rewrite the checksums, as an attacker would."""
    path = checkpoint / "manifest.json"
    if path.exists():
        manifest = json.loads(path.read_text())
        for name, entry in manifest["files"].items():
            content = (checkpoint / name).read_bytes()
            entry |= {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        path.write_text(json.dumps(manifest))


def test_weights_in_a_pickle_run_no_code(tmp_path):
    from transformers import UperNetForSemanticSegmentation

    folder, pwned = tmp_path / "branch", tmp_path / "pwned"
    UperNetForSemanticSegmentation(tiny_upernet()).save_pretrained(folder)
    (folder / "model.safetensors").unlink()
    torch.save({"decode_head.classifier.weight": Payload(pwned)}, folder / "pytorch_model.bin")
    with pytest.raises(Exception, match="(?i)weights.only|safetensors|pickle|unsafe"):
        build_branches(str(folder), num_branches=1)
    assert not pwned.exists()


def test_converting_a_release_checkpoint_runs_no_code(tmp_path, monkeypatch):
    torch.save({"model": Payload(tmp_path / "pwned")}, tmp_path / "release.pth")
    script = str(ROOT / "examples" / "convert_checkpoint.py")
    monkeypatch.setattr(sys, "argv", [script, str(tmp_path / "release.pth"), str(tmp_path / "converted")])
    with pytest.raises(SystemExit, match="release.pth contains more than tensors"):
        runpy.run_path(script, run_name="__main__")
    assert not (tmp_path / "pwned").exists() and not (tmp_path / "converted").exists()


CODE = """
from pathlib import Path
from transformers import UperNetConfig, UperNetForSemanticSegmentation

Path({pwned!r}).touch()


class OwnConfig(UperNetConfig):
    model_type = "own"


class Own(UperNetForSemanticSegmentation):
    config_class = OwnConfig
"""


def test_model_code_runs_only_with_trust_remote_code(tmp_path):
    from transformers import UperNetForSemanticSegmentation

    folder, pwned = tmp_path / "branch", tmp_path / "pwned"
    UperNetForSemanticSegmentation(tiny_upernet()).save_pretrained(folder)
    (folder / "own.py").write_text(CODE.format(pwned=str(pwned)))
    config = json.loads((folder / "config.json").read_text()) | {"model_type": "own"}
    config["auto_map"] = {"AutoConfig": "own.OwnConfig", "AutoModelForSemanticSegmentation": "own.Own"}
    (folder / "config.json").write_text(json.dumps(config))
    assert ModelConfig().trust_remote_code is False
    with pytest.raises(ValueError, match="trust_remote_code"):
        build_branches(str(folder), num_branches=1)
    assert not pwned.exists()
    (model,) = build_branches(str(folder), num_branches=1, trust_remote_code=True)
    assert pwned.exists() and type(model).__name__ == "Own"


def test_a_branch_is_exported_as_safetensors_alone(tmp_path):
    trainer_for(tmp_path).train()
    for folder in ("branch_0", "checkpoint-2"):
        weights = [p.suffix for p in (tmp_path / "out" / folder).iterdir() if p.name.startswith(("model", "pytorch"))]
        assert set(weights) == {".safetensors"}


@pytest.mark.parametrize(
    "path", sorted([*ROOT.glob("cps_hf/**/*.py"), *ROOT.glob("examples/*.py")]), ids=lambda path: path.name
)
def test_no_file_of_ours_unpickles(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call):
            continue
        call = ast.unparse(node.func)
        options = {option.arg: ast.unparse(option.value) for option in node.keywords}
        assert call not in ("pickle.load", "pickle.loads", "joblib.load", "eval", "exec", "yaml.load"), call
        if call == "torch.load":
            assert options.get("weights_only") == "True", f"{path}, line {node.lineno}"
        if call in ("np.load", "numpy.load"):
            assert options.get("allow_pickle", "False") == "False", f"{path}, line {node.lineno}"
