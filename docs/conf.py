"""Settings of the site that `make docs` builds; neither the build nor a page fetches anything."""

from __future__ import annotations

import sys
from importlib.metadata import version as version_of
from pathlib import Path

DOCS = Path(__file__).parent
sys.path[:0] = [str(DOCS / "_ext"), str(DOCS.parent), str(DOCS.parent / "python")]

project = "LeaF"
author = "The LeaF developers"
version = release = version_of("leaf-distill")

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "commands",
    "docstrings",
    "mathml",
    "repository",
]
exclude_patterns = ["_ext", "_static"]
# Blocks without a language are commands, trees and formulas.
highlight_language = "none"
smartquotes_action = "D"  # dashes, but quotation marks as they are typed
default_role = "literal"
nitpicky = True
nitpick_ignore_regex = [
    # Other packages, whose pages this build does not read.
    ("py:class", r"(accelerate|collections|numpy|pathlib|torch|transformers)\..*"),
    # Ours that are not public, but for their names.
    ("py:exc", "(Sandbox|Server|Store)Error"),
    ("py:class", r"leaf_distill\.evaluation\.(sheets\.Sheet|faithfulness\.ScoreCurves)"),
]

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 6

autodoc_member_order = "bysource"
autodoc_typehints = "none"
# As lists of our own: a field of Sphinx would read "teacher, student" as a type and a name.
napoleon_use_param = False
napoleon_custom_sections = [("Attributes", "params_style")]

html_theme = "furo"
pygments_dark_style = "monokai"
html_title = "LeaF"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sphinx = False
html_show_copyright = False
html_math_renderer = "mathml"
