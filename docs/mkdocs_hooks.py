"""Show the figures in recipes/results on the pages, without a copy in docs/.

The pages link to them as `../recipes/results/...`, which is right where the pages are read in the repository. The site
has no folder above its own: there the same files are served from `recipes/results/`.
"""

from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

FIGURES = "recipes/results/"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pictures to the files of the site."""
    root = Path(config.config_file_path).parent
    for path in sorted((root / FIGURES).rglob("*")):
        if path.suffix in (".png", ".svg"):
            name = path.relative_to(root).as_posix()
            files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, **_: object) -> str:
    """Point the links of a page at where the site has the pictures."""
    return markdown.replace(f"](../{FIGURES}", f"]({FIGURES}")
