"""The SLURM script with stand-ins for SLURM's commands: what each node launches, and when it is queued again."""

import json
import os
import subprocess
from pathlib import Path

import pytest
from accelerate.commands.launch import launch_command_parser
from support.toy import EXAMPLES

SCRIPT = EXAMPLES / "slurm" / "train_cps.sbatch"
SRUN = """#!/bin/bash
shift  # --kill-on-bad-exit=1
for node in 0 1; do SLURM_NODEID=$node "$@" || exit $?; done
"""
SCONTROL = """#!/bin/bash
echo "$@" >> calls
if [ "$1 $2" = "show hostnames" ]; then echo node-a; sleep 0.2; echo node-b; fi  # all of it is to be read
"""
ACCELERATE = """#!/usr/bin/env python3
import json, os, sys
from pathlib import Path
Path(f"node-{os.environ['SLURM_NODEID']}.json").write_text(json.dumps(sys.argv[1:]))
if os.environ.get("PREEMPTED"):
    Path("out").mkdir()
    Path("out/preempted.json").write_text("{}")
    sys.exit(1)
"""


def sbatch(folder: Path, *words: str, **env: str) -> subprocess.CompletedProcess:
    commands = folder / "bin"
    commands.mkdir()
    for name, text in {"srun": SRUN, "scontrol": SCONTROL, "accelerate": ACCELERATE}.items():
        (commands / name).write_text(text)
        (commands / name).chmod(0o755)
    slurm = {
        "SLURM_JOB_ID": "71234",
        "SLURM_NNODES": "2",
        "SLURM_GPUS_ON_NODE": "4",
        "SLURM_JOB_NODELIST": "node-[a-b]",
    }
    path = os.pathsep.join([str(commands), os.environ["PATH"]])
    env = {**os.environ, **slurm, "PATH": path, "OUT": "out", **env}
    return subprocess.run(["bash", str(SCRIPT), *words], cwd=folder, env=env, capture_output=True, text=True)


@pytest.mark.parametrize("shard", ["0", "1"], ids=["DDP", "FSDP2"])
def test_each_node_launches_with_valid_accelerate_arguments(tmp_path, shard):
    done = sbatch(tmp_path, "--max_steps", "7", "--run_name", "two words", SHARD=shard)
    assert done.returncode == 0, done.stderr
    for rank in (0, 1):
        command, *words = json.loads((tmp_path / f"node-{rank}.json").read_text())
        args = launch_command_parser().parse_args(words)
        assert command == "launch" and args.machine_rank == rank
        assert (args.num_machines, args.num_processes) == (2, 8)
        assert (args.main_process_ip, args.main_process_port, args.rdzv_backend) == ("node-a", 21234, "static")
        assert args.multi_gpu == (shard == "0")
        assert (args.config_file is None) == (shard == "0")
        assert args.config_file is None or (EXAMPLES.parent / args.config_file).is_file()
        assert (EXAMPLES.parent / args.training_script).is_file()
        settings = args.training_script_args
        assert settings[-4:] == ["--max_steps", "7", "--run_name", "two words"]
        assert settings[:-4] == ["--save_steps", "1000", "--output_dir", "out", "--resume_from_checkpoint", "auto"]
    assert "requeue" not in (tmp_path / "calls").read_text()


def test_a_preempted_run_is_queued_again_and_keeps_its_status(tmp_path):
    done = sbatch(tmp_path, PREEMPTED="1")
    assert done.returncode == 1
    assert (tmp_path / "calls").read_text().splitlines()[-1] == "requeue 71234"
