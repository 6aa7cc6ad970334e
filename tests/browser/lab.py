"""What the browser tests do with JupyterLab."""

import re
import time


def wait(page, true, seconds, what, every=200):
    "Until it is true, looking `every` so many milliseconds."
    end = time.time() + seconds
    while not true():
        assert time.time() < end, f"{what} after {seconds} s"
        page.wait_for_timeout(every)


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
