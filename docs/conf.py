"""Sphinx settings: `sphinx-build -W docs docs/_build` makes the site."""

from importlib.metadata import version as version_of

project = "jft"
author = "the jft authors"
release = version = version_of("jft")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
source_suffix = {".md": "markdown"}
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = "jft"

myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3
# Links into the source tree stay links to files there; the site does not copy them.
suppress_warnings = ["myst.xref_missing"]

autodoc_member_order = "bysource"
autodoc_typehints = "description"
napoleon_google_docstring = True
