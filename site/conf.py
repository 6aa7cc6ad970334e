"""The site's settings for Sphinx. `make site` gathers the pages (gather.py), then builds them."""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from nav import settings  # noqa: E402

info = settings()
project, author, copyright = info["title"], info["author"], info["copyright"]
version = release = info["version"]

extensions = ["myst_nb", "sphinx_copybutton", "hover", "order"]
exclude_patterns = ["order.json"]

# The notebooks are shown as they are stored. Nothing is run.
nb_execution_mode = "off"
nb_ipywidgets_js = {}                      # would come from another server
nb_merge_streams = True
nb_number_source_lines = False
myst_enable_extensions = ["dollarmath", "amsmath", "attrs_inline", "attrs_block", "fieldlist"]
myst_enable_extensions += ["colon_fence"]
myst_heading_anchors = 4
suppress_warnings = ["mystnb.unknown_mime_type"]

# Formulas: one file, with its letters in it, laid into the site when it is built.
mathjax_path = "mathjax/tex-svg.js"
mathjax_loading_method = "defer"

# The reference: one parameter a line where they are many.
add_module_names = False
nitpicky = True                            # a lesson's link to the reference leads somewhere,
nitpick_ignore_regex = [("py:(class|exc|data|attr|func|meth|mod)", ".*")]  # types may be torch's
python_maximum_signature_line_length = 60

html_theme = "sphinx_book_theme"
html_title = info["title"]
html_baseurl = info["doc_host"] + info["doc_baseurl"] + "/"
html_static_path = ["static"]
html_extra_path = [str(HERE.parent / "build/site/extra")]   # the live page, MathJax's licence
html_css_files, html_js_files = ["site.css"], ["site.js"]
html_copy_source = html_show_sourcelink = False
html_last_updated_fmt = None
html_context = dict(default_mode="auto")   # dark or light, as the visitor's machine
copybutton_selector = "div.highlight pre, .lab pre"
copybutton_exclude = ".linenos, .gp, .go"
html_theme_options = dict(
    repository_url=info["git_url"],
    repository_branch=info["branch"],
    use_repository_button=True,
    use_download_button=False,
    use_fullscreen_button=False,
    navbar_persistent=[],                  # the search stands in the sidebar
    home_page_in_toc=False,
    collapse_navbar=True,                  # the pages of one chapter are shown at a time
    show_navbar_depth=1,
    max_navbar_depth=4,
    show_toc_level=2,
    pygments_light_style="a11y-light",
    pygments_dark_style="a11y-dark",
)
