"""From images to class maps: whole images, sliding windows, scales, flips, ensembles; and ONNX files."""
