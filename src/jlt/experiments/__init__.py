"""Recipes, matched ablations and the quickstart."""
