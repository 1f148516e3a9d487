"""Networks: binary layers, backbones, ensembles. Knows torch, not how they are trained."""
