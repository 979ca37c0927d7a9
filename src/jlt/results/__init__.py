"""The result files: frozen data classes with their schema numbers, one reader and one writer. Numbers, no sentences."""
