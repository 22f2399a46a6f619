"""What MkDocs does besides: the rooms laid out as the one package that is installed, pages that mkdocs.yml does not
name, links to files outside docs/."""
from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
CARD = "model_card.md"  # the bundled model's, which lives beside the model
LINK = re.compile(r"\[([^\]]+)\]\(((?:\.\./)+)([^)#\s]+)(#[^)\s]*)?\)")


@event_priority(100)  # before mkdocstrings looks for the sources
def on_config(config: Any) -> Any:
    _lay_out_package()
    named = set(re.findall(r"[\w/]+\.md", str(config.nav)))
    rest = [page for page in sorted((ROOT / "docs").glob("*.md")) if page.name not in named]
    guides = [{_title(page): page.name} for page in rest] + [{"Model card": CARD}]
    config.nav.append({"Guides": guides})
    return config


def on_files(files: Files, config: Any) -> Files:
    card = (ROOT / "models" / "bundled" / "MODEL_CARD.md").read_text(encoding="utf-8")
    files.append(File.generated(config, CARD, content=card))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Links to sources become their names; the model card is a page of the site."""
    folder = (ROOT / "docs" / page.file.src_uri).parent

    def replaced(match: re.Match[str]) -> str:
        target = (folder / match[2] / match[3]).resolve()
        if target.name == "MODEL_CARD.md":
            return f"[{match[1]}]({CARD})"
        return match[0] if (ROOT / "docs") in target.parents else f"{match[1]} (`{target.relative_to(ROOT)}`)"

    return LINK.sub(replaced, markdown)


def _lay_out_package() -> None:
    """Sources under build/docs_package as pyproject.toml maps them: the reference is read from them, not imported."""
    folders = dict(re.findall(r'^"(edge_runtime[\w.]*)" = "([\w/]+)"', (ROOT / "pyproject.toml").read_text(), re.M))
    target = ROOT / "build" / "docs_package"
    shutil.rmtree(target, ignore_errors=True)
    for name, folder in sorted(folders.items()):
        place = target.joinpath(*name.split("."))
        for source in (ROOT / folder).rglob("*.py"):
            copy = place / source.relative_to(ROOT / folder)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, copy)


def _title(page: Path) -> str:
    found = re.search(r"^# (.+)$", page.read_text(encoding="utf-8"), re.M)
    return found[1] if found else page.stem
