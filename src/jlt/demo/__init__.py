"""A page that people click: images of one or two systems from the same noise, and how they come about."""
