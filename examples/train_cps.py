"""The main job: train two segmentation models on each other's pseudo labels, and keep the better one.

    accelerate launch examples/train_cps.py
        draws street scenes in the Cityscapes layout, labels 12 of 400 images, and trains two small UperNet-ResNets
        from scratch with CPS + CutMix: a few minutes on two CPU cores.

    accelerate launch examples/train_cps.py --objective supervised --output_dir outputs/supervised
        the same labels and steps, without the unlabeled images.

    accelerate launch examples/train_cps.py --dataset cityscapes --data_root DIR --partition cps/cityscapes/1-8 \\
        --models nvidia/mit-b2 --config FILE.yaml
        real data, any model of AutoModelForSemanticSegmentation, settings from a file.

    accelerate launch examples/train_cps.py --config examples/configs/voc_cps_cutmix_r50.yaml --smoke
        a recipe at toy size on drawn data, to check in seconds that it runs; without `--smoke` and with `--data_root`,
        the recipe itself.

The same as `cps-hf train`: `--help` shows the main options, `--help-all` all of them. The default settings are for a
small demonstration and do not follow the paper's schedule.
"""

import sys

from cps_hf.commands.train import main

if __name__ == "__main__":
    main(sys.argv[1:])
