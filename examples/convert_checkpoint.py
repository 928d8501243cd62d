"""Convert a checkpoint of the public CPS code (TorchSemiSeg) to a folder that transformers loads.

    python examples/convert_checkpoint.py epoch-last.pth cps_r50_voc
    python examples/convert_checkpoint.py epoch-last.pth cps_r101_cityscapes --num_labels 19 --branch 2

Load it with `AutoModelForSemanticSegmentation.from_pretrained("cps_r50_voc", trust_remote_code=True)`. Its image
processor scales to [0, 1], normalises with the ImageNet mean and standard deviation, and does not resize.
"""

import argparse
import pickle

import torch

from cps_hf.data.transforms import IMAGENET_MEAN, IMAGENET_STD
from cps_hf.hub.export import export_branch
from cps_hf.modeling import from_torchsemiseg


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", help="the checkpoint, a file written by torch.save")
    parser.add_argument("out", help="the folder to write")
    parser.add_argument("--branch", type=int, default=1, choices=(1, 2), help="the release evaluates 1")
    parser.add_argument("--num_labels", type=int, default=21, help="21 on VOC (default), 19 on Cityscapes")
    args = parser.parse_args()
    try:
        checkpoint = torch.load(args.file, map_location="cpu", weights_only=True)  # runs no code from the file
    except pickle.UnpicklingError as error:
        raise SystemExit(f"{args.file} contains more than tensors, or is not from torch.save: {error}") from error
    except OSError as error:
        raise SystemExit(f"{args.file} cannot be read: {error}") from error
    try:
        model = from_torchsemiseg(checkpoint, branch=args.branch, num_labels=args.num_labels)
    except ValueError as error:
        raise SystemExit(f"{args.file}: {error}") from error
    export_branch(model, args.out, image_mean=IMAGENET_MEAN, image_std=IMAGENET_STD)
    print(f"Branch {args.branch}, {model.num_parameters():,} parameters, written to {args.out}")


if __name__ == "__main__":
    main()
