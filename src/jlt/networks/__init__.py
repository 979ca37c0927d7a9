"""The transformer, its layers and its named sizes; blind to paths, targets and guidance."""
