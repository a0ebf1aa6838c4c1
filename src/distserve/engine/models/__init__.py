"""Model families, one file each, in plain PyTorch; `base.build` finds the file that computes a spec."""
