"""What pytest leaves out of the collection of doctests."""

from importlib.util import find_spec

# The one module that can't be imported without an optional package.
collect_ignore = [] if find_spec("triton") else ["lightning_compressm/nn/_triton.py"]
