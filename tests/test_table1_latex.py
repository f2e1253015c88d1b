"""The LaTeX form of Table 1."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from tracked_runs import Store, table1, three_seeds


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path)


def test_latex(store: Store) -> None:
    three_seeds(store)
    text = (table1(store, "--preset", "mnist") / "table1.tex").read_text()
    body = [line for line in text.splitlines() if not line.startswith("%")]
    assert r"degraded & $0.287$ &  &  & $0.287^\dagger$ &  &  & $438.59$ &  &  &  \\" in body
    direct = r"$0.142$ & $0.300 \pm 0.265$ & $+0.158$ & $0.757$ &  &  & $5.10$ &  &  "
    assert rf"direct & {direct}& $30.00 \pm 26.46$ \\" in body
    assert (
        r"\multicolumn{11}{l}{mnist, preset mnist, T = 20 (3 seeds, 10,000 test images)} \\" in body
    )
    columns = re.search(r"begin\{tabular\}\{(\w+)\}", text)
    assert columns is not None and len(columns[1]) == 11
    for line in body:
        if line.endswith(r"\\"):
            spans = [int(n) for n in re.findall(r"\\multicolumn\{(\d+)\}", line)]
            assert line.count("&") + 1 + sum(spans) - len(spans) == 11, line
    assert "".join(body).count("{") == "".join(body).count("}")
    assert re.search("^% mnist-seed2: seed 2", text, re.M)


def test_latex_escapes(store: Store) -> None:
    store.log(metrics={"direct/rmse": 0.1}, preset="my_50%&more#1")
    assert r"preset my\_50\%\&more\#1," in (table1(store) / "table1.tex").read_text()


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="needs pdflatex")
def test_latex_compiles(store: Store) -> None:
    three_seeds(store)
    store.log("odd", metrics={"direct/rmse": 0.1}, dataset="digits", preset="a_b{c}^~\\$")
    out = table1(store)
    document = r"\documentclass{article}\begin{document}\input{table1.tex}\end{document}"
    (out / "document.tex").write_text(document)
    command = ["pdflatex", "-halt-on-error", "-interaction=nonstopmode", "document.tex"]
    result = subprocess.run(command, cwd=out, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-2000:]
