"""The report in a real browser, at the width of a phone and of a desk."""

import shutil

import pytest

from adamerge_jax.report.page import write_page
from tests.report.saved_runs import ALL, write_run

playwright = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")

FLAGS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
]

OVERFLOWING = """
[...document.querySelectorAll("body *")].filter(
    (own) => !own.closest(".scroll, pre") && own.getBoundingClientRect().right > innerWidth + 1
).map((own) => own.outerHTML.slice(0, 80))
"""


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_it_opens_without_errors_and_fits(tmp_path):
    file = write_page(write_run(tmp_path, *ALL, keep_from_base=["*.bias"]))
    with playwright.sync_playwright() as running:
        browser = running.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        for width in (390, 1280):
            page = browser.new_page(viewport={"width": width, "height": 844})
            said, asked = [], []
            page.on("console", lambda message, said=said: said.append(message.text))
            page.on("pageerror", lambda error, said=said: said.append(str(error)))
            page.on("request", lambda request, asked=asked: asked.append(request.url))
            page.goto(file.as_uri())
            page.evaluate("document.querySelectorAll('details').forEach((own) => own.open = true)")
            assert said == []
            assert [url for url in asked if not url.startswith("data:")] == [file.as_uri()]
            assert page.evaluate("document.documentElement.scrollWidth") == width
            assert page.evaluate(OVERFLOWING) == []
            widths = page.evaluate("[...document.images].map((own) => own.naturalWidth)")
            assert len(widths) == 5
            assert min(widths) > 100
            assert page.evaluate("document.images[0].getBoundingClientRect().width") > 200
            if width == 1280:
                table = page.locator("table.results").first
                table.locator("thead button").nth(1).click()
                methods = table.locator("tbody th").all_inner_texts()
                assert methods[0].startswith("experts") and methods[-1] == "base"
        browser.close()
