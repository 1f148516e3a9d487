"""Ensembles of binarized neural networks: train, share, count, pack, evaluate."""
