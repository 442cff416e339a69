"""Sphinx builds these pages with `make docs`; warnings are errors."""

project = "mtt"
author = "The mtt authors"
extensions = ["myst_parser"]
exclude_patterns = ["_build"]
html_theme = "alabaster"
html_theme_options = {"description": "Megatron checkpoints as Hugging Face models"}
html_sidebars = {"**": ["about.html", "navigation.html", "searchbox.html"]}
html_copy_source = False
myst_heading_anchors = 3
# Plain output has no language, and pages are read in the repository, too.
highlight_language = "text"
