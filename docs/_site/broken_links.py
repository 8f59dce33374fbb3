"""Holds a built site to what a browser would find: python docs/_site/broken_links.py SITE

MkDocs looks at the links of Markdown alone. Here it is all of the HTML, the theme's and what was raw, too:
what is linked to must be there, with its fragment, and nothing may be loaded from another host.
"""

from __future__ import annotations

import posixpath
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

LOADED = {"script", "img", "link", "iframe", "source", "video", "audio", "object", "embed", "image", "use"}
FROM_ELSEWHERE = re.compile(rb"(?:url\(|@import)\s*[\"']?\s*((?:https?:)?//[^\"')\s]+)")


class Page(HTMLParser):
    """The ids of a page, what it links to and what it loads."""

    def __init__(self, text: str):
        super().__init__()
        self.ids = {"", "top"}
        self.links: set[tuple[str, str]] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name == "id" or (name == "name" and tag == "a"):
                self.ids.add(value or "")
            elif name in ("href", "src", "data", "poster", "xlink:href") and value:
                self.links.add((tag, value))


def problems(site: Path) -> list[str]:
    files = {p.relative_to(site).as_posix(): p for p in site.rglob("*") if p.is_file()}
    pages = {name: Page(path.read_text("utf-8")) for name, path in files.items() if path.suffix == ".html"}
    found = []
    for name, page in sorted(pages.items()):
        for tag, link in sorted(page.links):
            url = urlsplit(link)
            if url.scheme == "data":
                continue
            if url.scheme or url.netloc:
                if tag in LOADED:
                    found.append(f"{name} loads {link}")
                continue
            # the page of errors stands at no place of its own, and names all from the site's root
            folder = "" if name == "404.html" else posixpath.dirname(name)
            path = (
                posixpath.normpath(posixpath.join(folder, unquote(url.path).lstrip("/")))
                if url.path
                else name
            )
            if path == "." or (site / path).is_dir():
                path = posixpath.normpath(posixpath.join(path, "index.html"))
            if path not in files:
                found.append(f"{name} links to {link}, which is not there")
            elif path in pages and unquote(url.fragment) not in pages[path].ids:
                found.append(f"{name} links to {link}: no such fragment")
    for name, file in sorted(files.items()):
        if file.suffix in (".css", ".html"):
            found += [f"{name} loads {u.decode()}" for u in FROM_ELSEWHERE.findall(file.read_bytes())]
    return found


if __name__ == "__main__":
    found = problems(Path(sys.argv[1]))
    print("\n".join(found) or "every link leads somewhere")
    sys.exit(bool(found))
