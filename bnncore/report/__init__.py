"""The report of a run: one table, plots as PNG, and a page that needs nothing but a browser.

`results` is a list with one object a model::

    {"name", "scheme", "sharing", "members", "val_top1", "test_top1",   (top1 in percent)
     "file_bytes", "counted_kib", "images_compared", "images_different", "max_logit_difference"}

and, where known, ``kind`` ("fp32", "bnn" or "ensemble"), ``backbone``, ``width``, ``fp32_ratio``
(bytes of the FP32 file over bytes of this one), ``disagreement``, ``ece``. `histories` is
``{model: [{"epoch", "train_loss", "train_top1", "val_loss", "val_top1"}, ...]}`` and `anytime`
``{model: [{"members", "top1", "mean_members"}, ...]}``, accuracy by the members evaluated.
`confusion` is ``{"classes": [...], "models": {model: [[images of one class taken for each]]}}``
of the test images, `about` what was evaluated: ``{"dataset", "image", "classes", "images",
"chance_top1", "date", "commit", "seed", "params"}``, `samples` test images for the page, from
`live.samples`. A value that is not known is missing or None.

    python -m bnncore.report --html          # reports/index.html from what `write` left there

Nothing here imports torch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bnncore.report import plots, table
from bnncore.report.table import Histories, Row, complete

__all__ = ["complete", "write"]


def write(
    results: Sequence[Row],
    histories: Histories,
    out_dir: Path | str,
    anytime: Histories | None = None,
    confusion: Mapping[str, Any] | None = None,
    about: Row | None = None,
    samples: Row | None = None,
) -> list[Path]:
    """Writes the tables and plots into out_dir; returns their paths.

    results.json, histories.json, table.md, table.csv, accuracy_bytes.png, accuracy_members.png,
    curves.png; anytime.json and anytime.png, confusion.json, about.json and samples.json of what is
    not None.
    """
    out = Path(out_dir)
    out.mkdir(parents=True, exist_ok=True)
    rows = complete(results)
    data = {"results": rows, "histories": histories, "anytime": anytime, "confusion": confusion}
    data |= {"about": about, "samples": samples}
    written = []
    for name, content in data.items():
        if content is not None:
            text = json.dumps(table.plain(content), indent=1, ensure_ascii=False, allow_nan=False)
            written.append(out / f"{name}.json")
            written[-1].write_text(text + "\n", encoding="utf-8")
    (out / "table.md").write_text(table.markdown(rows), encoding="utf-8")
    table.write_csv(rows, out / "table.csv")
    plots.accuracy_bytes(rows, out / "accuracy_bytes.png")
    plots.accuracy_members(rows, out / "accuracy_members.png")
    plots.curves(histories, out / "curves.png")
    names = ["table.md", "table.csv", "accuracy_bytes.png", "accuracy_members.png", "curves.png"]
    if anytime is not None:
        plots.anytime(anytime, out / "anytime.png")
        names.append("anytime.png")
    return [*written, *(out / name for name in names)]
