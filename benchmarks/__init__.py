"""Experiments with the package: data, models, recipes, and the tables that the docs quote."""
