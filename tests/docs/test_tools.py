"""What the pages are made with: docstrings as Markdown, and links that follow files into the site."""

from __future__ import annotations

import inspect

import pytest

import elle_fast
from docs.tools import picture

pytest.importorskip("mkdocs")

from docs.tools import hooks
from docs.tools.docstrings import markdown


def test_roles_become_links_that_need_no_target():
    text = markdown(
        "See :func:`outcomes`, :class:`~elle_fast.AdaptiveLambda` and :meth:`frozen\n<elle_fast.X.frozen>`.", "a.b"
    )
    assert '<autoref identifier="a.b.outcomes" optional><code>outcomes</code></autoref>' in text
    assert '<autoref identifier="elle_fast.AdaptiveLambda" optional><code>AdaptiveLambda</code></autoref>' in text
    assert '<autoref identifier="elle_fast.X.frozen" optional><code>frozen</code></autoref>' in text


def test_formulas_become_mathml_with_words_upright():
    text = markdown(".. math::\n    loss = \\frac{a}{2} \\cdot lam\n\nAfter.", "a")
    assert text.count("<math") == 1
    assert "<mfrac>" in text
    assert text.count('<mi mathvariant="normal">') == len("loss") + len("lam")
    assert "<mi>a</mi>" in text
    assert text.endswith("After.")


def test_a_literal_block_becomes_python():
    text = markdown("Example::\n\n    loss = criterion(model, x, y)\n    loss.backward()\n\nAfter.", "a")
    assert text == "Example:\n\n```python\nloss = criterion(model, x, y)\nloss.backward()\n```\n\nAfter."


@pytest.mark.parametrize("name", [name for name in elle_fast.__all__ if isinstance(getattr(elle_fast, name), type)])
def test_nothing_of_restructured_text_is_left_of_the_public_classes(name):
    text = markdown(inspect.cleandoc(getattr(elle_fast, name).__doc__), "elle_fast")
    assert not [left for left in (".. math", ":class:", ":func:", ":meth:", "::\n") if left in text]


def test_links_follow_files_into_the_site():
    folder = picture.ROOT / "docs" / "guides"
    text = (
        "[a](../../benchmarks/results/bench_train.json) [b](../../CONTRIBUTING.md#floors) [c](lam.md) [d](https://x.y)"
    )
    assert hooks._on_the_site(text, folder, "guides/page.md") == (
        "[a](../files/benchmarks/results/bench_train.json) [b](../development/contributing.md#floors) "
        "[c](lam.md) [d](https://x.y)"
    )
    assert hooks._on_the_site("[a](docs/guides/lam.md)", picture.ROOT, "index.md") == "[a](guides/lam.md)"


def test_a_picture_follows_the_switch_of_the_theme():
    text = (
        '<picture>\n  <source media="(x)" srcset="../assets/d.svg">\n  <img alt="A" src="../assets/l.svg">\n</picture>'
    )
    shown = hooks._on_the_site(text, picture.ROOT / "docs" / "how", "how/page.md")
    assert shown == "![A](../assets/l.svg#only-light)\n![A](../assets/d.svg#only-dark)"
