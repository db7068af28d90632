"""Pictures of every page for a person to look at: wide and narrow, light and dark, in pieces that fit a screen.

    make screenshots
    python docs/screenshots.py --out shots --only nbs/07_ssd.html map.html"""

from __future__ import annotations

import sys
from itertools import product
from pathlib import Path

import tyro
from playwright.sync_api import Page
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))
from docs.browser import NARROW, SITE, WIDE, chromium, pages, served, settle

PIECE, HEADER = 3000, 64  # pixels of height; the header stays on top and covers the first of each piece


def picture(page: Page, address: str, size: dict[str, int], stem: Path) -> None:
    """Write STEM-PIECE.png for each piece of a page."""
    page.set_viewport_size(size)
    page.goto(address)
    settle(page)
    height = page.evaluate("document.documentElement.scrollHeight")
    page.set_viewport_size(size | {"height": min(height, PIECE)})
    for piece, top in enumerate(range(0, height - HEADER, PIECE - HEADER)):
        page.evaluate(f"window.scrollTo({{top: {top}, behavior: 'instant'}})")
        page.wait_for_timeout(100)
        page.screenshot(path=f"{stem}-{piece}.png")


def main(
    out: Path = SITE.parent / "screenshots",  # where the pictures go
    only: tuple[str, ...] = (),  # pages, as paths below the site's root; all of them when none is named
):
    """Write PAGE-WIDTH-MODE-PIECE.png for every page."""
    if unknown := set(only) - set(pages()):
        sys.exit(f"the site has no page {', '.join(sorted(unknown))}; make docs builds it")
    out.mkdir(parents=True, exist_ok=True)
    with served() as site, chromium() as browser:
        for size, mode in product((WIDE, NARROW), ("light", "dark")):
            page = browser.new_page(color_scheme=mode)
            for name in tqdm(only or pages(), desc=f"{size['width']} {mode}"):
                picture(
                    page,
                    site + name,
                    size,
                    out / f"{name.removesuffix('.html').replace('/', '_')}-{size['width']}-{mode}",
                )
            page.close()
    print(f"pictures in {out}")


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
