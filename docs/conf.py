"""Sphinx configuration; `make docs` builds the site."""

import hashlib
import os
from pathlib import Path

from lightning_compressm.__about__ import __version__

project = "lightning_compressm"
author = "the lightning_compressm maintainers"
copyright = author
version = release = __version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
source_suffix = {".md": "myst-nb"}
exclude_patterns = ["_build"]

myst_enable_extensions = ["amsmath", "colon_fence", "deflist", "dollarmath", "smartquotes"]
myst_heading_anchors = 3

# Tutorials are run when they, or the package, have changed; their kernels import this checkout.
ROOT = Path(__file__).resolve().parents[1]
_SOURCES = b"".join(p.read_bytes() for p in sorted(ROOT.glob("lightning_compressm/**/*.py")))
os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["PYTHONWARNINGS"] = "ignore:IProgress not found"  # tqdm misses ipywidgets
nb_execution_mode = "cache"
nb_execution_cache_path = str(
    ROOT / "docs" / "_build" / "tutorials" / hashlib.sha256(_SOURCES).hexdigest()[:12]
)
nb_execution_in_temp = True
nb_execution_timeout = 180
nb_execution_raise_on_error = True
nb_output_stderr = "warn"
nb_merge_streams = True

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_custom_sections = ["Source"]
python_maximum_signature_line_length = 88

html_theme = "furo"
html_title = f"{project} {__version__}"
html_copy_source = False
html_show_sourcelink = False
html_static_path = ["static"]
html_css_files = ["narrow.css"]
