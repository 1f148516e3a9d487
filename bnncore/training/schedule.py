"""Learning rates over a training."""

from __future__ import annotations

import math
from dataclasses import replace

from bnncore.params import Recipe
from bnncore.training.jobs import History


def phase(recipe: Recipe, epoch: float) -> tuple[int, int]:
    """The part of a training that an epoch lies in: (its first epoch, how many it has)."""
    half = recipe.epochs // 2
    if not recipe.two_step:
        return 0, recipe.epochs
    return (0, half) if epoch + 1e-9 < half else (half, recipe.epochs - half)


def learning_rate(recipe: Recipe, history: History, done: float) -> float:
    """The learning rate when the fraction `done` of all steps has been taken."""
    if recipe.two_step:
        start, epochs = phase(recipe, done * recipe.epochs)
        half = replace(recipe, epochs=epochs, two_step=False)
        return learning_rate(half, [], (done * recipe.epochs - start) / epochs)
    if done * recipe.epochs < recipe.warmup:
        warm = done * recipe.epochs / recipe.warmup
        return warm * learning_rate(replace(recipe, warmup=0), history, done)
    if recipe.schedule == "poly":
        return recipe.lr * (1 - math.floor(done * recipe.epochs + 1e-9) / recipe.epochs)
    if recipe.schedule == "linear":
        return recipe.lr * (1 - done)
    if recipe.schedule == "cosine":
        return recipe.lr * 0.5 * (1 + math.cos(math.pi * done))
    if recipe.schedule == "plateau":
        rate, best, waited = recipe.lr, math.inf, 0
        for epoch in history:
            waited = 0 if epoch["val_loss"] < best else waited + 1
            best = min(best, epoch["val_loss"])
            if waited >= recipe.patience:
                rate, waited = rate * 0.1, 0
        return rate
    return recipe.lr
