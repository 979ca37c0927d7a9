"""Figures and the page, made from result files only."""
