"""A test program: a few SGD steps in a fixed order, with the parameters written to a file.

The global batch is four labeled and four unlabeled images: two that fill the crop, then two that fill a tenth of it.
"""

import argparse
import json
import os
import sys
from pathlib import Path

import torch
from transformers import Dinov2Config, SegformerConfig

from cps_hf.data import order
from cps_hf.modeling import ViTDPTConfig
from cps_hf.objectives import CrossPseudoSupervision, FixedTeacher, MeanTeacher
from cps_hf.training import batches, sharding, watch
from cps_hf.training.trainer import CPSTrainer
from support.architectures import DINOV2, DPT
from support.toy import settings, toy_models, write_world
from support.universal import BY_TYPE

parser = argparse.ArgumentParser()
parser.add_argument("out", type=Path)
parser.add_argument("--batch", type=int)
parser.add_argument("--accumulation", type=int, default=1)
parser.add_argument("--cutmix", action="store_true")
parser.add_argument("--local_counts", action="store_true")
parser.add_argument("--mixed_precision", default="no")
parser.add_argument("--segformer", action="store_true", help="a tiny one, in place of two convolutions")
parser.add_argument("--vit_dpt", action="store_true", help="two tiny DPTs on DINOv2")
parser.add_argument("--universal", nargs=2, help="the types of two tiny mask-classification networks")
parser.add_argument("--teacher", action="store_true", help="Mean Teacher in place of CPS")
parser.add_argument("--labelers", nargs="+", help="the fixed teacher in place of CPS, labeled by these folders")
parser.add_argument("--evaluate", action="store_true")
parser.add_argument("--always_fallen", action="store_true", help="each score counts as fallen")
parser.add_argument("--settings", type=json.loads, default={}, help="further fields of CPSConfig, as JSON")
parser.add_argument("--objective", type=json.loads, default={}, help="further fields of CPS, as JSON")
options = parser.parse_args()

torch.set_num_threads(1)
torch.backends.cudnn.allow_tf32 = False  # float32 steps on a GPU are compared with a CPU's
order.MapReader.source_at = lambda self, position: position % self.length  # the files' own order
if options.always_fallen:
    watch.TOLERANCE = -2.0
if options.local_counts:
    batches.share_counts = lambda *_, **__: None

large, small = (60, 80), (10, 16)  # in a crop of 40 x 40: all of it, and a tenth of it
sizes = [large, large, small, small] * 2
world = options.out.with_suffix(".world") / f"{os.getpid()}"
torch.manual_seed(0)
segformer = SegformerConfig(
    hidden_sizes=[8, 8, 16, 16],
    depths=[1] * 4,
    num_attention_heads=[1, 1, 2, 2],
    decoder_hidden_size=16,
    classifier_dropout_prob=0.0,  # if compiled, it draws other random numbers
    drop_path_rate=0.0,
)
objective = CrossPseudoSupervision(weight=1.5, cutmix=options.cutmix, **options.objective)
if options.teacher:
    objective = MeanTeacher(perturbation="noise", noise_std=0.0, confidence_threshold=0.0)
if options.labelers:
    objective = FixedTeacher(labelers=options.labelers)
universal = [BY_TYPE[name].config(num_labels=3) for name in options.universal or ()]
vit_dpt = ViTDPTConfig(backbone_config=Dinov2Config(**DINOV2), num_labels=3, **DPT)
models = vit_dpt if options.vit_dpt else universal or segformer
if not (options.vit_dpt or universal or options.segformer):
    models = toy_models(1 if options.teacher else 2)
side = 64 if universal else 42 if options.vit_dpt else 40
trainer = CPSTrainer(
    models,
    **settings(
        output_dir=str(options.out.with_suffix(".run")),
        per_device_train_batch_size=options.batch,
        gradient_accumulation_steps=options.accumulation,
        crop_size=[side, side],
        random_scale=[1.0],
        dataloader_num_workers=0,
        disable_tqdm=True,
        mixed_precision=options.mixed_precision,
        **{
            "max_steps": 3,
            "agreement_images": 0,
            "learning_rate": 0.05 if options.segformer or options.universal or options.vit_dpt else 0.5,
            **options.settings,
        },
    ),
    objective=objective,
    train_dataset=write_world(world / "labeled", sizes),
    unlabeled_dataset=write_world(world / "unlabeled", sizes, first=100, labels=False),
    eval_dataset=write_world(world / "val", [(30, 40)] * 3, first=200) if options.evaluate else None,
)
# These biases are zero in a new Swin and a new MaskFormer. A patch of padding and a MaskFormer's queries are then zero
# vectors before their first LayerNorm, whose gradient there is up to 10^5 times as large as any other, and so is its
# rounding. Trained networks have other biases.
ZERO_VECTORS = (".embeddings.patch_embeddings.projection.bias", ".decoder.layers.0.self_attn.o_proj.bias")
with torch.no_grad():
    for name, parameter in trainer.module.named_parameters():
        if options.universal and name.endswith(ZERO_VECTORS):
            parameter.copy_(torch.linspace(-1, 1, len(parameter)))
results = trainer.train()
parameters = sharding.weights(trainer.module) or dict(trainer.module.state_dict())
shares = sum(getattr(p, "_local_tensor", p).numel() for p in trainer.module.parameters())
if trainer.accelerator.is_main_process:
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    found = {"parameters": parameters, "logs": logs, "results": results, "held": shares}
    torch.save(found | {"processes": trainer.accelerator.num_processes}, options.out)
sys.stdout.flush()
