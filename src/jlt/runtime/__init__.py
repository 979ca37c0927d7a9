"""Infrastructure of running work: processes, signals, progress, random numbers, environment."""
