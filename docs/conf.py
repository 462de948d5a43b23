"""The site's configuration; what is made of notebooks, docstrings and studies is in ``site_builder``.

make docs          build into docs/_build/html
make docs-serve    build, and show it
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

project = "The Craft of Training"
author = "The Craft of Training contributors"
copyright = "prose and figures CC BY 4.0, code MIT"
language = "en"

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "site_builder",
]
exclude_patterns = ["_build", "site_builder", "frames", "README.md"]

# Notebooks are shown as they were stored
nb_execution_mode = "off"
nb_output_stderr = "remove"
nb_merge_streams = True
nb_code_prompt_show = "Show the code"
nb_code_prompt_hide = "Hide the code"
nb_number_source_lines = False
myst_enable_extensions = ["dollarmath", "amsmath", "colon_fence", "deflist", "fieldlist", "smartquotes"]
myst_dmath_double_inline = True
myst_heading_anchors = 3
myst_links_external_new_tab = False

# Formulas are set when the site is built, so no page needs a script for them
html_math_renderer = "katex"

html_theme = "furo"
html_title = project
html_static_path = ["_static"]
html_extra_path = ["_build/made"]  # pictures and frames out of the notebooks, written by site_builder
html_css_files = ["katex/katex.min.css", "course.css", "explorer.css"]
html_js_files = [("course.js", {"defer": "defer"}), ("explorer.js", {"defer": "defer"})]
html_show_sphinx = False
html_copy_source = False
html_show_sourcelink = False
html_favicon = "_static/favicon.svg"
html_theme_options = {
    "light_css_variables": {
        "color-brand-primary": "#0b5c94",
        "color-brand-content": "#0b5c94",
        "color-ok": "#1a7f37",
        "color-wrong": "#b42318",
    },
    "dark_css_variables": {
        "color-brand-primary": "#7cc4f4",
        "color-brand-content": "#7cc4f4",
        "color-ok": "#57c974",
        "color-wrong": "#ff8f80",
    },
    "navigation_with_keys": True,
    "top_of_page_buttons": [],
}
pygments_style = "a11y-high-contrast-light"
pygments_dark_style = "a11y-high-contrast-dark"

copybutton_exclude = ".linenos, .gp, .go"

# The reference of course_lib (site_builder/api.py): signatures come from the source, docstrings are converted there
nitpicky = True
autodoc_member_order = "bysource"
autodoc_inherit_docstrings = False
autodoc_typehints_format = "short"
python_maximum_signature_line_length = 110  # with full names of types, of which less is shown
toc_object_entries_show_parents = "hide"
nitpick_ignore_regex = [
    # other libraries' types: their inventories lie in the network, where a build never goes
    (r"py:class", r"(torch|numpy|pandas|matplotlib|ipywidgets)\..+"),
    (r"py:class", r"(pathlib|functools|collections|collections\.abc|concurrent\.futures)\..+"),  # and Python's own
    (r"py:class", r"[A-Z]"),  # type variables
    (r"py:class", r"course_lib\..+\._\w+"),  # private ones, which no page describes
    (r"py:class", r"course_lib\.lab\.models\.(Attention|EncoderBlock)"),  # parts of the laboratory's networks
]
