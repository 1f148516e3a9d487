"""The packed side stands alone: it runs where nothing that trains is installed, torch first."""

import subprocess
import sys
import textwrap

from bnncore.packed import packfile
from tests.packed.test_execute import ensemble

ABSENT = (
    *("torch", "torchvision", "ray", "mlflow", "optuna", "dvc", "pydantic", "yaml"),
    *("sklearn", "scipy", "pandas"),
)


def test_all_of_it_runs_where_nothing_else_is_installed(tmp_path):
    """A process of its own, in which the others cannot be imported."""
    path = tmp_path / "net.bnn"
    packfile.save(ensemble(2, "hard_vote"), path)
    script = f"""
        import importlib, pkgutil, sys

        class Absent:
            def find_spec(self, name, path=None, target=None):
                if name.partition(".")[0] in {ABSENT!r}:
                    raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

        sys.meta_path.insert(0, Absent())
        import numpy as np
        import bnncore, bnncore.packed
        names = [module.name for module in pkgutil.walk_packages(bnncore.packed.__path__)]
        modules = {{name: importlib.import_module(f"bnncore.packed.{{name}}") for name in names}}
        assert {{"execute", "packfile", "narrow", "compiled_kernels"}} <= modules.keys()
        from bnncore import __main__, metrics
        images = np.zeros((3, 8, 6, 3), np.uint8)
        for ops in ("numpy", "compiled"):
            model = bnncore.load({str(path)!r}, ops=ops, threads=2)
            labels = model.predict(images)
            model.anytime(images)
            modules["exits"].curve(model, images, labels)
            metrics.accuracy(labels, labels)
        modules["packfile"].save(model.program, {str(tmp_path / "copy.bnn")!r})
        assert __main__.main(["inspect", {str(path)!r}]) == 0
        assert __main__.main(["bench", {str(path)!r}, "--batch", "2", "--repeats", "1"]) == 0
        assert not set({ABSENT!r}) & sys.modules.keys()
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "copy.bnn").read_bytes() == path.read_bytes()
