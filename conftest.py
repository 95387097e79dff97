"""What pytest leaves out of the collection of doctests."""

from importlib.util import find_spec

# A package of another's name, and the one module that needs an optional package.
collect_ignore = ["tests/other_name"]
if not find_spec("triton"):
    collect_ignore.append("lightning_compressm/nn/_triton.py")
