"""Write the YAML of the published runs and of their small twins: `python -m benchmarks.recipes`."""

from benchmarks.train.configurations import write

if __name__ == "__main__":
    write()
