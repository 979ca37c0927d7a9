"""Infrastructure of storing work: atomic files, tables of rows, weights, the Hub."""
