"""The picture that the README opens with: three panels of the page that `make demo` makes, in headless Chromium.

python bench/picture.py runs/demo/run/report.html docs/images/report.png
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

STYLE = """
nav, .heading, .end, .sources, #rows-0 .soft, #rows-0 .more, #rows-0 button, .panel:not(#trust-0):not(#rows-0):not(#map-0),
#trust-0 > :not(h3):not(.verdicts), #map-0 > .controls:not(.quadrants), #map-0 > .numbers, #map-0 > p:not(.status), #map-0 > button { display: none !important; }
.subject { display: grid; grid-template-columns: 46fr 54fr; gap: 0 1rem; align-items: start; }
main, header.top { max-width: 1360px !important; } .panel { margin: .5rem 0; }
#trust-0 { grid-column: 1 / -1; order: 0; } #rows-0 { order: 1; } #map-0 { order: 2; }
"""


def main() -> None:
    from playwright.sync_api import sync_playwright

    page_file, picture = Path(sys.argv[1]).resolve(), Path(sys.argv[2])
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1360, "height": 1000})
        page.goto(page_file.as_uri())
        page.wait_for_selector("html[data-ready=yes]", state="attached")
        page.click(".quadrants button:has-text('only the first')")
        page.wait_for_selector("#map-0 .list .heat")
        page.add_style_tag(content=STYLE)
        page.evaluate("scrollTo(0, 0)")
        page.wait_for_timeout(500)
        page.screenshot(path=picture, clip={"x": 0, "y": 0, "width": 1360, "height": 890})
        browser.close()


if __name__ == "__main__":
    main()
