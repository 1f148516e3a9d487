"""``${scaled:400}`` in a preset: 400 epochs times ``scale.epochs``, rounded, at least 1.

Hydra finds modules of the namespace ``hydra_plugins`` below the folder that DVC's option
``hydra.plugins_path`` names; `pipeline.preset` names the same folder.
"""

from omegaconf import DictConfig, OmegaConf


def scaled(epochs: int, *, _root_: DictConfig) -> int:
    """`epochs` as ``scale.epochs`` shortens them."""
    factor = _root_.scale.epochs
    if not factor > 0:
        raise ValueError(f"scale.epochs: expected a number above 0, got {factor}")
    return max(1, round(epochs * factor))


OmegaConf.register_new_resolver("scaled", scaled, replace=True)
