"""Sphinx reads this: `make docs` builds the site, and a warning fails the build.

The tour is executed. The references of config fields and of public functions are made from the
code by `reference.py`, at every build.
"""

import os
import pathlib
import sys

DOCS = pathlib.Path(__file__).parent
ROOT = DOCS.parent
sys.path[:0] = [str(DOCS), str(ROOT)]
os.environ["PYTHONPATH"] = str(ROOT)  # for the notebook's kernel and its commands

import reference

import memoryformer

project = "MemoryFormer-JAX"
author = copyright = "The MemoryFormer-JAX authors"
release = version = memoryformer.__version__

extensions = ["myst_nb", "sphinx.ext.autodoc"]
exclude_patterns = ["_build", "_generated/*.inc"]
highlight_language = "none"  # of a block that names none
html_theme = "furo"
html_title = f"{project} {release}"
html_show_copyright = False

myst_heading_anchors = 4
nb_execution_mode = "force"
nb_execution_raise_on_error = True
nb_execution_timeout = 900
nb_merge_streams = True

add_module_names = False
autodoc_member_order = "bysource"
autodoc_mock_imports = ["apache_beam", "lm_eval"]  # of extras


def setup(app):
    """Write the generated pages before Sphinx looks for pages, and read our docstrings."""
    reference.write(DOCS / "_generated")
    app.connect("autodoc-process-docstring", reference.as_rst)
    app.connect("autodoc-process-signature", reference.short_types)
