"""What the browser tests do with JupyterLab."""

import json
import re
import time
from http.cookiejar import CookieJar
from urllib.error import HTTPError
from urllib.request import HTTPCookieProcessor, Request, build_opener, urlopen


def wait(page, true, seconds, what, every=200):
    "Until it is true, looking `every` so many milliseconds."
    end = time.time() + seconds
    while not true():
        assert time.time() < end, f"{what} after {seconds} s"
        page.wait_for_timeout(every)


def visitor(url):
    "An opener with the cookies of somebody who has seen the lab. The server gives no token."
    jar = CookieJar()
    opener = build_opener(HTTPCookieProcessor(jar))
    opener.open(f"{url}/lab").close()
    (secret,) = (cookie.value for cookie in jar if cookie.name == "_xsrf")
    opener.addheaders = [("X-XSRFToken", secret)]
    return opener


def listed(url, what):
    "What the server has of `sessions` or `kernels`."
    with urlopen(f"{url}/api/{what}") as answer:
        return json.load(answer)


def leave(page, url):
    """Close the page's notebook and shut its kernel down: each kernel takes hundreds of megabytes.

    The page goes first, or it would start the kernel anew."""
    page.goto("about:blank")
    opener = visitor(url)
    for what in ("sessions", "kernels"):  # with a session goes its kernel; then those without one
        for one in listed(url, what):
            try:
                opener.open(Request(f"{url}/api/{what}/{one['id']}", method="DELETE")).close()
            except HTTPError as e:
                if e.code not in (404, 410):  # gone already; 410: of a session, the kernel only
                    raise


def run_all(page, url, name):
    "Open the notebook and run all of its cells."
    page.goto(f"{url}/lab/tree/{name}?reset")
    idle = page.locator("#jp-main-statusbar", has_text="| Idle")
    error = page.locator('[data-mime-type="application/vnd.jupyter.error"]')

    def prompts():
        return "".join(page.locator(".jp-CodeCell .jp-InputPrompt").all_inner_texts())

    for _ in range(5):  # a kernel that is still connecting drops what it was asked to run
        idle.wait_for()
        page.get_by_role("menuitem", name="Run", exact=True).click()
        page.locator('.lm-Menu-item[data-command="runmenu:run-all"]').click()
        page.wait_for_timeout(2000)
        wait(page, lambda: "*" not in prompts() or error.count(), 300, "cells still running")
        if re.search(r"\d", prompts()):
            break
    assert error.count() == 0, "a cell raised an error"
    assert "[ ]" not in prompts(), "not all cells have run"
