"""Makes the docs site of what stands in the repository: pages outside docs, links to sources, the reference.

A path here is as from the repository's root, with "/".
"""

from __future__ import annotations

import logging
import posixpath
from pathlib import Path
from urllib.parse import unquote, urlsplit
from xml.etree import ElementTree

import nbconvert
from markdown import Markdown
from markdown.extensions import Extension
from markdown.treeprocessors import Treeprocessor
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from reference import commands_page, python_page

import fq
import fq_kernels

# Pages that are not in docs. Each stands in the site where it does in the repository, and docs at its root.
OUTSIDE = (
    "README.md",
    "CONTRIBUTING.md",
    "RELEASING.md",
    "CHANGELOG.md",
    "bench/README.md",
    "bench/peers/README.md",
)
# What pages may link to that is no page: copied.
COPIED = ("model/fq/data/*schema.json",)

# Its warnings make a strict build fail.
log = logging.getLogger("mkdocs.plugins.fq")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    config.markdown_extensions.append(Links(config))
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    root = root_of(config)
    for path in outside(root):
        files.append(File.generated(config, path, abs_src_path=str(root / path)))
    for file in list(files):
        if file.src_uri.endswith(".ipynb"):
            add_notebook(file, files, config)
    files.append(File.generated(config, "reference/commands.md", content=commands_page()))
    for module in (fq, fq_kernels):
        page = f"reference/{module.__name__}.md"
        files.append(File.generated(config, page, content=python_page(module)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> None:
    links = next(e for e in config.markdown_extensions if isinstance(e, Links))
    links.page, links.files = page, files


def add_notebook(file: File, files: Files, config: MkDocsConfig) -> None:
    """A page of the notebook as it was run, beside the file itself."""
    folder, name = posixpath.split(file.src_uri)
    stem = name.removesuffix(".ipynb")
    resources = {"unique_key": stem, "output_files_dir": f"{stem}_files"}
    body, made = nbconvert.MarkdownExporter().from_filename(str(file.abs_src_path), resources)
    body = body.replace('<table border="1" class="dataframe">', "<table>")  # pandas': as other tables
    body += f'\n\n<a href="{name}" download>{name}</a>: this page, to be run\n'
    files.append(File.generated(config, page_of(file.src_uri), content=body))
    for output, data in made["outputs"].items():
        files.append(File.generated(config, posixpath.join(folder, output), content=data))


def page_of(uri: str) -> str:
    return uri.removesuffix(".ipynb") + ".md" if uri.endswith(".ipynb") else uri


def outside(root: Path) -> list[str]:
    copied = [path.relative_to(root).as_posix() for pattern in COPIED for path in root.glob(pattern)]
    return [path for path in OUTSIDE if (root / path).exists()] + copied


def root_of(config: MkDocsConfig) -> Path:
    return Path(config.config_file_path).parent


class Links(Extension):
    """Links as they hold in the repository, made to hold in the site."""

    page: Page
    files: Files

    def __init__(self, config: MkDocsConfig):
        super().__init__()
        self.root = root_of(config)
        self.outside = set(outside(self.root))
        self.docs = Path(config.docs_dir).relative_to(self.root).as_posix()

    def extendMarkdown(self, md: Markdown) -> None:
        # after the inline patterns, which make links, and before MkDocs reads them
        md.treeprocessors.register(LinkTree(md, self), "fq links", 8)

    def rewrite(self, element: ElementTree.Element, attribute: str) -> None:
        url = urlsplit(element.get(attribute, ""))
        if url.scheme or url.netloc or not url.path:
            return
        here = self.in_repository(self.page.file)
        there = posixpath.normpath(posixpath.join(posixpath.dirname(here), unquote(url.path)))
        uri = self.in_site(there)
        if uri is not None:
            path = posixpath.relpath(uri, posixpath.dirname(self.page.file.src_uri) or ".")
            element.set(attribute, url._replace(path=path).geturl())
        elif not there.startswith("..") and (self.root / there).exists():
            as_code(element, there)
        else:
            log.warning(f"{here} links to {url.path}: there is no {there}")
            element.tag = "span"  # MkDocs would look for it elsewhere
            element.attrib.clear()

    def in_repository(self, file: File) -> str:
        return file.src_uri if file.src_uri in self.outside else f"{self.docs}/{file.src_uri}"

    def in_site(self, path: str) -> str | None:
        """The source of the site's page or file; None if the site has none."""
        for uri in (path, posixpath.join(path, "README.md")):
            if uri in self.outside:
                return uri
        uri = page_of(path.removeprefix(f"{self.docs}/"))
        inside = path.startswith(f"{self.docs}/") and uri not in self.outside
        return uri if inside and self.files.get_file_from_path(uri) else None


class LinkTree(Treeprocessor):
    def __init__(self, md: Markdown, links: Links):
        super().__init__(md)
        self.links = links

    def run(self, root: ElementTree.Element) -> None:
        for element in list(root.iter()):
            for tag, attribute in (("a", "href"), ("img", "src")):
                if element.tag == tag and attribute in element.attrib:
                    self.links.rewrite(element, attribute)


def as_code(element: ElementTree.Element, path: str) -> None:
    """The path, which has no address, after the link's words or in their place if they are but its end."""
    words = "".join(element.itertext()).rstrip("/")
    tail = element.tail
    if path.endswith(words):
        element.clear()
        element.tag, element.text = "code", path
    else:
        element.tag = "span"
        element.attrib.clear()
        last = element[-1] if len(element) else None
        if last is None:
            element.text = f"{element.text or ''} ("
        else:
            last.tail = f"{last.tail or ''} ("
        shown = ElementTree.SubElement(element, "code")
        shown.text, shown.tail = path, ")"
    element.tail = tail
