"""What documentation points to exists."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    path
    for pattern in ("*.md", "docs/*.md", "experiments/**/*.md", "tests/**/*.md")
    for path in ROOT.glob(pattern)
    if not any(part.startswith(".") for part in path.relative_to(ROOT).parts)
)
# A path in backticks that begins in a package and ends with a name of a file, perhaps of several by *.
_CODE = re.compile(r"`((?:qwen_jax|train|convert|experiments|tests|docs)/[\w./*-]+\.(?:py|md|sh|png|json))[^`]*`")
_LINK = re.compile(r"\]\(([^)#:]+)(#[^)]*)?\)")


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_paths_and_links_exist(page: Path) -> None:
    """Files named in backticks from the root, and relative links with their headings."""
    text = page.read_text(encoding="utf-8")
    for name in _CODE.findall(text):
        assert any(ROOT.glob(name)), f"{page} names {name}, which does not exist"
    for target, anchor in _LINK.findall(text):
        file = page.parent / target
        assert file.exists(), f"{page} links to {target}, which does not exist"
        if anchor and file.suffix == ".md":
            headings = re.findall(r"^#+ (.+)$", file.read_text(encoding="utf-8"), flags=re.MULTILINE)
            slugs = {re.sub(r"[^\w -]", "", heading).strip().lower().replace(" ", "-") for heading in headings}
            assert anchor[1:] in slugs, f"{page} links to {target}{anchor}, which has no such heading"


def test_commands_of_modules_exist() -> None:
    """Each `python -m package.module` in a page is a module."""
    for page in PAGES:
        for module in re.findall(
            r"python3? -m ((?:experiments|qwen_jax|train|convert)[\w.]*)", page.read_text("utf-8")
        ):
            file = ROOT / (module.replace(".", "/") + ".py")
            assert file.exists() or (file.with_suffix("") / "__main__.py").exists(), f"{page}: no module {module}"


def test_commands_of_qwen_jax_exist() -> None:
    """Each `qwen-jax NAME` at the beginning of a line in a page is a command."""
    from qwen_jax.cli import _COMMANDS, _name

    for page in PAGES:
        for line in re.findall(r"^qwen-jax ([a-z][^\n#]*)", page.read_text("utf-8"), flags=re.MULTILINE):
            # A choice such as passkey|needle stands for its first word.
            words = [word.split("|")[0] for word in line.split()]
            assert _name(words) in _COMMANDS, f"{page}: no command in {line!r}"
