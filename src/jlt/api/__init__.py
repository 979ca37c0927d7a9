"""Five lines of Python: what `import jlt` offers, above all commands and below none."""
