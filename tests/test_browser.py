"""`fastcgi dev` as a developer sees it: in a real browser, headless Chromium."""
import re
from contextlib import contextmanager

import pytest
from frontends.servers import wait_until, which
from helpers import HERE, Program

EXAMPLES = HERE.parent / "examples"
BROKEN = """from fastcgi import *
def price(basket):
    return basket["<b>sum</b>"]
@fastcgi()
def app():
    price({"sum": "<script>document.title = 'taken over'</script>"})
"""
MENDED = """from fastcgi import *
@fastcgi()
def app(): print("Content-Type: text/html\\n\\n<title>mended</title><p>It works.")
"""

pytestmark = [pytest.mark.frontend, pytest.mark.slow]


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    from selenium import webdriver
    options = webdriver.ChromeOptions()
    options.binary_location = which("chromium")
    for o in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
              "--disable-background-networking", "--disable-component-update", "--disable-sync",
              "--disable-dev-shm-usage", f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"):
        options.add_argument(o)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(which("chromedriver")))
    driver.set_page_load_timeout(30)
    yield driver
    driver.quit()


@contextmanager
def dev(file):
    "The URL at which `fastcgi dev` shows the file."
    with Program("-m", "fastcgi", "dev", file, "--port", "0") as program:
        url = wait_until(lambda: re.search(r" is at (http://\S+/)", program.said()), "it serves", 20)[1]
        yield url
        program.stop()


def see(browser, what, seconds=20):
    "Wait until the page says `what`."
    def text():
        from selenium.common.exceptions import WebDriverException
        try: found = browser.find_element("tag name", "body").text
        except WebDriverException: return ""  # it is on its way to another page
        return found if what in found else ""
    return wait_until(text, f"{what!r} is shown", seconds)


def complaints(browser, but=""):
    "What the console says, besides the status of the page that is asked for."
    said = [o["message"] for o in browser.get_log("browser") if o["level"] == "SEVERE"]
    return [o for o in said if not but or but not in o]


def test_an_exception_is_shown_and_the_mended_file_comes_by_itself(browser, tmp_path):
    file = tmp_path / "app.py"
    file.write_text(BROKEN)
    with dev(file) as url:
        browser.get(url + "shop?item=%3Cimg%20src=x%20onerror=alert(1)%3E")
        text = see(browser, "KeyError")
        assert browser.title == "KeyError: '<b>sum</b>'"  # escaped, and no script of a value has run
        assert "GET /shop?item=%3Cimg%20src=x%20onerror=alert(1)%3E" in text
        here = browser.find_elements("css selector", ".here")
        assert [o.text.split(None, 1)[1] for o in here] == \
            ['''price({"sum": "<script>document.title = 'taken over'</script>"})''', 'return basket["<b>sum</b>"]']
        assert not browser.find_elements("css selector", "td img, pre b, td b, pre script")
        browser.find_elements("css selector", "summary")[-1].click()
        assert "basket {'sum': \"<script>document.title" in see(browser, "basket")
        assert "QUERY_STRING" in text and "Traceback (most recent call last)" in text
        assert not complaints(browser, "500 (Internal Server Error)")
        file.write_text(MENDED)
        see(browser, "It works.")
        assert browser.title == "mended" and not complaints(browser)


def test_a_file_that_does_not_run_is_shown_too(browser, tmp_path):
    file = tmp_path / "app.py"
    file.write_text("from fastcgi import *\ndef app(:\n")
    with dev(file) as url:
        browser.get(url)
        assert "SyntaxError" in see(browser, "def app(:")
        assert not complaints(browser, "502 (Bad Gateway)")
        file.write_text(MENDED)
        see(browser, "It works.")


def test_the_upload_form_shows_its_progress(browser, tmp_path):
    (tmp_path / "large.bin").write_bytes(bytes(8 << 20))
    with dev(EXAMPLES / "hello.py") as url:
        browser.get(url + "upload")
        bar = browser.find_element("tag name", "progress")
        assert not bar.is_displayed()
        browser.execute_script("""const bar = arguments[0];
            window.seen = [];
            const look = new MutationObserver(() => window.seen.push([bar.hidden, bar.value, bar.max]));
            look.observe(bar, {attributes: true});""", bar)
        browser.find_element("css selector", "input[type=file]").send_keys(str(tmp_path / "large.bin"))
        browser.find_element("css selector", "button").click()
        assert "large.bin 8388608" in see(browser, "SHA-256")
        seen = browser.execute_script("return window.seen")
        assert seen and not seen[-1][0] and seen[-1][2] > 8 << 20 and seen[-1][1] == seen[-1][2]
        browser.find_element("css selector", "input[type=file]").send_keys(str(EXAMPLES / "hello.py"))
        browser.find_element("css selector", "button").click()  # the form that came with the answer works as well
        see(browser, "hello.py")
        assert not complaints(browser)


def test_the_form_greets(browser):
    with dev(EXAMPLES / "hello.py") as url:
        browser.get(url)
        browser.find_element("name", "name").send_keys("Zoë <b>")
        browser.find_element("css selector", "button").click()
        see(browser, "Hello, Zoë <b>!")
        assert not complaints(browser)
